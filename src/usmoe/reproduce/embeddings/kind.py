"""The experiments on embeddings, as `usmoe.reproduce.kind` asks for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from usmoe.reproduce.embeddings import render
from usmoe.reproduce.embeddings import run as scoring
from usmoe.reproduce.embeddings.plan import Plan, downloads
from usmoe.reproduce.embeddings.plan import plan as plan_of
from usmoe.reproduce.embeddings.run import Result
from usmoe.reproduce.experiment import Experiment
from usmoe.reproduce.kind import Asked
from usmoe.reproduce.view import View

UNIT = "score"
TRAINS = False
plot = render.plot
read = Result.from_dict


def plan(experiment: Experiment, asked: Asked) -> Plan:
    asked.refuse(experiment, "rows", "corpora", "routers", "seeds", "steps")
    return plan_of(
        experiment,
        asked.scale,
        model=asked.model,
        data=asked.data,
        tasks=asked.tasks,
        batch_size=asked.batch_size,
        seed=asked.seed,
        device=asked.device,
        dtype=asked.dtype,
    )


def announce(plan: Plan, offline: bool, anew: bool) -> str:
    return "" if offline else downloads(plan)


def run(plan: Plan, results: Path, *, offline: bool, anew: bool, done: Callable[[str], None]) -> Result:
    return scoring.run(plan, results, offline=offline, anew=anew, done=lambda score: done(score.task))


def views(result: Result, wide: bool) -> list[View]:
    return [render.view(result, deviations=wide)]


def refuse_picture(experiment: Experiment) -> None:
    render.refuse_picture(experiment.name)
