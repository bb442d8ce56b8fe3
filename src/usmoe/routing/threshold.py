"""Thresholds: a pair is chosen when its score reaches a value, and nobody competes with anybody."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from usmoe.routing.router import Router, is_number


def check_threshold(threshold: Any, pool: str, one_an_expert: bool = False) -> None:
    """Raise ValueError unless the threshold fits the pool: numbers where nobody competes, nothing elsewhere."""
    if threshold is None:
        return
    if pool != "threshold":
        raise ValueError(
            f"threshold={threshold} has no meaning with pool={pool}. Choose pool=threshold, or leave it out."
        )
    values = threshold if one_an_expert else (threshold,)
    if not isinstance(values, tuple) or not all(is_number(value) and value == value for value in values):
        kind = "a tuple of numbers, one an expert" if one_an_expert else "a number"
        raise ValueError(f"threshold={threshold!r} cannot be compared with scores. Give {kind}.")


def thresholds(threshold: Any, router: Router, scores: Tensor) -> Tensor:
    """The threshold as a tensor like the scores; a router that has none yet is refused."""
    if threshold is None:
        raise ValueError(
            f"{router} has no threshold yet. Give one, threshold=0.1 say, or let usmoe.calibrate() find it on text."
        )
    return torch.as_tensor(threshold, dtype=scores.dtype, device=scores.device)
