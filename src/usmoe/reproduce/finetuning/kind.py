"""The fine-tuning experiment, as `usmoe.reproduce.kind` asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from usmoe.reproduce.experiment import Experiment
from usmoe.reproduce.finetuning import plan as planning
from usmoe.reproduce.finetuning import render
from usmoe.reproduce.finetuning import run as running
from usmoe.reproduce.finetuning.plan import Plan
from usmoe.reproduce.finetuning.run import Result
from usmoe.reproduce.view import View

UNIT = "part"
TRAINS = True
plan = planning.plan


def announce(plan: Plan, offline: bool, anew: bool) -> str:
    said = planning.announce(plan)
    if anew:
        said += (
            " --force tests no classifier again: each is tested once, with its training. To have another, remove its "
            f"folder in {running.FINETUNED}/ of the results."
        )
    return said


def run(plan: Plan, results: Path, *, offline: bool, anew: bool, done: Callable[[str], None]) -> Result:
    """`anew` changes nothing, as `announce` says."""
    return running.run(plan, results, offline=offline, done=done)


def read(data: Mapping[str, Any]) -> Result:
    return Result.from_dict(data)


def views(result: Result, wide: bool) -> list[View]:
    return render.views(result)


def refuse_picture(experiment: Experiment) -> None:
    raise ValueError(f"{experiment.name} is a table in the paper, without a picture. Leave --plot out.")


def plot(result: Result, path: Path) -> None:
    from usmoe.reproduce.experiment import EXPERIMENTS

    refuse_picture(EXPERIMENTS[result.plan.experiment])
