"""The optimum of a batch of programs: greedy where that is exact, else prices and exchanges."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from usmoe.lp.bounds import Bounds
from usmoe.lp.exchange import Exchange
from usmoe.lp.greedy import midway, within
from usmoe.lp.prices import expert_prices, finite_range

_TRACE = 1e-10
"""Of the size of the scores: what two selections may differ by, a pair, and count as equal."""


@torch.no_grad()
def best_pairs(
    scores: Float[Tensor, "G S E"], bounds: Bounds
) -> tuple[Bool[Tensor, "G S E"], Float[Tensor, "G E"], Float[Tensor, " G"]]:
    """The best pairs of G pools, the prices of the experts at which they are the best (0: no bound of that expert
    matters), and an upper bound of the value of each pool. Scores in float64; -inf is chosen only where the bounds
    leave nothing else, and is worth 0 then.

    Without bounds on the experts, or without bounds on the tokens, a greedy selection is optimal (see usmoe.lp.greedy),
    and so it is where a greedy selection for one side happens to keep the bounds of the other. Else prices of the
    experts (usmoe.lp.prices) make the tokens spread, and exchanges (usmoe.lp.exchange) settle what they leave.
    """
    prices = scores.new_zeros(len(scores), scores.shape[2])
    if not bounds.bind_experts():
        mask = within(scores, *bounds.tokens, bounds.budget, -1)
        return mask, prices, worth(scores, mask)
    if not bounds.bind_tokens():
        mask = within(scores, *bounds.experts, bounds.budget, -2)
        return mask, _of_columns(scores, mask, bounds), worth(scores, mask)
    mask = within(scores, *bounds.tokens, bounds.budget, -1)
    upper = worth(scores, mask)
    crowded = ~_keeps(mask.sum(1), bounds.experts)
    if crowded.any():
        rows = crowded.nonzero().squeeze(1)
        mask[rows], prices[rows], upper[rows] = _priced(scores[rows], bounds.of(rows))
    return mask, prices, upper


def _of_columns(scores: Tensor, mask: Tensor, bounds: Bounds) -> Tensor:
    """Prices where the experts alone are bound: how far the cut of an expert that is held by its floor or its cap lies
    from that of the others together."""
    last, first_out, held = edges(scores, mask, bounds)
    free = last.masked_fill(held, torch.inf).amin(1), first_out.masked_fill(held, -torch.inf).amax(1)
    own, level = (midway(low, high.minimum(low)) for low, high in ((last, first_out), free))
    level = level.where(level.isfinite(), 0.0)[:, None]
    return torch.where(held & own.isfinite(), own - level, 0.0)


def edges(
    scores: Float[Tensor, "G S E"], mask: Bool[Tensor, "G S E"], bounds: Bounds
) -> tuple[Float[Tensor, "G E"], Float[Tensor, "G E"], Bool[Tensor, "G E"]]:
    """Of each expert: its lowest score that a token could drop (+inf where there is none), its highest that a token
    could take (-inf), and whether its floor or its cap holds it. What a token could do, its own bounds say."""
    (floors, caps), (least, most) = bounds.tokens, bounds.experts
    count, load = mask.sum(2), mask.sum(1)
    could_drop = mask & (count > floors)[..., None]
    could_take = ~mask & (count < caps)[..., None]
    held = ((load == most) & (most < scores.shape[1])) | ((load == least) & (least > 0))
    last = scores.masked_fill(~could_drop, torch.inf).amin(1)
    return last, scores.masked_fill(~could_take, -torch.inf).amax(1), held


def _priced(scores: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor, Tensor]:
    """The same for pools in which both sides matter."""
    whole, unit = _in_whole_numbers(scores, bounds.budget is None)
    prices = (expert_prices(scores, bounds) / unit[:, None]).round()
    mask, _ = _at(prices, whole, bounds)
    rows = (~_settled(mask.sum(1), prices, bounds)).nonzero().flatten()
    for row in rows.tolist():
        mask[row], prices[row] = _exchanged(whole[row], mask[row], prices[row], bounds.of(rows.new_tensor([row])))
    prices = prices * unit[:, None]
    _, upper = _at(prices, scores, bounds)
    return mask, prices, upper.maximum(worth(scores, mask))


def _at(prices: Tensor, scores: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """The best pairs at given prices, and the bound that any prices give: what these pairs are worth net of the prices,
    and what the experts could earn at most (weak duality)."""
    reduced = scores - prices[:, None]
    mask = within(reduced, *bounds.tokens, bounds.budget, -1)
    floors, caps = bounds.experts
    return mask, worth(reduced, mask) + (prices.clamp(min=0) * caps + prices.clamp(max=0) * floors).sum(1)


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


def worth(scores: Float[Tensor, "G S E"], mask: Bool[Tensor, "G S E"]) -> Float[Tensor, " G"]:
    """Sum of the chosen scores, -inf left out."""
    return torch.where(mask & (scores > -torch.inf), scores, 0.0).sum((1, 2))


def _in_whole_numbers(scores: Tensor, as_they_are: bool) -> tuple[Tensor, Tensor]:
    """The scores as multiples of a unit for each pool, whole numbers below 2^43: no sum of them is rounded, so that
    exchanges that are equal compare as equal.

    Where the number of pairs is given only differences matter, and the middle becomes 0; else (as_they_are) 0 stays 0.
    -inf becomes so low that no chain of exchanges, of 2*(E+2) pairs at most, would pay for one. And each score is a
    trace less the higher its flat index: of equal optima one of low indices wins. The trace grows as a root does, so
    that low indices outweigh middle ones.
    """
    never = scores == -torch.inf
    low, high = finite_range(scores)
    middle = torch.zeros_like(low) if as_they_are else (low + high) / 2
    most = (high - middle).maximum(middle - low)
    most = torch.where(most > 0, most, 1.0)
    depth = 4.0 * (scores.shape[2] + 2) if never.any() else 1.0
    unit = torch.exp2((most * depth).log2().ceil() - 42)
    size = max(scores[0].numel(), 1)
    index = torch.arange(size, dtype=scores.dtype, device=scores.device).view(scores.shape[1:])
    each = most[:, None, None]
    settled = (scores - middle[:, None, None]).where(~never, -depth * each) - _TRACE * each * (index / size).sqrt()
    return (settled / unit[:, None, None]).round(), unit
