"""Selection: pure functions from scores to the pairs that are chosen. Selections have no gradient."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def budget(k: float, tokens: Int[Tensor, " G"]) -> Int[Tensor, " G"]:
    """floor(k*S + 0.5): the pairs that a pool of S tokens may spend at k experts a token."""
    return (tokens.double() * k + 0.5).floor().long()


def capacity(k: float, tokens: Int[Tensor, " G"], num_experts: int) -> Int[Tensor, " G"]:
    """max(1, floor(k*S/E + 0.5)): the tokens that each expert takes of a pool of S under expert choice; 0 of none."""
    share = (tokens.double() * k / num_experts + 0.5).floor().long()
    return torch.where(tokens > 0, share.clamp(min=1), 0)


@torch.no_grad()
def top(
    scores: Float[Tensor, "G M"], eligible: Bool[Tensor, "G M"], count: Int[Tensor, " G"]
) -> tuple[Bool[Tensor, "G M"], Float[Tensor, " G"]]:
    """The `count` best of each row, and the cut.

    Ties: the lower index wins. A row with fewer eligible entries than `count` gives all of them. The cut lies midway
    between the last chosen and the first unchosen score, so that `score >= cut` chooses the same entries (unless
    those two are equal); -inf where all were chosen, +inf where none was
    (an empty row counts as none).
    """
    ranked = scores.masked_fill(~eligible, -torch.inf)
    count = torch.minimum(count, eligible.sum(1))
    width = ranked.shape[1]
    depth = min(int(count.max()) + 1, width) if count.numel() else 0
    best = ranked.topk(depth, dim=1).values  # (G, depth)
    edge = ranked.new_full((len(ranked), 1), torch.inf)
    floor = -edge
    ladder = torch.cat([edge, best, floor], 1)  # rank 0 is +inf, rank n the n-th score, past the end -inf
    last = ladder.gather(1, count[:, None])
    first_out = ladder.gather(1, count[:, None] + 1)
    mask = ranked >= last
    surplus = mask.sum(1) - count
    if surplus.any():  # a tie at the cut: of those equal to the last, the lowest indices
        equal = ranked == last
        above = ranked > last
        mask = above | (equal & (equal.cumsum(1) <= (count - above.sum(1))[:, None]))
    return mask & eligible, _midway(last, first_out).squeeze(1)


def _midway(last: Tensor, first_out: Tensor) -> Tensor:
    middle = last + (first_out - last) / 2
    middle = torch.where(middle <= first_out, last, middle)  # adjacent floats have no middle
    middle = torch.where(first_out == -torch.inf, first_out, middle)
    return torch.where(last == torch.inf, last, middle)


def per_expert(
    scores: Float[Tensor, "G S E"], eligible: Bool[Tensor, "G S E"], count: Int[Tensor, " G"]
) -> tuple[Bool[Tensor, "G S E"], Float[Tensor, "G E"]]:
    """The `count` best tokens of each expert in each pool (expert choice), and the cut of each."""
    pools, size, experts = scores.shape

    def columns(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(pools * experts, size)

    mask, cut = top(columns(scores), columns(eligible), count.repeat_interleave(experts))
    return mask.view(pools, experts, size).transpose(1, 2), cut.view(pools, experts)


def whole(k: float, what: str) -> int:
    """k as an int; a fractional one is refused in the words of the router that asks."""
    if not math.isclose(k, round(k)):
        raise ValueError(
            f"{what} gives every token the same number of experts, so k={k:g} is impossible. Choose a whole k, or "
            f"USMoE(k={k:g}), whose budget may be fractional."
        )
    return round(k)
