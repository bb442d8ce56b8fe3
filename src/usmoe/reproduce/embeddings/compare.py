"""The paper's figure and ours, line under line: means by type of task, bands, and where a ranking can be read."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from usmoe.reproduce.embeddings.run import Result
from usmoe.reproduce.embeddings.study import CHECKPOINTS, TASKS, Prompt, Study
from usmoe.reproduce.figures import paper_figures

AVERAGE = "Average"
SPREAD = "spread over tasks"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One figure, in per cent."""

    value: float
    deviation: float | None = None
    """Over runs."""
    low: float | None = None
    """Lower end of the 95 % band."""
    high: float | None = None

    @property
    def half(self) -> float | None:
        """The longer side of the band."""
        return None if self.low is None or self.high is None else max(self.high - self.value, self.value - self.low)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line: the paper's, or ours."""

    row: str
    """A task, a type of task, Average, or the spread over tasks."""
    prompt: Prompt
    whose: str
    """The model, in our words or the paper's."""
    printed: bool
    """Whether the paper prints it, or it is a mean of what the paper prints."""
    cells: Mapping[str, Cell]
    """By the label of the column; a column without a figure is not in it."""

    @property
    def ranked(self) -> bool:
        """Whether the line is one of ours, of several columns, from which one would read a ranking."""
        return not self.printed and self.row != SPREAD and len(self.cells) > 1

    @property
    def best(self) -> str:
        """The column with the highest figure."""
        return max(self.cells, key=lambda label: self.cells[label].value)

    @property
    def rivals(self) -> tuple[str, ...]:
        """Columns that cannot be told from the best: their band reaches into its own, or one of the two has none."""
        best = self.cells[self.best]
        return tuple(
            label
            for label, cell in self.cells.items()
            if label != self.best and (best.low is None or cell.high is None or cell.high >= best.low)
        )


def lines(result: Result) -> list[Line]:
    """Ours and, under each, the paper's: of the same model, or of all the paper's models where ours is none of them."""
    found = []
    for model in result.plan.models:
        for row, tasks in rows(result):
            for prompt in result.plan.study.prompts:
                cells = {label: _ours(row, scores) for label, scores in _scores(result, model, prompt, tasks)}
                found.append(Line(row=row, prompt=prompt, whose=model, printed=False, cells=cells))
                found += _printed(result, model, row, tasks, prompt)
    return found


def rows(result: Result) -> list[tuple[str, tuple[str, ...]]]:
    """(name, its tasks) of each row of the table."""
    tasks = result.plan.tasks
    if result.plan.study.rows == "task":
        return [(task, (task,)) for task in tasks]
    kinds = dict.fromkeys(TASKS[task][0] for task in tasks)
    found = [(kind, tuple(task for task in tasks if TASKS[task][0] == kind)) for kind in kinds]
    found += [(AVERAGE, tasks)] if len(kinds) > 1 else []
    return found + ([(SPREAD, tasks)] if result.plan.study.spread and len(tasks) > 1 else [])


def _scores(result: Result, model: str, prompt: Prompt, tasks: Sequence[str]) -> Iterator[tuple[str, dict[str, Cell]]]:
    """(label, {task: figure}) of each column of a model."""
    for column, scores in zip(result.plan.columns, result.scores, strict=True):
        if (column.model, column.prompt) == (model, prompt):
            yield (
                column.label,
                {
                    one.task: Cell(
                        value=100 * one.score,
                        deviation=_percent(one.deviation),
                        low=_percent(one.low),
                        high=_percent(one.high),
                    )
                    for one in scores
                    if one.task in tasks
                },
            )


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _ours(row: str, cells: Mapping[str, Cell]) -> Cell:
    if row == SPREAD:
        return Cell(value=statistics.stdev(cell.value for cell in cells.values()))
    if row == AVERAGE:
        return mean([mean(list(group.values())) for group in _by_kind(cells).values()])
    return mean(list(cells.values()))


def mean(cells: Sequence[Cell]) -> Cell:
    """The mean of independent figures: deviations, and each side of the bands, add up in squares."""

    def spread(parts: Sequence[float | None]) -> float | None:
        known = [part for part in parts if part is not None]
        return math.hypot(*known) / len(cells) if len(known) == len(cells) else None

    value = statistics.fmean(cell.value for cell in cells)
    down = spread([None if cell.low is None else cell.value - cell.low for cell in cells])
    up = spread([None if cell.high is None else cell.high - cell.value for cell in cells])
    return Cell(
        value=value,
        deviation=spread([cell.deviation for cell in cells]),
        low=None if down is None else value - down,
        high=None if up is None else value + up,
    )


def _by_kind(cells: Mapping[str, Cell]) -> dict[str, dict[str, Cell]]:
    found: dict[str, dict[str, Cell]] = {}
    for task, cell in cells.items():
        found.setdefault(TASKS[task][0], {})[task] = cell
    return found


def _printed(result: Result, model: str, row: str, tasks: Sequence[str], prompt: Prompt) -> list[Line]:
    """The paper's lines that belong under one of ours."""
    study = result.plan.study
    same = [one for one in study.models if one.hub == model]
    found = []
    for one in same or study.models:
        values = paper_values(study, result.plan.experiment, one.paper, row, tasks, prompt)
        pairs = {
            method.label: values[method.paper] for method in study.methods if method.paper and method.paper in values
        }
        if pairs:
            cells = {label: Cell(value=value) for label, value in pairs.items()}
            found.append(Line(row=row, prompt=prompt, whose=one.paper, printed=True, cells=cells))
    return found


def paper_values(
    study: Study, experiment: str, model: str, row: str, tasks: Sequence[str], prompt: Prompt
) -> Mapping[str, float]:
    """{the paper's column: figure} for a row: as printed where all of the row's tasks are there, else, so that like
    stands beside like, the mean of the same tasks in Tables 7 to 9. Empty where the paper prints nothing."""
    if study.rows == "task":
        return details(experiment if experiment in ("table10", "table11") else "", model, prompt).get(row, {})
    whole = [task for task in study.tasks if row in (AVERAGE, SPREAD) or TASKS[task][0] == row]
    if study.figures and set(tasks) == set(whole):
        for one in paper_figures(study.figures).rows:
            if (one.model, one.task, one.setting) == (model, row, prompt):
                return one.values
        if row == AVERAGE:
            return {}
    known = details("", model, prompt)
    there = {task: known[task] for task in tasks if task in known}
    if not there:
        return {}
    names = next(iter(there.values()))
    cells = {name: {task: Cell(value=values[name]) for task, values in there.items()} for name in names}
    return {name: _ours(row, by_task).value for name, by_task in cells.items()}


@functools.cache
def details(table: str, model: str, prompt: Prompt) -> Mapping[str, Mapping[str, float]]:
    """{task: {the paper's column: figure}} of a table by data set; without a name, of that of Tables 7 to 9."""
    by_name = {paper: task for task, paper in TASKS.items()}
    tables = (table,) if table else ("table7", "table8", "table9")
    return {
        by_name[str(row.task), str(row.dataset)]: row.values
        for name in tables
        for row in paper_figures(name).rows
        if row.model == model and row.setting == prompt
    }


def paper_name(model: str) -> str:
    """A model in the words of a table: novelist for the shipped one."""
    known = CHECKPOINTS.get(model)
    return "novelist" if model == "shipped" else known.paper if known else model.rstrip("/").rpartition("/")[2]
