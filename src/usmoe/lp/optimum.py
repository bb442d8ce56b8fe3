"""The optimum of a batch of programs: greedy where that is exact, else prices and exchanges."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from usmoe.lp.bounds import Bounds
from usmoe.lp.exact import dual_prices, optimum
from usmoe.lp.greedy import midway, within
from usmoe.lp.prices import Start, start

_ROUNDING = 2.0**-40
"""Of the sum of the sizes of the chosen scores: what the rounding of prices may add to an upper bound."""


@torch.no_grad()
def best_pairs(
    scores: Float[Tensor, "G S E"], bounds: Bounds
) -> tuple[Bool[Tensor, "G S E"], Float[Tensor, "G E"], Float[Tensor, " G"]]:
    """The best pairs of G pools, the prices of the experts at which they are the best (0: no bound of that expert
    matters), and an upper bound of the value of each pool. Scores in float64; -inf is chosen only where the bounds
    leave nothing else, and is worth 0 then. The upper bound is the dual value of the prices; where these are so large
    that float64 does not hold the chosen scores beside them (a score of 1e300 that no bound lets in), it is the value
    itself, which usmoe.lp.exact has proved in whole numbers.

    Without bounds on the experts, or without bounds on the tokens, a greedy selection is optimal (see usmoe.lp.greedy),
    and so it is where a greedy selection for one side happens to keep the bounds of the other. Else prices of the
    experts (usmoe.lp.prices) make the tokens spread, and exchanges (usmoe.lp.exchange) settle what they leave, in whole
    numbers of units that are as fine as the scores ask for (usmoe.lp.exact).
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
    exponent = scores.masked_fill(scores == -torch.inf, 0.0).abs().amax((1, 2)).frexp().exponent.cpu()
    # in two steps, since 2^1074 is no float64
    half = exponent // 2
    size_of_1 = scores
    for part in (half, exponent - half):
        size_of_1 = size_of_1 * torch.exp2(-part.double()).to(scores.device)[:, None, None]
    mask = within(scores, *bounds.tokens, bounds.budget, -1)
    prices = scores.new_zeros(len(scores), scores.shape[2])
    for row, begin in enumerate(start(size_of_1, bounds)):
        mask[row], prices[row] = _one(scores[row], mask[row], bounds, row, begin, int(exponent[row]))
    value = worth(scores, mask)
    upper = _at_most(prices, scores, bounds).maximum(value)
    rounding = torch.finfo(scores.dtype).eps * prices.abs().amax(1) * mask.sum((1, 2))
    return (
        mask,
        prices,
        upper.where(
            rounding <= _ROUNDING * torch.where(mask & (scores > -torch.inf), scores.abs(), 0.0).sum((1, 2)), value
        ),
    )


def _one(scores: Tensor, mask: Tensor, bounds: Bounds, row: int, begin: Start, exponent: int) -> tuple[Tensor, Tensor]:
    """An optimum of one pool, and its prices."""
    token_floors, token_caps, floors, caps = (side[row].cpu().numpy() for side in (*bounds.tokens, *bounds.experts))
    sides = (token_floors, token_caps), (floors, caps)
    budget = None if bounds.budget is None else int(bounds.budget[row])
    values = scores.cpu().numpy()
    found = optimum(values, mask.cpu().numpy(), *sides, budget, begin, exponent)
    prices = dual_prices(values, found, *sides, budget)
    return torch.from_numpy(found).to(mask.device), torch.from_numpy(prices).to(scores.device)


def _at_most(prices: Tensor, scores: Tensor, bounds: Bounds) -> Tensor:
    """The bound that any prices give: what the best pairs at these prices are worth net of them, and what the experts
    could earn at most (weak duality)."""
    reduced = scores - prices[:, None]
    mask = within(reduced, *bounds.tokens, bounds.budget, -1)
    floors, caps = bounds.experts
    return worth(reduced, mask) + (prices.clamp(min=0) * caps + prices.clamp(max=0) * floors).sum(1)


def _keeps(count: Tensor, sides: tuple[Tensor, Tensor]) -> Tensor:
    return ((count >= sides[0]) & (count <= sides[1])).all(1)


def worth(scores: Float[Tensor, "G S E"], mask: Bool[Tensor, "G S E"]) -> Float[Tensor, " G"]:
    """Sum of the chosen scores, -inf left out."""
    return torch.where(mask & (scores > -torch.inf), scores, 0.0).sum((1, 2))
