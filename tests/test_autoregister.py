"""After `import usmoe`, transformers' Auto classes know the family that usmoe brings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from deepseek_checkpoint import PUBLISHED, published_tensors, write, write_tokenizer
from usmoe._autoregister import _Finder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "published", published_tensors(PUBLISHED), PUBLISHED)


# Registration without an import: each in a Python of its own, with nobody at the keyboard and warnings as errors.

IMPORT = "import sys, usmoe"


def run(*lines: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(lines), str(folder)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


def said_by(*lines: str, folder: Path | None = None) -> list[str]:
    done = run(*lines, folder=folder)
    assert not done.returncode, done.stderr
    return done.stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AutoTokenizer", "AutoModelForCausalLM"])
def test_after_import_usmoe_the_auto_classes_know_the_family(folder, name):
    write_tokenizer(folder)
    said = said_by(
        IMPORT,
        "print('transformers' in sys.modules)",
        f"from transformers import {name}",
        "print('usmoe.hf.deepseek' in sys.modules)",
        f"print(type({name}.from_pretrained(sys.argv[1])).__module__)",
        folder=folder,
    )
    assert said == ["False", "False", "usmoe.hf.deepseek"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        f"from transformers import AutoConfig; {IMPORT}",
        f"{IMPORT}; import importlib; importlib.reload(usmoe); from transformers import AutoConfig",
        f"{IMPORT}; from transformers import LlamaForCausalLM, AutoConfig",
        f"{IMPORT}, importlib; import usmoe.hf.deepseek; from transformers import AutoConfig; importlib.reload(usmoe)",
    ],
)
def test_in_whatever_order_things_are_imported(folder, imports):
    said = said_by(
        imports,
        "print(AutoConfig.for_model('deepseek', vocab_size=7).vocab_size)",
        "print(type(AutoConfig.from_pretrained(sys.argv[1])).__module__)",
        "print(sum('usmoe' in type(finder).__module__ for finder in sys.meta_path))",
        "print(type(sys.modules['transformers.models.auto.configuration_auto'].__loader__).__name__)",
        folder=folder,
    )
    assert said == ["7", "usmoe.hf.deepseek", "0", "SourceFileLoader"]  # nothing of ours is left in the import system


@pytest.mark.slow
def test_threads_that_import_transformers_at_once(folder):
    said = said_by(
        IMPORT,
        "import threading, transformers",
        "names = ['AutoTokenizer', 'LlamaForCausalLM', 'Trainer', 'AutoModelForCausalLM', 'PreTrainedModel']",
        "threads = [threading.Thread(target=getattr, args=(transformers, name)) for name in names]",
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]",
        "print(*[hasattr(transformers, name) for name in names])",
        "print(type(transformers.AutoConfig.from_pretrained(sys.argv[1])).__module__)",
        folder=folder,
    )
    assert said == ["True"] * 5 + ["usmoe.hf.deepseek"]


def test_the_module_is_found_as_it_would_be_found_without_us(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [object(), *sys.meta_path])  # a finder without find_spec is passed over
    name = "transformers.models.auto.configuration_auto"
    found = _Finder().find_spec(name, transformers.models.auto.__path__)
    assert found.origin == sys.modules[name].__file__
    assert "class AutoConfig" in found.loader.get_source(name)
    assert _Finder().find_spec("transformers.models.auto.modeling_auto", transformers.models.auto.__path__) is None


@pytest.mark.slow
def test_without_transformers_its_absence_is_what_is_reported():
    block = "sys.meta_path = [f for f in sys.meta_path if 'PathFinder' not in str(f)]"
    done = run("import sys, torch, numpy, jaxtyping, usmoe._autoregister", block, IMPORT, "import transformers")
    assert done.stderr.strip().endswith("ModuleNotFoundError: No module named 'transformers'")


@pytest.mark.slow
def test_a_registration_that_fails_is_a_warning_and_transformers_is_there():
    done = run(
        IMPORT,
        "from usmoe import _autoregister",
        "_autoregister.DeepseekConfig = None",
        "from transformers import AutoConfig",
        "print(AutoConfig.__name__)",
    )
    assert done.stdout.split() == ["AutoConfig"]
    assert done.stderr.startswith("usmoe could not register its models with transformers: TypeError(")


@pytest.mark.slow
def test_a_family_that_transformers_has_by_itself_is_left_alone():
    said = said_by(
        "from transformers import AutoConfig, OlmoeConfig",
        "class Theirs(OlmoeConfig): model_type = 'deepseek'",
        "AutoConfig.register('deepseek', Theirs)",
        IMPORT,
        "print(type(AutoConfig.for_model('deepseek')).__name__)",
    )
    assert said == ["Theirs"]
