"""Imports obey the arrow.

    types -> lp -> routing -> experts -> {layers, data} -> {hf, models} -> {embed, train, attack, audit}
          -> evaluate -> reproduce -> cli

Two of one brace may know each other in one direction.
metrics, report and plots read Routing values, recorded tensors and saved results, never a model.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import usmoe

ROOT = Path(usmoe.__file__).parent
ARROW = [
    {"types", "checked", "_autoregister"},
    {"lp"},
    {"routing"},
    {"experts"},
    {"layers", "data"},
    {"hf", "models"},
    {"embed", "train", "attack", "audit"},
    {"evaluate"},
    {"reproduce"},
]
RANK = {name: rank for rank, names in enumerate(ARROW) for name in names}
READERS = {"metrics", "report", "plots"}
TOP = {"cli", "__main__"}
HEAVY = {"transformers", "datasets", "mteb", "sentence_transformers", "accelerate", "safetensors"}
HEAVY |= {"matplotlib", "typer", "rich", "tqdm", "lm_eval", "pyarrow", "sklearn", "scipy"}
ADAPTERS = {"data", "hf", "models", "embed", "train", "evaluate", "cli", "__main__", "report", "plots"}
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def part(path: Path) -> str:
    """routing/scores.py -> routing, metrics.py -> metrics, __init__.py -> __init__."""
    return path.parts[0].removesuffix(".py")


def imported(path: Path) -> list[str]:
    """Every module that a file names in an import, wherever it stands; `from usmoe import x` is usmoe.x."""
    names: list[str] = []
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: write the import in full"
            names += [f"usmoe.{a.name}" for a in node.names] if node.module == "usmoe" else [node.module or ""]
    return names


def may_import(one: str, other: str) -> bool:
    if one in TOP or one == other:
        return True
    if one in READERS:
        return other in {"types"} | READERS
    assert one in RANK, f"usmoe.{one} has no place in the arrow: give it one in tests/test_layering.py"
    return other in READERS or RANK.get(other, len(ARROW)) <= RANK[one]


def ours(path: Path) -> set[str]:
    """The parts of usmoe that a file imports."""
    return {f"{name}.__init__".split(".")[1] for name in imported(path) if name.split(".")[0] == "usmoe"}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_obey_the_arrow(path: Path):
    if part(path) != "__init__":
        assert not {other for other in ours(path) if not may_import(part(path), other)}


@pytest.mark.parametrize("path", [path for path in MODULES if part(path) == "data"], ids=str)
def test_data_know_neither_routers_nor_layers(path: Path):
    assert not ours(path) - {"data", "types", "checked"} - READERS


def test_no_two_parts_import_each_other():
    edges = {(part(path), other) for path in MODULES for other in ours(path) if part(path) not in TOP | {"__init__"}}
    assert not {(one, other) for one, other in edges if one != other and (other, one) in edges}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_heavy_packages_are_imported_by_their_adapters_alone(path: Path):
    if part(path) not in ADAPTERS:
        assert not {name.split(".")[0] for name in imported(path)} & HEAVY


def test_import_usmoe_needs_torch_numpy_and_jaxtyping_alone():
    """Nor torch._dynamo, which `import torch` leaves out, which a decorator brings in, and which takes a second."""
    code = (
        "import sys, torch, numpy, jaxtyping; before = set(sys.modules); import usmoe;"
        "print(*{name for name in set(sys.modules) - before})"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    packages = {name.split(".")[0] for name in loaded} - sys.stdlib_module_names
    assert not [name for name in loaded if name.startswith("torch._dynamo")][:3]
    assert not packages - {"usmoe", "torch", "numpy", "jaxtyping", "wadler_lindig"}
