"""A run, and a cached figure, is of one source of a router of one's own: an edited one is refused, or said."""

import functools
import importlib
import json
import sys
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import usmoe
from tiny_finetuning import TINY, config_of, keyword_csv, pretrained
from usmoe.cli.app import app
from usmoe.hf.identity import identity
from usmoe.routing.source import source_of
from usmoe.train.finetune import finetune
from usmoe.train.finetuned import load_classifier, start_of
from usmoe.train.folder import RunFolder, load_run
from usmoe.train.loop import train

PLAIN = """
import usmoe
def route(logits, valid=None, **kw):
    return usmoe.TokenChoice(k={k})(logits, valid, **kw)
"""
KINDS = {
    "a function": PLAIN,
    "a lambda": """
import usmoe
route = lambda logits, valid=None, **kw: usmoe.TokenChoice(k={k})(logits, valid, **kw)
""",
    "a partial": PLAIN.replace("k={k}", "k=k").replace("valid=None, ", "valid=None, *, k, ")
    + "import functools\nroute = functools.partial(route, k={k})\n",
    "an instance": """
import usmoe
class Mine:
    def __init__(self, k):
        self.k = k
    def __call__(self, logits, valid=None, **kw):
        return usmoe.TokenChoice(k=self.k)(logits, valid, **kw)
route = Mine({k})
""",
    "an instance of a dataclass of usmoe's kind": """
import dataclasses, usmoe
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(usmoe.TokenChoice):
    name = "mine"
route = Mine(k={k})
""",
    "a closure": """
import usmoe
def made(k):
    def route(logits, valid=None, **kw):
        return usmoe.TokenChoice(k=k)(logits, valid, **kw)
    return route
route = made({k})
""",
}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Write files of modules, and import the first anew; afterwards none of them is known."""
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    names = set()

    def write(**files):
        for name, text in files.items():
            path = tmp_path / "code" / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            names.add(name.partition("__")[0])
        forget()
        return importlib.import_module(next(iter(files)).replace("__", "."))

    def forget():
        for module in [module for module in sys.modules if module.partition(".")[0] in names]:
            del sys.modules[module]
        importlib.invalidate_caches()

    yield write
    forget()


def digest(router, named=None):
    found = source_of(router, named)
    assert found is not None
    assert not found.unread
    return found.digest


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_router_has_a_digest_that_follows_its_file_and_nothing_else(kind, written):
    one = digest(written(pinned_a=KINDS[kind].format(k=1)).route)
    assert digest(written(pinned_a=KINDS[kind].format(k=1)).route) == one
    assert digest(written(pinned_a=KINDS[kind].format(k=2)).route) != one


@pytest.mark.parametrize("how", ["import pinned_b", "from pinned_b import K", "def later():\n    import pinned_b"])
def test_helpers_of_ones_own_count_wherever_they_are_imported(how, written):
    mine = f"{how}\n" + PLAIN.format(k=1)
    helper = "import pinned_c, torch, json\nK = {k}\n"
    made = [
        digest(written(pinned_a=mine, pinned_b=helper.format(k=k), pinned_c=f"N = {n}\n").route)
        for k, n in ((1, 1), (2, 1), (1, 2), (1, 1))
    ]
    assert made[0] == made[3]
    assert len(set(made)) == 3
    found = source_of(written(pinned_a=mine, pinned_b=helper.format(k=1), pinned_c="N = 1\n").route)
    assert found is not None
    assert set(found.files) == {"pinned_a.py", "pinned_b.py", "pinned_c.py"}  # neither torch nor usmoe


def test_relative_imports_of_a_package_and_a_name_in_another_module_count(written):
    files = {"pinned_p__route": "from .parts import route\n", "pinned_p____init__": "", "pinned_p__parts": PLAIN}
    made = [
        digest(written(**{name: text.format(k=k) for name, text in files.items()}).route, "pinned_p.route:route")
        for k in (1, 2, 1)
    ]
    assert made[0] == made[2] != made[1]


def test_parameters_of_an_object_count_and_addresses_do_not(written):
    module = written(pinned_a=KINDS["an instance"].format(k=1) + "def f(logits, valid=None, *, t): ...\n")
    assert digest(module.Mine(1)) == digest(module.Mine(1)) != digest(module.Mine(2))
    assert (
        digest(module.Mine(torch.ones(2))) == digest(module.Mine(torch.ones(2))) != digest(module.Mine(torch.zeros(2)))
    )
    assert digest(functools.partial(module.f, t=1)) != digest(functools.partial(module.f, t=2))
    assert digest(functools.partial(module.f, t=module.Mine(1))) == digest(
        functools.partial(module.f, t=module.Mine(1))
    )
    assert source_of(usmoe.USMoE(k=1)) is None


def test_what_is_cached_under_a_router_is_another_where_its_helper_is(written):
    mine = "import pinned_b\n" + PLAIN.format(k=1)
    said = [identity(written(pinned_a=mine, pinned_b=f"K = {k}\n").route) for k in (1, 2, 1)]
    assert said[0] == said[2] != said[1]
    namespace: dict[str, Any] = {}
    exec(PLAIN.format(k=1), namespace | {"__name__": "nowhere"}, namespace)
    assert identity(namespace["route"]) is None


def run_of(tmp_path, k=1, text=PLAIN, steps=4, **changes):
    return pretrained(tmp_path, steps=steps, model=TINY.replace(router="pinned_a:route"), **changes)


def go_on(folder, **changes):
    config = RunFolder(folder).config()
    return train(config, folder, cache=folder.parent / "cache", progress=False, resume=True, **changes)


@pytest.mark.parametrize("kind", ["a function", "a partial", "a lambda"])
def test_a_run_neither_goes_on_nor_is_read_under_an_edited_file(kind, written, tmp_path):
    written(pinned_a=KINDS[kind].format(k=1))
    run = run_of(tmp_path)
    assert (run / "router" / "pinned_a.py").read_text() == KINDS[kind].format(k=1)
    go_on(run)
    load_run(run)
    written(pinned_a=KINDS[kind].format(k=2))
    sentence = r"pinned_a\.py had the digest \w{12} and has \w{12}: put the saved source back.*router.*new run"
    for refused in (go_on, load_run, lambda folder: start_of(folder, "best")):
        with pytest.raises(ValueError, match=sentence):
            refused(run)
    told = []
    assert load_run(run, edited=True, tell=told.append).model.moe_layers[0].router
    assert len(told) == 1
    assert "Read all the same" in told[0]
    written(pinned_a=(run / "router" / "pinned_a.py").read_text())
    go_on(run)


def test_an_edited_helper_and_a_missing_one_are_named(written, tmp_path):
    mine = "import pinned_b\n" + PLAIN.format(k="pinned_b.K")
    written(pinned_a=mine, pinned_b="K = 1\n")
    run = run_of(tmp_path)
    written(pinned_a=mine, pinned_b="K = 2\n")
    with pytest.raises(ValueError, match=r"edited.*: pinned_b\.py had the digest"):
        load_run(run)
    written(pinned_a=PLAIN.format(k=1))
    with pytest.raises(ValueError, match=r"pinned_b\.py had the digest \w{12} and has none \(no such file\)"):
        go_on(run)


def test_of_a_run_without_a_digest_it_is_said_that_nothing_is_known(written, tmp_path):
    written(pinned_a=PLAIN.format(k=1))
    run = run_of(tmp_path)
    (run / "router.json").unlink()
    told = []
    load_run(run, tell=told.append)
    go_on(run, tell=told.append)
    assert [one[:32] for one in told] == ["Nothing is known of the source o"] * 2
    load_run(run, tell=told.append)  # pinned when it went on
    assert len(told) == 2


def test_an_object_that_was_given_is_asked_for_and_compared(written, tmp_path):
    written(pinned_a=PLAIN.format(k=1))
    run = pretrained(tmp_path, model=TINY)
    assert not (run / "router.json").exists()
    config = RunFolder(run).config()
    other, cache = tmp_path / "other", tmp_path / "cache"
    train(config, other, cache=cache, progress=False, router=usmoe.TokenChoice(k=1))
    assert load_run(other).model.moe_layers[0].router == usmoe.TokenChoice(k=1)
    with pytest.raises(ValueError, match=r"begun under the router token_choice\(k=1\) \(an object\)"):
        train(config, other, cache=cache, progress=False, resume=True)
    mine = written(pinned_a=KINDS["an instance"].format(k=1)).Mine
    third = tmp_path / "third"
    train(config, third, cache=cache, progress=False, router=mine(1))
    with pytest.raises(ValueError, match=r"trained under an object, pinned_a:Mine"):
        load_run(third)
    with pytest.raises(ValueError, match=r"The parameters of the router pinned_a:Mine are others"):
        train(config, third, cache=cache, progress=False, resume=True, router=mine(2))
    train(config, third, cache=cache, progress=False, resume=True, router=mine(1))


def test_where_no_source_can_be_had_it_is_said_at_the_start(tmp_path):
    namespace: dict[str, Any] = {"__name__": "nowhere"}
    exec(PLAIN.format(k=1), namespace)
    told = []
    config = RunFolder(pretrained(tmp_path, model=TINY)).config()
    said: dict[str, Any] = dict(cache=tmp_path / "cache", progress=False, router=namespace["route"], tell=told.append)
    train(config, tmp_path / "other", **said)
    assert len(told) == 1
    assert "cannot be read (nowhere has no file of it)" in told[0]


def test_a_classifier_is_pinned_as_its_language_model_is(written, tmp_path):
    written(pinned_a=PLAIN.format(k=1))
    start = pretrained(tmp_path)
    config = config_of(keyword_csv(tmp_path / "words.csv"), epochs=1, steps=2, router="pinned_a:route")
    finetune(config, tmp_path / "tuned", checkpoint=start, progress=False)
    load_classifier(tmp_path / "tuned")
    written(pinned_a=PLAIN.format(k=2))
    for refused in (
        lambda: load_classifier(tmp_path / "tuned"),
        lambda: finetune(config, tmp_path / "tuned", checkpoint=start, progress=False, resume=True),
    ):
        with pytest.raises(ValueError, match=r"pinned_a\.py had the digest"):
            refused()


def test_the_commands_refuse_and_eval_goes_on_where_it_is_told_to(written, tmp_path):
    written(pinned_a=PLAIN.format(k=1))
    run = run_of(tmp_path)
    written(pinned_a=PLAIN.format(k=2))
    shared = ["--cache", str(tmp_path / "cache")]
    resume = CliRunner().invoke(app, ["train", "--run", str(run), "--resume", *shared])
    read = ["eval", str(run), "--positions", "3", "--tokens", "60", "--json", *shared]
    refused = CliRunner().invoke(app, read)
    for said in (resume, refused):
        assert said.exit_code
        assert "pinned_a.py had the digest" in str(said.exception)
    edited = CliRunner().invoke(app, [*read, "--edited"])
    assert not edited.exit_code, edited.exception
    assert "Read all the same" in edited.stderr
    assert json.loads(edited.stdout)["tokens"]
