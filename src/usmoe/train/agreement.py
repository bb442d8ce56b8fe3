"""How well classes that were said agree with the true ones: accuracy and macro F1, and how far they would move with
other rows of the kind."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray as Array

RESAMPLES = 2000
_CELLS = 4_000_000
"""Counts that are held at once."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Accuracy and macro F1, 0 to 1."""

    accuracy: float
    macro_f1: float
    """Mean over the classes that occur or are said, each F1 2 * hits / (rows of the class + rows said to be)."""
    accuracy_band: tuple[float, float]
    """Where 95 % of the resamples lie: rows drawn with replacement, as many as there are. The model is held."""
    macro_f1_band: tuple[float, float]


def confusion(true: Int[Array, " N"], said: Int[Array, " N"], classes: int) -> Int[Array, "C C"]:
    """How often each true class (rows) was said to be each class (columns)."""
    return np.bincount(true * classes + said, minlength=classes * classes).reshape(classes, classes)


def accuracy(table: Int[Array, "*resamples C C"]) -> Float[Array, "*resamples"]:
    """Share of rows on the diagonal."""
    return np.trace(table, axis1=-2, axis2=-1) / table.sum((-2, -1))


def macro_f1(table: Int[Array, "*resamples C C"]) -> Float[Array, "*resamples"]:
    """Mean F1 over the classes that occur or are said."""
    hits, either = np.diagonal(table, axis1=-2, axis2=-1), table.sum(-1) + table.sum(-2)
    return (2 * hits / np.maximum(either, 1)).sum(-1) / (either > 0).sum(-1)


def agreement(true: Int[Array, " N"], said: Int[Array, " N"], classes: int, *, seed: int = 0) -> Agreement:
    """The figures of some rows, with bands of 2,000 resamples.

    Both figures are functions of the confusion matrix alone, and drawing N rows with replacement draws its counts from
    a multinomial: no row needs to be touched."""
    table, draws = confusion(true, said, classes), np.random.default_rng(seed)
    block = max(1, _CELLS // table.size)
    values = []
    for start in range(0, RESAMPLES, block):
        drawn = draws.multinomial(len(true), table.ravel() / len(true), min(block, RESAMPLES - start))
        drawn = drawn.reshape(-1, *table.shape)
        values.append(np.stack([accuracy(drawn), macro_f1(drawn)]))
    (low, low_f1), (high, high_f1) = np.quantile(np.concatenate(values, 1), (0.025, 0.975), axis=1)
    return Agreement(
        accuracy=float(accuracy(table)),
        macro_f1=float(macro_f1(table)),
        accuracy_band=(float(low), float(high)),
        macro_f1_band=(float(low_f1), float(high_f1)),
    )
