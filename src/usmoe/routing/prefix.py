"""The prefix pool: each token competes with all tokens before it, and no decision is ever revoked.

The online form of the sequence pool: token t takes those of its own pairs that are among the floor(k*t + 0.5) best of
all pairs of tokens 1 ... t. (SeqTopK, arXiv 2511.06494, has an online variant of the same mechanism.)
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from usmoe.lp.greedy import midway


@torch.no_grad()
def prefix(
    scores: Float[Tensor, "G S E"], count: Int[Tensor, "G S"], earlier: Float[Tensor, "G M"]
) -> Int[Tensor, "G S"]:
    """How many pairs of each token t are among the count[t] best of all pairs up to t, its own included.

    scores   of the pairs of each token, descending; -inf: can never be chosen
    earlier  of the tokens before the chunk, ascending, -inf where there is none

    Ties: the earlier token wins, then the lower expert.
    """
    flat = scores.flatten(1)
    above = outranking(flat) + earlier.shape[1] - torch.searchsorted(earlier.contiguous(), flat)
    return ((above.view_as(scores) < count.unsqueeze(-1)) & (scores > -torch.inf)).sum(-1)


@torch.no_grad()
def outranking(scores: Float[Tensor, "G N"]) -> Int[Tensor, "G N"]:
    """How many of the entries before each one, in its row, score at least as high: the size of every prefix's better
    part, for all prefixes at once, in N log N steps.

    Entries become their places in the order of the scores. Then, bit by bit from the highest, they are split by that
    bit, in order, as a radix sort would: the entries of a group that lie before one with a 1 and have a 0 outrank it.
    """
    rows, size = scores.shape
    bits = max(size - 1, 0).bit_length()
    order = scores.argsort(dim=1, descending=True, stable=True)
    entry = torch.arange(1 << bits, device=scores.device).repeat(rows, 1)  # what lies behind the end comes last
    entry[:, :size].scatter_(1, order, entry[:, :size].clone())
    for bit in reversed(range(bits)):  # an entry: its place below, what outranks it above
        group = entry.view(rows, 1 << (bits - bit - 1), 2 << bit)
        one = (group >> bit) & 1
        zeros = (1 - one).cumsum(2)
        step = torch.arange(2 << bit, device=scores.device)
        to = torch.where(one.bool(), (1 << bit) + step - zeros, zeros - 1)
        entry = torch.empty_like(group).scatter_(2, to, group + ((zeros * one) << 32)).flatten(1)
    return torch.empty_like(order).scatter_(1, order, (entry >> 32)[:, :size])


@torch.no_grad()
def merged(earlier: Float[Tensor, "G M"], scores: Float[Tensor, "G N"]) -> Float[Tensor, "G M+N"]:
    """All scores, ascending; `earlier` is so already, which makes a short chunk cheap."""
    new = scores.sort(1).values
    if not earlier.shape[1]:
        return new
    earlier = earlier.contiguous()

    def among(values: Tensor, others: Tensor, after_equals: bool) -> Tensor:
        step = torch.arange(values.shape[1], device=values.device)
        return step + torch.searchsorted(others, values, right=after_equals)

    both = torch.empty(len(new), earlier.shape[1] + new.shape[1], dtype=new.dtype, device=new.device)
    both.scatter_(1, among(earlier, new, False), earlier)
    return both.scatter_(1, among(new, earlier, True), new)


@torch.no_grad()
def cut_of(ascending: Float[Tensor, "G M"], count: Int[Tensor, " G"]) -> Float[Tensor, " G"]:
    """Midway between the count-th best and the next of each row; -inf where all are chosen, +inf where none is."""
    edge = ascending.new_full((len(ascending), 1), torch.inf)
    ladder = torch.cat([-edge, ascending, edge], 1)
    count = count.minimum((ascending > -torch.inf).sum(1))
    last = ladder.shape[1] - 1 - count
    return midway(ladder.gather(1, last[:, None]), ladder.gather(1, last[:, None] - 1)).squeeze(1)
