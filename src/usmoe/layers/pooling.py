"""From what a model says of each token to one vector a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from usmoe.routing.scores import in_float32_at_least

Pooling = Literal["last", "mean", "weighted_mean"]


def last(states: Float[Tensor, "B L D"], lengths: Int[Tensor, " B"]) -> Float[Tensor, "B D"]:
    """What is said of the last real token, which has read all others."""
    return in_float32_at_least(states[torch.arange(len(states), device=states.device), lengths - 1])


def mean(states: Float[Tensor, "B L D"], lengths: Int[Tensor, " B"]) -> Float[Tensor, "B D"]:
    """The mean over the real tokens."""
    return _weighted(states, _real(states, lengths))


def weighted_mean(states: Float[Tensor, "B L D"], lengths: Int[Tensor, " B"]) -> Float[Tensor, "B D"]:
    """The mean over the real tokens, the t-th of them (from 1) with weight t: later tokens have read more (SGPT,
    arXiv 2202.08904, section 3.1)."""
    place = torch.arange(1, states.shape[1] + 1, device=states.device)
    return _weighted(states, _real(states, lengths) * place)


def _real(states: Tensor, lengths: Tensor) -> Tensor:
    """(B, L): 1 for a real token, 0 for the padding behind them."""
    return (torch.arange(states.shape[1], device=states.device) < lengths.unsqueeze(1)).float()


def _weighted(states: Tensor, weights: Tensor) -> Tensor:
    # padding counts 0 times what it holds, and a hybrid model may leave NaN there
    kept = in_float32_at_least(states).masked_fill((weights == 0).unsqueeze(-1), 0.0)
    weights = weights.to(kept.dtype)
    # no einsum, which autocast would round to bfloat16
    return (kept * (weights / weights.sum(1, keepdim=True)).unsqueeze(-1)).sum(1)


POOLINGS: dict[Pooling, Callable[[Tensor, Tensor], Tensor]] = {
    "last": last,
    "mean": mean,
    "weighted_mean": weighted_mean,
}
"""(states (B, L, D), real tokens of each text (B,), padded on the right) -> (B, D), in float32 at least, also under
autocast."""
