"""The source of a router of one's own: its files and its parameters, by which another day's router is told from it."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import re
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from usmoe.routing.router import Router


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a router of one's own is made of."""

    files: dict[str, str]
    """{path as its module is imported: source text}: the module's, and those of one's own that it imports."""
    places: dict[str, str]
    """Where each of these files lies."""
    fields: str
    """The parameters of the object: a class instance's, a partial's, a closure's; as JSON."""
    unread: tuple[str, ...]
    """Modules whose source cannot be read."""

    @property
    def digest(self) -> str:
        """Of all of it but the places."""
        said = [sorted(self.files.items()), self.fields, self.unread]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    @property
    def digests(self) -> dict[str, str]:
        """{path as in `files`: digest of that file}."""
        return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in self.files.items()}


def source_of(router: Any, named: str | None = None) -> Source | None:
    """The source of a router of one's own; None for a router of usmoe, which its fields say.

    named  as it was written, package.module:name: the object may be made in another module than its class

    What the files import is followed through the user's own modules: those outside of the standard library and of
    installed packages, and those of the package that the router itself is in. What is imported by a name that is made
    up while the code runs, and files of data that it reads, are not seen.
    """
    if is_of_usmoe(router):
        return None
    begin = {name for name in _modules_of(router, set()) if not _is_usmoe(name)}
    if named is not None and ":" in named:
        begin.add(named.partition(":")[0].strip())
    packages = {name.partition(".")[0] for name in begin}
    files: dict[str, str] = {}
    places: dict[str, str] = {}
    unread: set[str] = set()
    todo, done = sorted(begin), set()
    while todo:
        name = todo.pop()
        if name in done:
            continue
        done.add(name)
        found = _file_of(name)
        if name not in begin and (found is None or not _is_own(name, found, packages)):
            continue
        try:
            if found is None:
                raise OSError
            text = found.read_text(encoding="utf-8")
            todo += _imports(ast.parse(text), name, found.name == "__init__.py")
        except (OSError, ValueError, SyntaxError):  # no file, compiled code, or bytes of another encoding
            unread.add(name)
            continue
        path = (
            f"{name.replace('.', '/')}/__init__.py" if found.name == "__init__.py" else f"{name.replace('.', '/')}.py"
        )
        files[path], places[path] = text, str(found)
        parent = name.rpartition(".")[0]
        todo += [parent] if parent else []
    return Source(
        files=files,
        places=places,
        fields=json.dumps(_said(router, frozenset()), sort_keys=True),
        unread=tuple(sorted(unread)),
    )


def is_of_usmoe(router: Any) -> bool:
    """Whether a router is one of usmoe's own kinds, which its fields say."""
    return isinstance(router, Router) and _is_usmoe(type(router).__module__)


def _is_usmoe(module: str) -> bool:
    return module.partition(".")[0] in ("usmoe", "builtins", "functools")


def _modules_of(value: Any, seen: set[int]) -> Iterator[str]:
    """The modules in which a callable, and what it is put together from, are written."""
    if id(value) in seen:
        return
    seen.add(id(value))
    parts: list[Any] = []
    if isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, types.MethodType):
        parts = [value.__self__, value.__func__]
    elif isinstance(value, types.FunctionType):
        yield value.__module__ or "__main__"
        parts = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        parts += [*(value.__defaults__ or ()), getattr(value, "__wrapped__", None)]
    elif isinstance(value, type):
        yield from (kind.__module__ for kind in value.__mro__ if not _is_installed(kind.__module__))
    elif callable(value):
        yield from (kind.__module__ for kind in type(value).__mro__ if not _is_installed(kind.__module__))
        parts = list(getattr(value, "__dict__", {}).values())
    for part in parts:
        if callable(part):
            yield from _modules_of(part, seen)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that is not yet bound
        return False


def _is_installed(module: str) -> bool:
    """Whether a module is of the standard library, or of an installed package."""
    if module.partition(".")[0] in sys.stdlib_module_names and module != "__main__":
        return True
    found = _file_of(module)
    return found is not None and _lies_with_packages(found)


def _is_own(module: str, file: Path, packages: set[str]) -> bool:
    if _is_usmoe(module) or module.partition(".")[0] in sys.stdlib_module_names:
        return False
    return module.partition(".")[0] in packages or not _lies_with_packages(file)


def _lies_with_packages(file: Path) -> bool:
    places = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return any(file.is_relative_to(place) for place in places) or "site-packages" in file.parts


def _file_of(module: str) -> Path | None:
    """The file of a module's source, imported or not; None where there is none."""
    known = sys.modules.get(module)
    if known is not None:
        file = getattr(known, "__file__", None)
        return None if file is None else Path(file)
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):  # a part of a module that is no package, say
        return None
    return None if spec is None or not spec.has_location or spec.origin is None else Path(spec.origin)


def _imports(tree: ast.AST, module: str, is_package: bool) -> list[str]:
    """Every module that a file may name in an import, wherever it stands: of `from a import b` both a and a.b."""
    package = module if is_package else module.rpartition(".")[0]
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            found += [base, *(f"{base}.{alias.name}" for alias in node.names if base)]
    return [name for name in found if name and name.partition(".")[0] not in sys.stdlib_module_names]


def _said(value: Any, around: frozenset[int]) -> Any:
    """A value as JSON that is the same in every process."""
    if value is None or isinstance(value, bool | int | float | str):
        return value if not isinstance(value, float) else repr(value)
    if id(value) in around:
        return "itself"
    inside = around | {id(value)}
    if isinstance(value, torch.Tensor):
        bits = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return [str(value.dtype), list(value.shape), hashlib.sha256(bits).hexdigest()]
    if hasattr(value, "tobytes") and hasattr(value, "dtype"):  # an array of numpy
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, Mapping):
        return {"of": [[_said(key, inside), _said(one, inside)] for key, one in value.items()]}
    if isinstance(value, list | tuple):
        return [_said(one, inside) for one in value]
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(_said(one, inside), sort_keys=True) for one in value)
    if isinstance(value, Router):
        return value.to_dict()
    if isinstance(value, functools.partial):
        return {"partial": _said(value.func, inside), "given": _said([value.args, value.keywords], inside)}
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        return {"function": f"{value.__module__}:{value.__qualname__}", "holds": _said(cells, inside)}
    if isinstance(value, types.MethodType):
        return {"method": _said(value.__func__, inside), "of": _said(value.__self__, inside)}
    if isinstance(value, type):
        return f"{value.__module__}:{value.__qualname__}"
    held = getattr(value, "__dict__", None)
    if isinstance(value, torch.nn.Module):  # its parameters are of the model, and saved with it
        held = {name: one for name, one in vars(value).items() if not name.startswith("_")}
        held |= dict(value.named_children())
    if held is None:
        return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
    return {"class": f"{type(value).__module__}:{type(value).__qualname__}", "fields": _said(dict(held), inside)}
