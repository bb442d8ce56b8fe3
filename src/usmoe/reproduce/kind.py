"""A kind of experiment: what is run, what comes out and how it is shown, behind the same few functions for all.

    embeddings/   sentence embeddings of pretrained models
    training/     language models from scratch
    finetuning/   classification from the checkpoints of these
    settings.py   settings that the paper lists; nothing is run

A new kind is a module with these functions, and a line in `kind_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from usmoe.reproduce.experiment import EXPERIMENTS, Experiment, Scale
from usmoe.reproduce.view import View

NOT_ASKED = "not asked for"
"""Why a text or a data set is left out: because options name others."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asks of an experiment; None or () where it says nothing."""

    scale: Scale = "small"
    data: Path | None = None
    """A folder of local data in place of the hub."""
    seed: int = 0
    device: str = "cpu"
    dtype: str | None = None
    model: str | None = None
    """Of embeddings: one model in place of the scale's own."""
    tasks: tuple[str, ...] = ()
    """Of embeddings and fine-tuning: some of the data sets."""
    batch_size: int | None = None
    """Of embeddings: texts."""
    rows: tuple[str, ...] = ()
    """Of training and fine-tuning: some of the rows, or other methods by their names."""
    corpora: tuple[str, ...] = ()
    """Of training and fine-tuning: some of the texts that are trained on."""
    routers: tuple[str, ...] = ()
    """Of training and fine-tuning: rows beside the experiment's own, routers as typed."""
    seeds: int | None = None
    """Of training and fine-tuning: how many, counted from `seed`."""
    steps: int | None = None
    """Of training: optimizer steps in place of the scale's."""

    def refuse(self, experiment: Experiment, *names: str) -> None:
        """Raise ValueError where a field that means nothing to an experiment is given."""
        for name in names:
            if getattr(self, name) not in (None, ()):
                raise ValueError(
                    f"{_FLAGS[name]} means nothing to {experiment.name}: {experiment.title}. Leave it out."
                )


_FLAGS = {
    "data": "--data",
    "dtype": "--dtype",
    "model": "--model",
    "tasks": "--tasks",
    "batch_size": "--batch-size",
    "rows": "--row",
    "corpora": "--corpus",
    "routers": "--router",
    "seeds": "--seeds",
    "steps": "--steps",
}


class Plan(Protocol):
    """What one run of an experiment does: a frozen dataclass, saved whole beside its result."""

    @property
    def experiment(self) -> str:
        """As typed: table5."""
        ...

    @property
    def scale(self) -> Scale: ...

    @property
    def parts(self) -> int:
        """How many times `done` will be called in a run."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """As JSON, with every setting."""
        ...

    def basis(self) -> dict[str, Any]:
        """What its result rests on, as JSON: plans of one basis give one result. Without what is no setting (device,
        folder of data) and without words."""
        ...

    def options(self) -> tuple[str, ...]:
        """Words of the command line by which it differs from the experiment as it is: --seeds, 1. Empty where it does
        not."""
        ...


class Result(Protocol):
    """What came out of a plan."""

    @property
    def plan(self) -> Plan: ...

    def to_dict(self) -> dict[str, Any]:
        """As JSON, with the keys "schema" and "plan"."""
        ...


class Kind(Protocol):
    """The functions of a kind's module."""

    @property
    def UNIT(self) -> str:  # noqa: N802 - a constant of a module
        """What a part of a run is called: score, model."""
        ...

    @property
    def TRAINS(self) -> bool:  # noqa: N802 - a constant of a module
        """Whether a run trains models."""
        ...

    def plan(self, experiment: Experiment, asked: Asked) -> Any:
        """Raises ValueError for what cannot be run, and for what is asked and means nothing here."""
        ...

    def announce(self, plan: Any, offline: bool, anew: bool) -> str:
        """A sentence on what a run trains or fetches, and on what `anew` leaves as it is; empty where there is nothing
        to say."""
        ...

    def run(self, plan: Any, results: Path, *, offline: bool, anew: bool, done: Callable[[str], None]) -> Any:
        """The result. What an earlier run finished in `results` is read, unless `anew`; `done` gets a word a part."""
        ...

    def read(self, data: Mapping[str, Any]) -> Any:
        """The result that `to_dict` made. Raises ValueError for another schema."""
        ...

    def views(self, result: Any, wide: bool) -> list[View]:
        """Tables of words; `wide` for a page, else for a terminal."""
        ...

    def refuse_picture(self, experiment: Experiment) -> None:
        """Raise ValueError for an experiment that there is nothing to draw of."""
        ...

    def plot(self, result: Any, path: Path) -> None:
        """Write a picture: .png, .svg or .pdf. Raises ValueError as `refuse_picture` does."""
        ...


def kind_of(experiment: Experiment) -> Kind:
    """The kind of an experiment. Raises ValueError for one that is not built."""
    if experiment.kind == "embeddings":
        from usmoe.reproduce.embeddings import kind
    elif experiment.kind == "training":
        from usmoe.reproduce.training import kind
    elif experiment.kind == "finetuning":
        from usmoe.reproduce.finetuning import kind
    elif experiment.kind == "settings":
        from usmoe.reproduce import settings as kind
    else:
        raise ValueError(f"{experiment.name} is not built yet: it comes with {experiment.waits_for}.")
    return kind


def of_result(result: Result) -> Kind:
    """The kind of the experiment that a result is of."""
    return kind_of(EXPERIMENTS[result.plan.experiment])


def words(**options: Any) -> tuple[str, ...]:
    """Options as they are typed: a name without dashes, and a value, several, or None where it is not given."""
    found: list[str] = []
    for name, value in options.items():
        for one in value if isinstance(value, tuple) else () if value is None else (value,):
            found += [f"--{name.replace('_', '-')}", str(one)]
    return tuple(found)
