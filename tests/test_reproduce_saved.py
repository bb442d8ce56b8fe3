"""Where results lie, and the command that gives each: of every kind of experiment."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from planned_training import planned
from usmoe.reproduce import EXPERIMENTS, Asked, find, kind_of, load, save
from usmoe.reproduce.experiment import Scale
from usmoe.reproduce.saved import command, place_of

NAMES = ("table5", "table14", "table13", "table15", "table16")
"""One of every kind, and both tables of settings."""


def plan_of(name: str, scale: Scale = "paper", **asked: Any) -> Any:
    if EXPERIMENTS[name].kind == "training":
        return planned(name, scale=scale, **asked)
    return kind_of(find(name)).plan(find(name), Asked(scale=scale, **asked))


@dataclasses.dataclass
class Kept:
    """A result of a plan, with nothing in it."""

    plan: Any

    def to_dict(self) -> dict[str, Any]:
        empty = {"scores": [], "rows": [], "curves": {}}
        return {"schema": 1, "plan": self.plan.to_dict()} | ({} if hasattr(self.plan, "settings") else empty)


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_as_it_is_has_the_plain_name_unless_that_is_taken(name, tmp_path):
    made, path = plan_of(name), tmp_path / f"{name}-paper.json"
    assert made.options() == ()
    assert command(made) == f"usmoe reproduce {name} --scale paper"
    assert place_of(made, path) == path
    save(Kept(made), path)
    assert place_of(load(path).plan, path) == place_of(made, path) == path
    save(Kept(others(made)), path)
    beside = place_of(made, path)
    assert re.fullmatch(rf"{name}-paper-[0-9a-f]{{8}}\.json", beside.name)
    json.dumps(made.to_dict())


def others(plan: Any) -> Any:
    """The plan with other settings."""
    if hasattr(plan, "settings"):
        return dataclasses.replace(plan, settings={})
    if hasattr(plan, "runs"):
        return dataclasses.replace(plan, runs=plan.runs[:-1])
    return dataclasses.replace(plan, seed=1)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("table5", {"tasks": ("BIOSSES", "STS12"), "seed": 3, "batch_size": 8, "dtype": "float16", "model": "a/b"}),
        ("table14", {"rows": ("usmoe", "remoe"), "corpora": ("novels",), "seeds": 1, "seed": 4, "steps": 50}),
        ("figure12 --part b", {"routers": ("usmoe(k=2, alpha=0.3)",), "dtype": "float32"}),
        ("table13", {"rows": ("usmoe",), "tasks": ("sst2", "imdb"), "seeds": 3, "routers": ("usmoe(k=1)",)}),
    ],
)
def test_options_give_the_command_and_a_name_of_their_own(name, asked, tmp_path):
    made, path = plan_of(name, "small", **asked), tmp_path / "x.json"
    flags = {"rows": "row", "corpora": "corpus", "routers": "router", "batch_size": "batch-size"}
    words = shlex.split(command(made))[len(f"usmoe reproduce {name} --scale small".split()) :]
    found = sorted(zip(words[::2], words[1::2], strict=True))
    pairs = [(what, one) for what, said in asked.items() for one in (said if isinstance(said, tuple) else (said,))]
    assert found == sorted((f"--{flags.get(what, what)}", str(one)) for what, one in pairs)
    beside = place_of(made, path)
    assert re.fullmatch(r"x-[0-9a-f]{8}\.json", beside.name)
    elsewhere = {"device": "cuda", "data": "/other", "left_out": dict.fromkeys(made.left_out, "gone")}
    moved = dataclasses.replace(made, **elsewhere)
    assert dataclasses.replace(moved, left_out=made.left_out).basis() == made.basis() == moved.basis()
    save(Kept(made), path)  # written before options had names of their own
    assert place_of(made, path) == path
    path.write_text("{")
    assert place_of(made, path) == beside


def test_results_that_are_committed_are_those_of_their_commands():
    """A change to what a result rests on would have all of them run again. Those of embeddings are of some tasks."""
    for path in sorted((Path(__file__).parent.parent / "results").glob("*[0-9]-small.json")):
        made = load(path).plan
        assert place_of(dataclasses.replace(made, device="cuda"), path) == path
        assert ("--tasks" in command(made)) == (EXPERIMENTS[made.experiment].kind == "embeddings")
        assert "--corpus" not in command(made)
