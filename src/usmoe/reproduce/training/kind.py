"""The experiments on training from scratch, as `usmoe.reproduce.kind` asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from usmoe.reproduce.experiment import Experiment
from usmoe.reproduce.training import plan as planning
from usmoe.reproduce.training import render
from usmoe.reproduce.training import run as running
from usmoe.reproduce.training.plan import Plan
from usmoe.reproduce.training.run import Result
from usmoe.reproduce.training.study import STUDIES
from usmoe.reproduce.view import View

UNIT = "part"
TRAINS = True
plan = planning.plan
plot = render.plot


def announce(plan: Plan, offline: bool, anew: bool) -> str:
    return planning.announce(plan)


def run(plan: Plan, results: Path, *, offline: bool, anew: bool, done: Callable[[str], None]) -> Result:
    return running.run(plan, results, offline=offline, anew=anew, done=done)


def read(data: Mapping[str, Any]) -> Result:
    return Result.from_dict(data)


def views(result: Result, wide: bool) -> list[View]:
    return render.views(result)


def refuse_picture(experiment: Experiment) -> None:
    if not STUDIES[experiment.name].curves:
        drawn = ", ".join(name for name, study in STUDIES.items() if study.curves)
        raise ValueError(
            f"{experiment.name} is a table in the paper, without a picture. Leave --plot out; drawn are {drawn}."
        )
