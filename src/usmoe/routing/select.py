"""Selection: pure functions from scores to the pairs that are chosen. Selections have no gradient."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from usmoe.lp.greedy import in_order, top


def budget(k: float, tokens: Int[Tensor, " G"]) -> Int[Tensor, " G"]:
    """floor(k*S + 0.5): the pairs that a pool of S tokens may spend at k experts a token."""
    return (tokens.double() * k + 0.5).floor().long()


def capacity(k: float, tokens: Int[Tensor, " G"], num_experts: int) -> Int[Tensor, " G"]:
    """max(1, floor(k*S/E + 0.5)): the tokens that each expert takes of a pool of S under expert choice; 0 of none."""
    share = (tokens.double() * k / num_experts + 0.5).floor().long()
    return torch.where(tokens > 0, share.clamp(min=1), 0)


def per_expert(
    scores: Float[Tensor, "G S E"], eligible: Bool[Tensor, "G S E"], count: Int[Tensor, " G"]
) -> tuple[Bool[Tensor, "G S E"], Float[Tensor, "G E"]]:
    """The `count` best tokens of each expert in each pool (expert choice), and the cut of each."""
    pools, size, experts = scores.shape

    def columns(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(pools * experts, size)

    mask, cut = top(columns(scores), columns(eligible), count.repeat_interleave(experts))
    return mask.view(pools, experts, size).transpose(1, 2), cut.view(pools, experts)


@torch.no_grad()
def own_order(
    scores: Float[Tensor, "... E"], eligible: Bool[Tensor, "... E"]
) -> tuple[Float[Tensor, "... E"], Int[Tensor, "... E"]]:
    """The scores of each token, descending, -inf for the pairs that cannot be chosen; and the rank of each pair in that
    order, from 0; of two equal pairs the lower expert is first."""
    return in_order(scores.masked_fill(~eligible, -torch.inf), -1)


@torch.no_grad()
def cut_above_floors(
    scores: Float[Tensor, "G S E"],
    eligible: Bool[Tensor, "G S E"],
    floors: Int[Tensor, "G S"],
    count: Int[Tensor, " G"],
) -> tuple[Float[Tensor, " G"], Bool[Tensor, "G S E"]]:
    """The cut of the best pairs, `count` in all, where every token has its floor first (+inf where the floors spend it
    all); and the pairs beyond the floors."""
    forced = eligible & (own_order(scores, eligible)[1] < floors.unsqueeze(-1))
    optional = eligible & ~forced
    _, cut = top(scores.flatten(1), optional.flatten(1), (count - forced.sum((1, 2))).clamp(min=0))
    return cut, optional


def whole(k: float, what: str) -> int:
    """k as an int; a fractional one is refused in the words of the router that asks."""
    if not math.isclose(k, round(k)):
        raise ValueError(
            f"{what} gives every token the same number of experts, so k={k:g} is impossible. Choose a whole k, or "
            f"USMoE(k={k:g}), whose budget may be fractional."
        )
    return round(k)
