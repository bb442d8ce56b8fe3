"""Beside the likelihoods of a training experiment: other ways to read its models, what their routers do, and curves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from usmoe.reproduce.training.compare import Rows, Value, cell, of, stated
from usmoe.reproduce.training.measure import CALIBRATION, Measured
from usmoe.reproduce.training.run import Result
from usmoe.reproduce.training.study import Text
from usmoe.reproduce.view import View
from usmoe.train.figures import Measured as Reading

TEXTS = {"clean": "", "corrupt": ", corrupted"}
"""In titles."""


def read_otherwise(result: Result, corpus: str, text: Text) -> View:
    """The same models served by causal routers, without memory, and one sequence at a time; teacher-forced."""
    plan = result.plan
    rows = of(result.rows, (row.name for row in plan.rows), corpus, text)
    columns = _readings(rows)
    lines = []
    for row in plan.rows:
        if row.name in rows:
            words = [_word(rows[row.name], one) for one in columns.values()]
            lines.append((row.label, *words))
    return View(
        title=f"{plan.experiment}, {plan.scale} scale, {corpus}{TEXTS[text]}: served by causal routers, read otherwise",
        head=("method", *columns),
        labels=1,
        rows=tuple(lines),
        bold=(),
        says=(_legend(columns),),
    )


def _readings(rows: Rows) -> dict[str, Callable[[Measured], Reading | None]]:
    """{column: a reading of a model}, of those that some model has."""
    every = [one for ones in rows.values() for one in ones]
    found: dict[str, Callable[[Measured], Reading | None]] = {
        how: lambda one, how=how: one.figures.served.get(how)
        for how in dict.fromkeys(how for one in every for how in one.figures.served)
    }
    found |= {
        "with k=2": lambda one: None if one.at_two is None else one.at_two.forced,
        "memory reset": lambda one: one.figures.reset,
        "batch of 1": lambda one: one.figures.alone,
    }
    return {name: reading for name, reading in found.items() if any(reading(one) is not None for one in every)}


def _word(ones: Sequence[Measured], reading: Callable[[Measured], Reading | None]) -> str:
    """The likelihood and, where it is not as many as in the model's own reading, @ experts a token."""

    def nats(one: Measured) -> float | None:
        found = reading(one)
        return None if found is None else found.nats

    def experts(one: Measured) -> float | None:
        found = reading(one)
        return None if found is None else found.experts

    spent, own = cell(ones, experts), cell(ones, lambda one: one.figures.forced.experts)
    if spent is None or own is None or f"{spent.value:.2f}" == f"{own.value:.2f}":
        return stated(ones, nats)
    return f"{stated(ones, nats)} @{spent.value:.2f}"


_MEANINGS = {
    "threshold": "threshold: every pair whose score reaches what training tracked of the cut",
    "threshold k=1.5 calibrated": f"k=1.5 calibrated: thresholds that spend 1.5 on {CALIBRATION:,} tokens of "
    "validation text",
    "prefix": "prefix: each token competes with those before it in its segment",
    "with k=2": "with k=2: of a method that grows its k, two experts alone",
    "memory reset": "memory reset: each segment by itself",
    "batch of 1": "batch of 1: each sequence by itself",
}


def _legend(columns: Iterable[str]) -> str:
    """What the columns are."""
    meanings = "; ".join(_MEANINGS.get(name, name) for name in columns)
    return f"In the units of the table above. {meanings[:1].upper()}{meanings[1:]}. Behind @: experts a token."


def routing(result: Result, corpus: str) -> View:
    plan, rows = result.plan, of(result.rows, (row.name for row in result.plan.rows), corpus, "clean")
    columns: dict[str, tuple[Value, str]] = {
        "experts a token": (lambda one: one.figures.forced.experts, ".2f"),
        "dropped, %": (lambda one: _percent(one.figures.forced.dropped), ".1f"),
        "load CV": (lambda one: one.figures.forced.load_cv, ".2f"),
        "MFLOPs a token": (lambda one: one.figures.forced.flops / 1e6, ".2f"),
        "of those at k=2, %": (lambda one: _percent(one.figures.forced.relative), ".1f"),
        "steps": (lambda one: one.steps, ",.0f"),
        "best at": (lambda one: one.figures.step, ",.0f"),
        "minutes": (lambda one: one.training_seconds / 60, ".1f"),
    }
    lines = []
    for row in plan.rows:
        if row.name in rows:
            found = [(cell(rows[row.name], value), form) for value, form in columns.values()]
            words = ["-" if one is None else f"{one.value:{form}}" for one, form in found]
            lines.append((row.label, *words))
    return View(
        title=f"{plan.experiment}, {plan.scale} scale, {corpus}: what the routers do, and what they cost",
        head=("method", *columns),
        labels=1,
        rows=tuple(lines),
        bold=(),
        says=(
            "On the clean test split, means over seeds. Dropped: tokens without an expert. FLOPs are of a forward, by "
            "counted pairs, without the output layer. Minutes: wall time of training on what it was trained on, beside "
            "other work.",
        ),
    )


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def in_training(result: Result, corpus: str) -> View:
    """The curves at a tenth, at half and at the end of the steps, means over seeds."""
    plan = result.plan
    columns: dict[str, dict[str, str]] = {}
    for name, lines in curves(result, corpus).items():
        for share in (0.1, 0.5, 1.0):
            for row, (steps, values) in lines.items():
                at = min(range(len(steps)), key=lambda i: abs(steps[i] - share * steps[-1]))
                word = f"{100 * values[at]:.1f} %" if name == "dropped" else f"{values[at]:.3f}"
                columns.setdefault(f"{name}, {100 * share:g} % of steps", {})[row] = word
    return View(
        title=f"{plan.experiment}, {plan.scale} scale, {corpus}: in training",
        head=("method", *columns),
        labels=1,
        rows=tuple((row.label, *(one.get(row.name, "-") for one in columns.values())) for row in plan.rows),
        bold=(),
        says=("Of the training batches, means over some steps and over seeds; the JSON has the curves whole.",),
    )


def curves(result: Result, corpus: str) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """{bits or dropped: {row: (steps, means over seeds)}} in training."""
    found: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for row in result.plan.rows:
        names = [one.name for one in result.plan.runs if (one.corpus, one.row) == (corpus, row.name)]
        several = [result.curves[name] for name in names if name in result.curves]
        for what in dict.fromkeys(what for one in several for what in one if what != "step"):
            values = [sum(at) / len(at) for at in zip(*(one[what] for one in several), strict=True)]
            found.setdefault(what, {})[row.name] = (list(several[0]["step"]), values)
    return found
