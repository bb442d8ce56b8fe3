"""Running a plan, and its result as one JSON file: the plan whole, and a score for each column and task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usmoe.reproduce.embeddings.plan import SHIPPED, Plan

if TYPE_CHECKING:
    from usmoe.evaluate.run import Score

SCHEMA = 1
CACHE = "evaluations"
"""Folder in the folder of results where finished tasks are kept, for a run that goes on and for other tables."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came out of a plan."""

    plan: Plan
    scores: tuple[tuple[Score, ...], ...]
    """Of each column of the plan, in its order: one of each task, in theirs."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON. A score's setting is that of its column, and stands in the plan alone."""
        rows = [
            {"column": at, "model": column.model, "prompt": column.prompt, "label": column.label}
            | {name: value for name, value in score.to_dict().items() if name != "setting"}
            for at, (column, scores) in enumerate(zip(self.plan.columns, self.scores, strict=True))
            for score in scores
        ]
        return {"schema": SCHEMA, "plan": self.plan.to_dict(), "scores": rows}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Result:
        """What `to_dict` made. Raises ValueError for another schema."""
        from usmoe.evaluate.run import Score

        if data.get("schema") != SCHEMA:
            raise ValueError(f"It has schema {data.get('schema')!r}, and this usmoe reads {SCHEMA}. Run it again.")
        plan = Plan.from_dict(data["plan"])
        scores: list[list[Score]] = [[] for _ in plan.columns]
        for row in data["scores"]:
            fields = {name: value for name, value in row.items() if name not in ("column", "model", "prompt", "label")}
            scores[row["column"]].append(Score(**(fields | {"setting": plan.columns[row["column"]].setting})))
        return Result(plan=plan, scores=tuple(map(tuple, scores)))


def run(
    plan: Plan,
    results: Path,
    *,
    offline: bool = False,
    progress: bool = True,
    anew: bool = False,
    done: Callable[[Score], None] = lambda score: None,
    evaluate: Callable[..., Sequence[Score]] | None = None,
) -> Result:
    """Score every column in every task. What an earlier run, or another table, has finished in `results` is read.

    progress  a bar for the texts of each encoding
    anew      compute also what is kept
    done      called with each score as it comes; there will be plan.parts of them
    evaluate  what scores one model; None: usmoe.evaluate.run.evaluate
    """
    if evaluate is None:
        from usmoe.evaluate.run import evaluate
    assert evaluate is not None
    found: dict[tuple[str, Any], list[Score]] = {}
    for model in plan.models:
        settings = list(dict.fromkeys(column.setting for column in plan.columns if column.model == model))
        for score in evaluate(
            None if model == SHIPPED else model,
            plan.tasks,
            settings,
            data=None if plan.data is None else Path(plan.data),
            results=results / CACHE,
            batch_size=plan.batch_size,
            seed=plan.seed,
            device=plan.device,
            dtype=plan.dtype,
            offline=offline,
            quantize=plan.quantize,
            progress=progress,
            anew=anew,
            done=done,
        ):
            found.setdefault((model, score.setting), []).append(score)
    order = {task: at for at, task in enumerate(plan.tasks)}
    scores = [sorted(found[column.model, column.setting], key=lambda one: order[one.task]) for column in plan.columns]
    return Result(plan=plan, scores=tuple(map(tuple, scores)))
