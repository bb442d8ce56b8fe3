"""Means over seeds, and which rows can be told apart: by paired bands over the same tokens and by seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from usmoe.report.estimate import band
from usmoe.reproduce.training.measure import Measured

Value = Callable[[Measured], float | None]
"""A figure in nats a token; None where a model has none."""

_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228, 12: 2.179}
_T |= {15: 2.131, 20: 2.086, 30: 2.042, 60: 2.0}
"""97.5 % quantiles of Student's t by degrees of freedom."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A figure of a row: the mean over its seeds, and their deviation (None with one seed)."""

    value: float
    deviation: float | None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """By how much one row is above another, nats a token, and the half-width of its 95 % band."""

    value: float
    half: float

    @property
    def clear(self) -> bool:
        """Whether the band lies above 0."""
        return self.value - self.half > 0


def cell(ones: Sequence[Measured], value: Callable[[Measured], float | None]) -> Cell | None:
    """The mean over seeds of a figure, in whatever unit; None where a model has none."""
    values = [value(one) for one in ones]
    known = [one for one in values if one is not None]
    if not known or len(known) < len(values):
        return None
    return Cell(value=statistics.fmean(known), deviation=statistics.stdev(known) if len(known) > 1 else None)


def difference(
    row: Sequence[Measured], best: Sequence[Measured], value: Value, seeds: float, freedom: int
) -> Difference | None:
    """By how much `row` is above `best` in a figure, in nats; None where one of them lacks it.

    seeds    the deviation of one model of a row over seeds (`over_seeds`), with its degrees of `freedom`

    The band has three parts, added in squares: the text (blocks of tokens are drawn with replacement, the same for both
    rows: of the teacher-forced likelihood, since other figures differ from it by little), the seeds (Student's t times
    the deviation of a mean over each row's seeds), and the interval of the honest estimate where that is compared.
    """
    one, other = cell(row, value), cell(best, value)
    if one is None or other is None:
        return None
    sums = [mine - theirs for mine, theirs in zip(_sums(row), _sums(best), strict=True)]
    drawn = band(sums, row[0].figures.forced.counts)
    text = math.inf if drawn is None else (drawn[1] - drawn[0]) / 2
    spread = student(freedom) * seeds * math.sqrt(1 / len(row) + 1 / len(best)) if freedom else 0.0
    parts = [text, spread]
    if value is honest:
        parts += [math.hypot(*(one.figures.honest.interval for one in ones)) / len(ones) for ones in (row, best)]
    return Difference(value=one.value - other.value, half=math.hypot(*parts))


def _sums(ones: Sequence[Measured]) -> list[float]:
    """Nats of each block, means over seeds."""
    return [statistics.fmean(block) for block in zip(*(one.figures.forced.sums for one in ones), strict=True)]


def teacher_forced(one: Measured) -> float:
    return one.figures.forced.nats


def honest(one: Measured) -> float:
    return one.figures.honest.nats


def over_seeds(rows: Mapping[str, Sequence[Measured]], value: Value) -> tuple[float, int]:
    """The deviation of a model over seeds, pooled over all rows, and its degrees of freedom; (0, 0) with one seed."""
    squares, freedom = 0.0, 0
    for ones in rows.values():
        values = [found for one in ones if (found := value(one)) is not None]
        if len(values) > 1:
            squares += statistics.variance(values) * (len(values) - 1)
            freedom += len(values) - 1
    return (math.sqrt(squares / freedom), freedom) if freedom else (0.0, 0)


def ranked(rows: Mapping[str, Sequence[Measured]], value: Value) -> tuple[str, tuple[str, ...]]:
    """The row with the lowest figure, and those that cannot be told from it."""
    means = {name: found.value for name, ones in rows.items() if (found := cell(ones, value)) is not None}
    best = min(means, key=lambda name: means[name])
    deviation, freedom = over_seeds(rows, value)
    rivals = []
    for name in means:
        if name != best:
            gap = difference(rows[name], rows[best], value, deviation, freedom)
            assert gap is not None
            rivals += [] if gap.clear else [name]
    return best, tuple(rivals)


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; of degrees between those that are known, that of the fewer."""
    return _T[max(one for one in _T if one <= freedom)] if freedom < 240 else 1.97
