"""The optimum of a batch of programs: greedy where that is exact, else prices and exchanges."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from usmoe.lp.bounds import Bounds
from usmoe.lp.exchange import Exchange
from usmoe.lp.greedy import within
from usmoe.lp.prices import expert_prices

_TRACE = 1e-10
"""Of the size of the scores: what two selections may differ by, a pair, and count as equal."""


@torch.no_grad()
def best_pairs(
    scores: Float[Tensor, "G S E"], bounds: Bounds
) -> tuple[Bool[Tensor, "G S E"], Float[Tensor, "G E"], Float[Tensor, " G"]]:
    """The best pairs of G pools, the prices of the experts (0: no bound of theirs matters) and an upper bound of the
    value of each. Scores in float64; -inf is chosen only where the bounds leave nothing else, and is worth 0 then.

    Without bounds on the experts, or without bounds on the tokens, a greedy selection is optimal (see usmoe.lp.greedy),
    and so it is where a greedy selection for one side happens to keep the bounds of the other. Else prices of the
    experts (usmoe.lp.prices) make the tokens spread, and exchanges (usmoe.lp.exchange) settle what they leave.
    """
    prices = scores.new_zeros(len(scores), scores.shape[2])
    if not bounds.bind_experts():
        mask = within(scores, *bounds.tokens, bounds.budget, -1)
        return mask, prices, _worth(scores, mask)
    if not bounds.bind_tokens():
        mask = within(scores, *bounds.experts, bounds.budget, -2)
        return mask, prices, _worth(scores, mask)
    mask = within(scores, *bounds.tokens, bounds.budget, -1)
    upper = _worth(scores, mask)
    crowded = ~_keeps(mask.sum(1), bounds.experts)
    if crowded.any():
        rows = crowded.nonzero().squeeze(1)
        mask[rows], prices[rows], upper[rows] = _priced(scores[rows], bounds.of(rows))
    return mask, prices, upper


def _priced(scores: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor, Tensor]:
    """The same for pools in which both sides matter."""
    prices = expert_prices(scores, bounds)
    scores, most = _tilted(_with_finite(scores))
    mask, upper = _at(prices, scores, bounds)
    rows = (~_settled(mask.sum(1), prices, bounds)).nonzero().flatten()
    for row in rows.tolist():
        mask[row], prices[row] = _exchanged(scores[row], mask[row], prices[row], bounds.of(rows.new_tensor([row])))
    if len(rows):
        upper[rows] = _at(prices[rows], scores[rows], bounds.of(rows))[1].minimum(upper[rows])
    return mask, prices, (upper + mask.sum((1, 2)) * most).maximum(_worth(scores, mask))


def _at(prices: Tensor, scores: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """The best pairs at given prices, and the bound that any prices give: what these pairs are worth net of the prices,
    and what the experts could earn at most (weak duality)."""
    reduced = scores - prices[:, None]
    mask = within(reduced, *bounds.tokens, bounds.budget, -1)
    floors, caps = bounds.experts
    return mask, _worth(reduced, mask) + (prices.clamp(min=0) * caps + prices.clamp(max=0) * floors).sum(1)


def _exchanged(scores: Tensor, mask: Tensor, prices: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """An optimum of one pool, and its prices, from the best pairs at other prices."""
    token_floors, token_caps, floors, caps = (side[0].cpu().numpy() for side in (*bounds.tokens, *bounds.experts))
    exchange = Exchange(
        *(values.cpu().numpy() for values in (scores, mask, prices)),
        tokens=(token_floors, token_caps),
        experts=(floors, caps),
        budget=None if bounds.budget is None else int(bounds.budget[0]),
    )
    found = torch.from_numpy(exchange.run()), torch.from_numpy(exchange.prices())
    return found[0].to(mask.device), found[1].to(prices.device)


def _settled(load: Tensor, prices: Tensor, bounds: Bounds) -> Tensor:
    """Whether the selection at the prices is an optimum: every expert within its bounds, and at the one it pays for."""
    floors, caps = bounds.experts
    paid = ((prices <= 0) | (load == caps)) & ((prices >= 0) | (load == floors))
    return paid.all(1) & _keeps(load, bounds.experts)


def _keeps(count: Tensor, sides: tuple[Tensor, Tensor]) -> Tensor:
    return ((count >= sides[0]) & (count <= sides[1])).all(1)


def _worth(scores: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask & (scores > -torch.inf), scores, 0.0).sum((1, 2))


def _with_finite(scores: Tensor) -> Tensor:
    """-inf becomes so low that no chain of exchanges (of 2*(E+1) pairs at most) would pay for one."""
    never = scores == -torch.inf
    if not never.any():
        return scores
    low = scores.masked_fill(never, torch.inf).amin((1, 2), keepdim=True)
    high = scores.amax((1, 2), keepdim=True)
    low, high = low.where(low < torch.inf, 0.0), high.where(high > -torch.inf, 0.0)
    return scores.where(~never, low - 2 * (scores.shape[2] + 2) * (high - low).clamp(min=1e-6))


def _tilted(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The scores, a trace less the higher the flat index, and how much less the last one of each pool is. The trace
    grows as a root does: among equal optima the low indices of one outweigh the middle ones of another."""
    size = max(scores[0].numel(), 1)
    index = torch.arange(size, dtype=scores.dtype, device=scores.device).view(scores.shape[1:])
    most = _TRACE * scores.abs().amax((1, 2)).maximum(scores.amax((1, 2)) - scores.amin((1, 2)))
    return scores - (index / size).sqrt() * most[:, None, None], most
