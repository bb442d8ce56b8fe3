"""Thresholds: a pair is chosen when its score reaches a value, and nobody competes with anybody."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from usmoe.routing.router import Router, is_number


def as_values(threshold: Any) -> Any:
    """A tensor or a list as a tuple (a single number as itself), so that the router can be compared and hashed."""
    if isinstance(threshold, Tensor):
        threshold = threshold.tolist()
    return tuple(threshold) if isinstance(threshold, list) else threshold


def check_threshold(threshold: Any, pool: str) -> None:
    """Raise ValueError unless the threshold fits the pool: a number, or one an expert, where nobody competes; nothing
    elsewhere."""
    if threshold is None:
        return
    if pool != "threshold":
        raise ValueError(
            f"threshold={threshold} has no meaning with pool={pool}. Choose pool=threshold, or leave it out."
        )
    values = threshold if isinstance(threshold, tuple) else (threshold,)
    if not values or not all(is_number(value) and value == value for value in values):
        raise ValueError(
            f"threshold={threshold!r} cannot be compared with scores. Give a number, or a tuple of them, one an expert."
        )


def thresholds(threshold: Any, router: Router, scores: Float[Tensor, "T E"]) -> Float[Tensor, " M"]:
    """The threshold as a tensor like the scores, (1,) or (E,); a router that has none yet is refused."""
    if threshold is None:
        raise ValueError(
            f"{router} has no threshold yet. Give one, threshold=0.1 say, or let usmoe.calibrate() find it on text."
        )
    values = torch.as_tensor(threshold, dtype=scores.dtype, device=scores.device).reshape(-1)
    if isinstance(threshold, tuple) and len(values) != scores.shape[-1]:
        raise ValueError(
            f"{router.name} was given {len(values)} thresholds for {scores.shape[-1]} experts. Give one for each."
        )
    return values
