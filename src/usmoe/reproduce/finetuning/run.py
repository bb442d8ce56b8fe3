"""Pre-training, fine-tuning and testing all classifiers of a plan, with what is there already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from usmoe.reproduce.finetuning.plan import FinetuneRun, Plan
from usmoe.reproduce.training.run import CORPORA, RUNS, trained
from usmoe.train.scored import Scored

SCHEMA = 1
FINETUNED = "finetuned"
"""Folder in the folder of results: a folder for each classifier."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One row of a result: a classifier on the test rows of its data set."""

    corpus: str
    row: str
    task: str
    seed: int
    scored: Scored
    right: str
    """Of each test row in their order: 1 where its class was said, else 0."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        fields = {name: getattr(self, name) for name in ("corpus", "row", "task", "seed", "right")}
        return fields | {"scored": self.scored.to_dict()}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Answered:
        """What `to_dict` made."""
        fields: dict[str, Any] = dict(data)
        fields["scored"] = Scored.from_dict(data["scored"])
        return Answered(**fields)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came out of a plan."""

    plan: Plan
    rows: tuple[Answered, ...]
    """Of each run of the plan, in its order."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"schema": SCHEMA, "plan": self.plan.to_dict(), "rows": [one.to_dict() for one in self.rows]}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Result:
        """What `to_dict` made."""
        return Result(plan=Plan.from_dict(data["plan"]), rows=tuple(map(Answered.from_dict, data["rows"])))


def run(
    plan: Plan,
    results: Path,
    *,
    offline: bool = False,
    done: Callable[[str], None] = lambda word: None,
    test: Callable[..., Answered] | None = None,
) -> Result:
    """Train every model that is not there yet, fine-tune and test it. What was stopped goes on.

    done  called with a word when a model is trained, and when a classifier is tested
    test  in place of `tested`, with its arguments
    """
    where: dict[str, Any] = {"data": None if plan.data is None else Path(plan.data), "offline": offline}
    where["device"] = plan.device
    texts: dict[Any, Any] = {}
    for one in plan.pretrained:
        trained(one, results / RUNS / one.name, results / CORPORA, texts=texts, **where)
        done(f"{one.name} trained")
    rows = []
    for one in plan.runs:
        folder, checkpoint = results / FINETUNED / one.name, results / RUNS / one.pretrained.name
        rows.append((test or tested)(one, folder, checkpoint, **where))
        done(f"{one.name} tested")
    return Result(plan=plan, rows=tuple(rows))


def tested(
    one: FinetuneRun, folder: Path, checkpoint: Path, *, data: Path | None, offline: bool, device: str
) -> Answered:
    """The figures of a classifier, which is fine-tuned where it is not there."""
    import numpy as np

    from usmoe.data.classification import classification
    from usmoe.train.finetune import finetune

    given: dict[str, Any] = {"checkpoint": checkpoint, "data": data, "offline": offline, "device": device}
    try:
        scored = finetune(one.config, folder, resume=True, **given)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"{one.name}: {stop} The same command of usmoe reproduce goes on.") from None
    labels = classification(one.config.data, data, offline=offline).test.labels
    said = np.load(folder / "predictions.npy")
    return Answered(
        corpus=one.pretrained.corpus,
        row=one.pretrained.row,
        task=one.task,
        seed=one.config.seed,
        scored=scored,
        right="".join("1" if right else "0" for right in (said == labels).tolist()),
    )
