"""Which rows of a table can be told apart: by paired bands over the same test material, and by seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from usmoe.report.estimate import band

TAIL = 0.025
"""Of a 95 % band, on each side."""
TOGETHER = "95 % for all rows together (Bonferroni)"
"""What the bands of `ranked` are, in words."""


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


def difference(
    row: Sample, best: Sample, counts: Sequence[int], deviation: float, freedom: int, comparisons: int = 1
) -> Difference:
    """By how much `row` is above `best`.

    counts       units of each block, the same for both
    deviation    of one model over seeds, with its degrees of `freedom` (`over_seeds`); none with freedom 0
    comparisons  how many are made, all of which are right together in 95 % of cases (Bonferroni)

    The band has three parts, added in squares: the test material (blocks are drawn with replacement, the same for both
    rows), the seeds (Student's t times the deviation of a difference of means over seeds), and the intervals of values
    that are estimates: those of a row's seeds share their sample, so that their mean is no narrower than one of them.
    It is infinite where there is one block alone.
    """
    tail = TAIL / comparisons
    drawn = band([one - other for one, other in zip(row.sums, best.sums, strict=True)], counts, tail=tail)
    parts = [math.inf if drawn is None else (drawn[1] - drawn[0]) / 2]
    if freedom:
        parts.append(student(freedom, tail) * deviation * math.sqrt(1 / len(row.values) + 1 / len(best.values)))
    wider = normal(tail) / normal(TAIL)
    parts += [wider * statistics.fmean(one.halves) for one in (row, best) if one.halves]
    return Difference(value=row.mean - best.mean, half=math.hypot(*parts))


def over_seeds(rows: Mapping[str, Sample]) -> tuple[float, int]:
    """The deviation of one model over seeds, pooled over all rows, and its degrees of freedom; (0, 0) with one seed."""
    squares = sum(statistics.variance(one.values) * (len(one.values) - 1) for one in rows.values() if one.values[1:])
    freedom = sum(len(one.values) - 1 for one in rows.values())
    return (math.sqrt(squares / freedom), freedom) if freedom else (0.0, 0)


def ranked(rows: Mapping[str, Sample], counts: Sequence[int]) -> tuple[str, tuple[str, ...]]:
    """The row with the lowest figure, and those that cannot be told from it.

    All comparisons with the lowest are right together in 95 % of cases: each by itself would, of ten rows that are in
    truth equal, often tell one apart.
    """
    best = min(rows, key=lambda name: rows[name].mean)
    deviation, freedom = over_seeds(rows)
    others = {name: one for name, one in rows.items() if name != best}
    gaps = {name: difference(one, rows[best], counts, deviation, freedom, len(others)) for name, one in others.items()}
    return best, tuple(name for name, gap in gaps.items() if not gap.clear)


def normal(tail: float = TAIL) -> float:
    """What a standard normal exceeds with that probability."""
    return statistics.NormalDist().inv_cdf(1 - tail)


def student(freedom: int, tail: float = TAIL) -> float:
    """What Student's t of that many degrees of freedom exceeds with that probability, above 0 and below 1/2.

    Found by halving an interval of angles, t = sqrt(freedom) * tan(angle), in which the distribution is a finite sum
    (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _between(angle, freedom) < 1 - 2 * tail else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def _between(angle: float, freedom: int) -> float:
    """The probability that t lies between -sqrt(freedom) * tan(angle) and its opposite."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for at in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * at / (at + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
