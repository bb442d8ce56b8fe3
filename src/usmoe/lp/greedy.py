"""Greedy selection: where the linear program of routing is solved by taking the best pairs first.

With a budget alone, or with bounds on the tokens alone (or on the experts alone) beside it, the feasible sets are the
bases of a matroid: rows that are independent of each other but for the budget. Taking each row's floor first, and then
the best of what its cap still allows, is optimal: where another solution lacks a pair that was taken, it holds a pair
in that pair's place, of the same row or of another row above its floor, which scores no higher; exchanging the two
keeps all bounds and loses nothing (Edmonds 1971, "Matroids and the greedy algorithm").
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


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
    return mask & eligible, midway(last, first_out).squeeze(1)


@torch.no_grad()
def top_alike(scores: Float[Tensor, "G M"], count: int) -> tuple[Bool[Tensor, "G M"], Float[Tensor, " G"]] | None:
    """`top()` with one count for all rows of scores that are all eligible, by fewer operations; None where a tie at the
    cut, or a score of -inf, needs the rules of `top()`."""
    best = scores.topk(min(count + 1, scores.shape[1]), dim=1)
    last = best.values[:, count - 1]
    out = best.values[:, count] if count < scores.shape[1] else torch.full_like(last, -torch.inf)
    if not bool((last > out).all()):
        return None
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best.indices[:, :count], True)
    return mask, midway(last, out)


def midway(last: Float[Tensor, "..."], first_out: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The cut between the last chosen and the first unchosen score: the middle where there is one; -inf where nothing
    is left, +inf where nothing was chosen."""
    middle = last + (first_out - last) / 2
    middle = torch.where(middle <= first_out, last, middle)  # adjacent floats have no middle
    middle = torch.where(first_out == -torch.inf, first_out, middle)
    return torch.where(last == torch.inf, last, middle)


def in_order(scores: Float[Tensor, "..."], dim: int) -> tuple[Float[Tensor, "..."], Int[Tensor, "..."]]:
    """The scores along a dimension, descending, and the rank of each entry in that order, from 0; of two equal ones the
    lower index is first."""
    ordered, order = scores.sort(dim=dim, descending=True, stable=True)
    shape = [1] * scores.ndim
    shape[dim] = -1
    step = torch.arange(scores.shape[dim], device=scores.device).view(shape).expand_as(order)
    return ordered, torch.empty_like(order).scatter(dim, order, step)


@torch.no_grad()
def within(
    scores: Float[Tensor, "G S E"],
    floors: Int[Tensor, "G M"],
    caps: Int[Tensor, "G M"],
    budget: Int[Tensor, " G"] | None,
    dim: int,
) -> Bool[Tensor, "G S E"]:
    """The best pairs, where each token (dim=-1, M=S) or each expert (dim=-2, M=E) takes floors to caps of them, and all
    together the budget. The bounds must be feasible.

    Without a budget, what exceeds the floors is taken while it scores above 0. A pair of score -inf is taken where
    nothing else meets a floor or the budget. Ties: the lower flat index wins.
    """
    _, rank = in_order(scores, dim)
    forced = rank < floors.unsqueeze(dim)
    optional = ~forced & (rank < caps.unsqueeze(dim))
    if budget is None:
        return forced | (optional & (scores > 0))
    left = budget - floors.sum(-1)
    able = optional & (scores > -torch.inf)
    best, _ = top(scores.flatten(1), able.flatten(1), left)
    lacking = left - best.sum(1)
    if (lacking > 0).any():
        best |= top(torch.zeros_like(scores).flatten(1), (optional & ~able).flatten(1), lacking)[0]
    return forced | best.view_as(forced)
