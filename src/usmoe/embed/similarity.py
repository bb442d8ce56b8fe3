"""How alike two vectors are."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (n, D) of length 1; a vector of zeros stays one."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length == 0, 1, length)


def of_all(one: Any, other: Any, name: Literal["cosine", "dot"]) -> np.ndarray:
    """(n, m): cosine or dot product of each of `one` (n, D) with each of `other` (m, D); a single vector counts as one
    row."""
    first, second = np.atleast_2d(np.asarray(one)), np.atleast_2d(np.asarray(other))
    return unit(first) @ unit(second).T if name == "cosine" else first @ second.T


def of_pairs(one: Any, other: Any, name: Literal["cosine", "dot"]) -> np.ndarray:
    """(n,): cosine or dot product of each of `one` (n, D) with the one of `other` in the same place."""
    first, second = np.atleast_2d(np.asarray(one)), np.atleast_2d(np.asarray(other))
    return (unit(first) * unit(second)).sum(-1) if name == "cosine" else (first * second).sum(-1)
