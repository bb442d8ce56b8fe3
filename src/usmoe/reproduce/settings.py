"""Tables 15 and 16: the settings in use beside the paper's. Nothing is trained; as a kind of experiment."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from usmoe.reproduce.experiment import EXPERIMENTS, Experiment, Scale
from usmoe.reproduce.figures import paper_figures
from usmoe.reproduce.kind import Asked
from usmoe.reproduce.view import PAPER, View

SCHEMA = 1
UNIT = "setting"
TRAINS = False

_TRAINING = {"enwik8": "enwik8", "text8": "text8", "wikitext103": "WikiText-103", "lm1b": "One Billion Word"}
_FINETUNING = {"sst2": "SST-2", "sst5": "SST-5", "imdb": "IMDB", "banking77": "BANKING77"}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The settings that are shown."""

    experiment: str
    scale: Scale
    settings: Mapping[str, Mapping[str, Any]]
    """Of each data set, by the name of its preset: the configuration whole."""

    @property
    def parts(self) -> int:
        return 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON; every configuration whole."""
        return dataclasses.asdict(self)

    def basis(self) -> dict[str, Any]:
        return {"settings": self.settings}

    def options(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True, kw_only=True)
class Result:
    """The plan itself."""

    plan: Plan

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "plan": self.plan.to_dict()}


def plan(experiment: Experiment, asked: Asked) -> Plan:
    """The presets at paper scale, and what the small scale has in their place."""
    asked.refuse(experiment, "data", "dtype", "model", "tasks", "batch_size", "rows", "corpora", "routers", "seeds")
    asked.refuse(experiment, "steps")
    return Plan(experiment=experiment.name, scale=asked.scale, settings=_settings(experiment, asked.scale))


def _settings(experiment: Experiment, scale: Scale) -> dict[str, dict[str, Any]]:
    if experiment.name == "table15":
        from usmoe.reproduce.training.runs import CORPORA, SMALL
        from usmoe.train.presets import PRESETS

        if scale == "small":
            return {name: SMALL.replace(corpus=corpus).to_dict() for name, corpus in CORPORA.items()}
        return {name: PRESETS[name].to_dict() for name in _TRAINING}
    from usmoe.reproduce.finetuning.study import small
    from usmoe.train.finetune_config import FINETUNE_PRESETS

    return {name: (small(name) if scale == "small" else FINETUNE_PRESETS[name]).to_dict() for name in _FINETUNING}


def announce(plan: Plan, offline: bool, anew: bool) -> str:
    return ""


def run(plan: Plan, results: Path, *, offline: bool, anew: bool, done: Callable[[str], None]) -> Result:
    return Result(plan=plan)


def read(data: Mapping[str, Any]) -> Result:
    return Result(plan=Plan(**data["plan"]))


def views(result: Result, wide: bool) -> list[View]:
    """A row a data set, the paper's under ours where it has the set."""
    plan, experiment = result.plan, EXPERIMENTS[result.plan.experiment]
    training = experiment.name == "table15"
    printed = {str(row.dataset): row.values for row in paper_figures(experiment.name).rows}
    names = _TRAINING if training else _FINETUNING
    last, field = ("Iterations", "steps") if training else ("Epochs", "epochs")
    length = "segment" if training else "length"
    rows = []
    for name, said in plan.settings.items():
        rows.append(
            (name, *(f"{said[one]:g}" if one == "lr" else f"{said[one]:,}" for one in (length, "batch", "lr", field)))
        )
        if plan.scale == "paper" or not training:
            rows.append((PAPER, *_printed(printed[names[name]], last)))
    if training and plan.scale == "small":  # other data than the paper's
        own = {paper: name for name, paper in names.items()}
        rows += [(f"paper, {own[name]}", *_printed(values, last)) for name, values in printed.items()]
    command = "usmoe train NAME" if training else "usmoe finetune CHECKPOINT NAME"
    about = f"`{command}` runs one." if plan.scale == "paper" else "What the tables at small scale have in their place."
    return [
        View(
            title=f"{experiment.name}, {plan.scale} scale: {experiment.title}",
            head=("data", "input length", "batch size", "learning rate", last.lower()),
            labels=1,
            rows=tuple(rows),
            bold=(),
            says=(
                f"{about} Nothing is trained here; the JSON holds every configuration whole. The optimizer is Adam.",
            ),
            notes=paper_figures(experiment.name).notes,
        )
    ]


def _printed(values: Mapping[str, float], last: str) -> list[str]:
    """A row of the paper's."""
    return [
        f"{values[one]:g}" if one == "Lr" else f"{values[one]:,.0f}"
        for one in ("Input length", "Batch size", "Lr", last)
    ]


def refuse_picture(experiment: Experiment) -> None:
    raise ValueError(f"{experiment.name} is a table of settings, without a picture. Leave --plot out.")


def plot(result: Result, path: Path) -> None:
    refuse_picture(EXPERIMENTS[result.plan.experiment])
