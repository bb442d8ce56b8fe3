"""Which rows of a table can be told apart: by paired bands over the same test material, and by seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from usmoe.report.estimate import band

_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228, 12: 2.179}
_T |= {15: 2.131, 20: 2.086, 30: 2.042, 60: 2.0, 240: 1.97}
"""97.5 % quantiles of Student's t by degrees of freedom."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A figure of a row, lower is better: of each seed, and where in the test material it comes from."""

    values: tuple[float, ...]
    """One a seed; means over the units of the test (tokens, rows)."""
    sums: tuple[float, ...]
    """Of each block of the test, means over seeds."""
    halves: tuple[float, ...] = ()
    """Of values that are themselves estimates: half-widths of their 95 % intervals, one a seed."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """By how much one row is above another, and the half-width of its 95 % band."""

    value: float
    half: float

    @property
    def clear(self) -> bool:
        """Whether the band lies above 0."""
        return self.value - self.half > 0


def difference(row: Sample, best: Sample, counts: Sequence[int], deviation: float, freedom: int) -> Difference:
    """By how much `row` is above `best`.

    counts     units of each block, the same for both
    deviation  of one model over seeds, with its degrees of `freedom` (`over_seeds`); none with freedom 0

    The band has three parts, added in squares: the test material (blocks are drawn with replacement, the same for both
    rows), the seeds (Student's t times the deviation of a difference of means over seeds), and the intervals of values
    that are estimates. It is infinite where there is one block alone.
    """
    drawn = band([one - other for one, other in zip(row.sums, best.sums, strict=True)], counts)
    parts = [math.inf if drawn is None else (drawn[1] - drawn[0]) / 2]
    if freedom:
        parts.append(student(freedom) * deviation * math.sqrt(1 / len(row.values) + 1 / len(best.values)))
    parts += [math.hypot(*one.halves) / len(one.values) for one in (row, best)]
    return Difference(value=row.mean - best.mean, half=math.hypot(*parts))


def over_seeds(rows: Mapping[str, Sample]) -> tuple[float, int]:
    """The deviation of one model over seeds, pooled over all rows, and its degrees of freedom; (0, 0) with one seed."""
    squares = sum(statistics.variance(one.values) * (len(one.values) - 1) for one in rows.values() if one.values[1:])
    freedom = sum(len(one.values) - 1 for one in rows.values())
    return (math.sqrt(squares / freedom), freedom) if freedom else (0.0, 0)


def ranked(rows: Mapping[str, Sample], counts: Sequence[int]) -> tuple[str, tuple[str, ...]]:
    """The row with the lowest figure, and those that cannot be told from it."""
    best = min(rows, key=lambda name: rows[name].mean)
    deviation, freedom = over_seeds(rows)
    gaps = {name: difference(one, rows[best], counts, deviation, freedom) for name, one in rows.items() if name != best}
    return best, tuple(name for name, gap in gaps.items() if not gap.clear)


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; of degrees between those that are known, that of the fewer."""
    return _T[max(one for one in _T if one <= freedom)]
