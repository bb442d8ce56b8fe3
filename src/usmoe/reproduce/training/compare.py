"""The figures of a row over its seeds: means, deviations, and samples that can be compared."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from usmoe.reproduce.paired import Sample
from usmoe.reproduce.training.measure import Measured
from usmoe.reproduce.training.study import Text

Value = Callable[[Measured], float | None]
"""A figure of a model; None where it has none."""

Rows = Mapping[str, Sequence[Measured]]
"""Models of a corpus and a text by row, one a seed."""


def of(measured: Iterable[Measured], names: Iterable[str], corpus: str, text: Text) -> Rows:
    """The models of a corpus and a text by row, in the order of the names; rows without any are left out."""
    found: dict[str, list[Measured]] = {name: [] for name in names}
    for one in measured:
        if (one.corpus, one.text) == (corpus, text):
            found[one.row].append(one)
    return {name: ones for name, ones in found.items() if ones}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A figure of a row: the mean over its seeds, and their deviation (None with one seed)."""

    value: float
    deviation: float | None


def cell(ones: Sequence[Measured], value: Value) -> Cell | None:
    """The mean over seeds of a figure; None where a model has none."""
    known = [found for one in ones if (found := value(one)) is not None]
    if not known or len(known) < len(ones):
        return None
    return Cell(value=statistics.fmean(known), deviation=statistics.stdev(known) if len(known) > 1 else None)


def stated(ones: Sequence[Measured], nats: Value, half: str = "") -> str:
    """1.234 (0.005): bits or perplexity, mean and deviation over seeds; "-" where a model has no such figure.

    half  what stands between the two
    """

    def in_units(one: Measured) -> float | None:
        found = nats(one)
        return None if found is None else one.figures.stated(found)

    found = cell(ones, in_units)
    if found is None:
        return "-"
    digits = 3 if ones[0].figures.bits else 2
    deviation = "" if found.deviation is None else f" ({found.deviation:.{digits}f})"
    return f"{found.value:.{digits}f}{half}{deviation}"


def teacher_forced(ones: Sequence[Measured]) -> Sample:
    """Nats a token, by blocks of the text."""
    sums = zip(*(one.figures.forced.sums for one in ones), strict=True)
    return Sample(values=tuple(one.figures.forced.nats for one in ones), sums=tuple(map(statistics.fmean, sums)))


def honest(ones: Sequence[Measured]) -> Sample:
    """Nats a token. Where in the text they come from is taken from the teacher-forced figure, from which they differ by
    little, and known everywhere."""
    return Sample(
        values=tuple(one.figures.honest.nats for one in ones),
        sums=teacher_forced(ones).sums,
        halves=tuple(one.figures.honest.interval for one in ones),
    )
