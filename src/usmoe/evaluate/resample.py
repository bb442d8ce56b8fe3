"""Scores of many bootstrap resamples at once. A resample is how often it drew each unit: counts (R, N), R resamples of
N units; each function equals the score of the units repeated so."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray as Array

CELLS = 4_000_000
"""Counts that are held at once."""


def draws(units: int, resamples: int, rng: np.random.Generator) -> Iterator[Int[Array, "R N"]]:
    """Counts of `resamples` draws with replacement, as many as there are units, in blocks of bounded size."""
    block = max(1, CELLS // units)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = rng.integers(units, size=(size, units)) + np.arange(size)[:, None] * units
        yield np.bincount(drawn.reshape(-1), minlength=size * units).reshape(size, units)


def pearson(counts: Int[Array, "R N"], x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "R"]:
    """Pearson correlation; NaN where a side is constant."""
    total = counts.sum(axis=1)
    x, y = (values - ((counts * values).sum(axis=1) / total)[:, None] for values in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (counts * x * y).sum(axis=1) / np.sqrt((counts * x * x).sum(axis=1) * (counts * y * y).sum(axis=1))


def spearman(counts: Int[Array, "R N"], x: Float[Array, "N"], y: Float[Array, "N"]) -> Float[Array, "R"]:
    """Spearman correlation, ties at their mean rank."""
    return pearson(counts, _ranks(counts, x), _ranks(counts, y))


def _ranks(counts: Int[Array, "R N"], values: Float[Array, "N"]) -> Float[Array, "R N"]:
    """The mean rank, from 1, of each unit among all that were drawn."""
    _, place = np.unique(values, return_inverse=True)
    order, starts = _groups(place)
    drawn = np.add.reduceat(counts[:, order], starts, axis=1)  # (R, distinct values)
    return (drawn.cumsum(axis=1) - (drawn - 1) / 2)[:, place]


def _groups(place: Int[Array, "N"]) -> tuple[Int[Array, "N"], Int[Array, "U"]]:
    """An order that puts equal values side by side, and where each distinct one begins."""
    order = np.argsort(place)
    return order, np.flatnonzero(np.diff(place[order], prepend=-1))


class Thresholds:
    """What is called positive at each distinct score, from the highest down: true ones and all, for each resample."""

    def __init__(self, counts: Int[Array, "R N"], scores: Float[Array, "N"], labels: Int[Array, "N"]):
        _, place = np.unique(-scores, return_inverse=True)
        order, starts = _groups(place)
        self.called = np.add.reduceat(counts[:, order], starts, axis=1).cumsum(axis=1)
        self.true = np.add.reduceat((counts * labels)[:, order], starts, axis=1).cumsum(axis=1)
        self.positives, self.total = self.true[:, -1:], self.called[:, -1:]

    def ap(self) -> Float[Array, "R"]:
        """Average precision, as scikit-learn has it; NaN without a positive."""
        gained = np.diff(self.true, axis=1, prepend=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return (gained * self.true / np.maximum(self.called, 1)).sum(axis=1) / self.positives[:, 0]

    def f1(self) -> Float[Array, "R"]:
        """The best F1 of a threshold between two scores, as mteb has it: calling all positive is none."""
        return self._best(2 * self.true / np.maximum(self.called + self.positives, 1))

    def accuracy(self) -> Float[Array, "R"]:
        """The best accuracy of a threshold between two scores."""
        return self._best((2 * self.true - self.called + self.total - self.positives) / self.total)

    def _best(self, values: Float[Array, "R U"]) -> Float[Array, "R"]:
        between = (self.called > 0) & (self.called < self.total)
        return np.where(between, values, 0.0).max(axis=1)


def confusion(
    counts: Int[Array, "R N"], labels: Int[Array, "N"], said: Int[Array, "N"], classes: int
) -> Int[Array, "R C C"]:
    """How often each true class (rows) was said to be each class (columns)."""
    cell, size = labels * classes + said, classes * classes
    tables = [np.bincount(cell, weights=one, minlength=size) for one in counts]
    return np.stack(tables).reshape(-1, classes, classes)


def f1(table: Float[Array, "R C C"], *, weighted: bool) -> Float[Array, "R"]:
    """F1, its mean over classes that occur or are said, or weighted by how often they occur."""
    hit, real, said = np.diagonal(table, axis1=1, axis2=2), table.sum(axis=2), table.sum(axis=1)
    each = 2 * hit / np.maximum(real + said, 1)
    weight = real if weighted else (real + said > 0)
    return (each * weight).sum(axis=1) / weight.sum(axis=1)


def hard_ap(table: Float[Array, "R 2 2"]) -> Float[Array, "R"]:
    """Average precision of answers that are 0 or 1: at the one threshold, then all; NaN without a positive."""
    hit, real, said, total = table[:, 1, 1], table[:, 1].sum(axis=1), table[:, :, 1].sum(axis=1), table.sum(axis=(1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = hit / real
        return recall * hit / np.maximum(said, 1) + (1 - recall) * real / total


def v_measure(table: Float[Array, "R L C"]) -> Float[Array, "R"]:
    """V-measure of a table of labels (rows) by clusters (columns): the harmonic mean of homogeneity and completeness,
    each 1 where its entropy is 0."""
    share = table / table.sum(axis=(1, 2), keepdims=True)
    labels, clusters, both = (
        _entropy(one) for one in (share.sum(axis=2), share.sum(axis=1), share.reshape(len(share), -1))
    )
    mutual = labels + clusters - both
    homogeneity, completeness = (np.divide(mutual, h, out=np.ones_like(h), where=h > 1e-12) for h in (labels, clusters))
    total = homogeneity + completeness
    return np.divide(2 * homogeneity * completeness, total, out=np.zeros_like(total), where=total > 0)


def _entropy(share: Float[Array, "R M"]) -> Float[Array, "R"]:
    return -(share * np.log(np.where(share > 0, share, 1))).sum(axis=1)
