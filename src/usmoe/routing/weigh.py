"""Weighing: pure functions from scores and the chosen pairs to the weights with which outputs are combined."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def as_scored(scores: Float[Tensor, "T E"], mask: Bool[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """The score itself."""
    return scores


def over_all(scores: Float[Tensor, "T E"], mask: Bool[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """The score over the sum of the token's scores for all experts (what the released code does)."""
    return scores / _sum(scores)


def over_chosen(scores: Float[Tensor, "T E"], mask: Bool[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """The score over the sum of the token's chosen scores: the weights of a token sum to 1."""
    return scores / _sum(scores.where(mask, 0))


def _sum(scores: Tensor) -> Tensor:
    total = scores.sum(-1, keepdim=True)
    return total.clamp(min=torch.finfo(total.dtype).tiny)


NORMALIZATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": as_scored,
    "all": over_all,
    "chosen": over_chosen,
}
"""Weights by name: (scores (T, E), mask (T, E)) -> (T, E), read where the mask is True."""
