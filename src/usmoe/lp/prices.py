"""Prices: what a place at each expert is worth, from the smoothed dual of the linear program, by Newton's method.

The program  max sum S*x  with x in [0,1], row sums r in [floor, cap], column sums c in [floor, cap], sum c = n  has as
its dual  min over (token price v, expert price m, budget price l) of  sum f(S - v - m) + sum f(v) + sum f(m - l) + n*l,
where f(g) is the largest g*z for z within its bounds. Each f is smoothed by a logarithmic barrier of strength tau,
max g*z + tau*(log(z - low) + log(high - z)), whose best z and curvature have a closed form. What is left is a smooth
convex function: Newton's method on it, the tokens eliminated (their block is diagonal), costs a system of E + 1
unknowns a step; tau goes down geometrically. All pools of a batch go together, each at its own tau and step length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from usmoe.lp.bounds import Bounds

_SHRINK = 0.2
"""Factor from one tau to the next."""
_GIVE = 1e-3
"""By how many pairs a bound gives way for a price of the whole range: where floors and caps leave no room, or repeat
each other, prices would grow without end."""
_STEPS = 200
"""Newton steps after which the prices are taken as they are: any prices give a true bound."""


_FAR = 2.0**16
"""How many times further from the cut than a quarter of the best pairs a score must lie to count as an outlier, such as
the -1e9 of a masked pair: prices are found in the range of the others."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """Where to begin in one program."""

    prices: NDArray[np.float64]
    """(E)."""
    net: NDArray[np.float64] | None
    """(S, E): the scores, net of these prices, with outliers drawn in; None where there are no outliers."""


@torch.no_grad()
def start(scores: Float[Tensor, "G S E"], bounds: Bounds) -> list[Start]:
    """Where to begin in each of a batch of programs. Scores of the size of 1; -inf: never chosen."""
    low, high, wide = _common_range(scores, bounds)
    reach = high - low
    near = scores.clamp((low - reach)[:, None, None], (high + reach)[:, None, None])
    near = torch.where(wide[:, None, None] & (scores > -torch.inf), near, scores)
    prices = expert_prices(near, bounds)
    net = near - prices[:, None]
    return [
        Start(prices=prices[row].cpu().numpy(), net=net[row].cpu().numpy() if wide[row] else None)
        for row in range(len(scores))
    ]


def _common_range(scores: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor, Tensor]:
    """The lowest and the highest score of each pool without outliers, and whether it has any."""
    flat = scores.flatten(1)
    finite = flat > -torch.inf
    pairs = (flat > 0).sum(1) if bounds.budget is None else bounds.budget
    last = (pairs.minimum(finite.sum(1)) - 1).clamp(min=0)
    ordered = flat.sort(dim=1, descending=True).values
    cut, quarter = (ordered.gather(1, rank[:, None]) for rank in (last, last // 4))
    apart = quarter - cut
    near = finite & ((flat - cut).abs() <= _FAR * apart)
    wide = (apart.squeeze(1) > 0) & (near != finite).any(1)
    low, high = finite_range(torch.where(near, flat, -torch.inf)[:, :, None])
    full_low, full_high = finite_range(scores)
    return low.where(wide, full_low), high.where(wide, full_high), wide


@torch.no_grad()
def expert_prices(scores: Float[Tensor, "G S E"], bounds: Bounds) -> Float[Tensor, "G E"]:
    """Near-optimal prices of the experts: positive where a cap binds, negative where a floor does, 0 elsewhere.

    Scores in float64, of the size of 1; -inf: never chosen. The prices are as precise as the scores are dense: a few of
    S*E scores lie within the last tau, so that few pairs are left on the wrong side of them.
    """
    last = min(max(8 / max(scores[0].numel(), 1), 1e-5), 1e-2)
    allowed = scores > -torch.inf
    low, high = (edge[:, None, None] for edge in finite_range(scores))
    if bounds.budget is None:  # scores have a meaning of their own: 0 is the score of no pair
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low).clamp(min=torch.finfo(scores.dtype).tiny)
    middle = 0.0 if bounds.budget is None else (low + high) / 2
    dual = _Dual(((scores - middle) / scale).where(allowed, 0.0), allowed, bounds)
    point = dual.start()
    tau = torch.ones_like(scale).view(-1)
    going = torch.ones_like(tau, dtype=torch.bool)
    for _ in range(_STEPS):
        slope, curve = dual.at(point, tau)
        step = dual.newton(slope, curve)
        descent = -_dot(slope, step)
        decrement = (descent / tau).clamp(min=0).sqrt()
        length = dual.line_search(point, step, tau, descent, going & (decrement > 0.5))
        going = going & torch.isfinite(decrement)
        token, expert, budget = _moved(point, step, length)
        here = going[:, None]
        point = token.where(here, point[0]), expert.where(here, point[1]), budget.where(going, point[2])
        going = going & ~((tau <= last) & (decrement < 0.5))
        if not going.any():
            break
        tau = torch.where(decrement < 3, (tau * _SHRINK).clamp(min=last), tau)
    _, expert, budget = point
    price = expert - budget[:, None]
    price = torch.where(price.abs() < 2 * tau[:, None], 0.0, price)  # a slack bound has a price of about tau / slack
    most = 2 * (scores.shape[2] + 2)  # no chain of exchanges is worth more
    return price.clamp(-most, most) * scale.squeeze(2)


def finite_range(scores: Float[Tensor, "G S E"]) -> tuple[Float[Tensor, " G"], Float[Tensor, " G"]]:
    """The lowest and the highest score of each pool that is not -inf; 0 where there is none."""
    low = scores.masked_fill(scores == -torch.inf, torch.inf).amin((1, 2))
    high = scores.amax((1, 2))
    return low.where(low < torch.inf, 0.0), high.where(high > -torch.inf, 0.0)


Point = tuple[Tensor, Tensor, Tensor]
"""Of the tokens (G, S), of the experts (G, E), of the budget (G): prices, slopes, or a step."""


class _Dual:
    """The smoothed dual of a batch of programs, whose scores have a range of 1."""

    def __init__(self, scores: Float[Tensor, "G S E"], allowed: Bool[Tensor, "G S E"], bounds: Bounds) -> None:
        self.scores = scores
        self.never = None if allowed.all() else ~allowed
        self.budget = bounds.budget
        self.bounds = [side.to(scores.dtype) for side in (*bounds.tokens, *bounds.experts)]

    def start(self) -> Point:
        rows, tokens, experts = self.scores.shape
        new = self.scores.new_zeros
        return new(rows, tokens), new(rows, experts), new(rows)

    def slope(self, point: Point, tau: Tensor) -> Point:
        """The slope of the dual."""
        return self.at(point, tau, curved=False)[0]

    def at(self, point: Point, tau: Tensor, curved: bool = True) -> tuple[Point, Point]:
        """The slope of the dual, and the curvature of its three kinds of terms: of pairs, tokens, experts."""
        token, expert, budget = point
        token_low, token_high, expert_low, expert_high = self.bounds
        each = tau[:, None]
        x, of_pairs = _best(self.scores - token[..., None] - expert[:, None], 0.0, 1.0, each[..., None], curved)
        if self.never is not None:
            x, of_pairs = x.masked_fill(self.never, 0.0), of_pairs.masked_fill(self.never, 0.0)
        r, of_tokens = _best(token, token_low, token_high, each, curved)
        c, of_experts = _best(expert - budget[:, None], expert_low, expert_high, each, curved)
        left = torch.zeros_like(budget) if self.budget is None else self.budget - c.sum(1)
        slope = r - x.sum(2) + _GIVE * token, c - x.sum(1) + _GIVE * expert, left + _GIVE * budget
        return slope, (of_pairs, of_tokens, of_experts)

    def newton(self, slope: Point, curve: Point) -> Point:
        """The step to the minimum of the second-order model."""
        of_pairs, of_tokens, of_experts = curve
        experts = of_experts.shape[1]
        diagonal = of_pairs.sum(2) + of_tokens + _GIVE
        matrix = of_pairs.new_zeros(len(of_pairs), experts + 1, experts + 1)
        matrix[:, :experts, :experts] = torch.diag_embed(of_pairs.sum(1) + of_experts)
        matrix[:, :experts, :experts] -= of_pairs.mT @ (of_pairs / diagonal[..., None])
        if self.budget is None:
            matrix[:, experts, experts] = 1
        else:
            matrix[:, :experts, experts] = matrix[:, experts, :experts] = -of_experts
            matrix[:, experts, experts] = of_experts.sum(1)
        matrix.diagonal(dim1=1, dim2=2).add_(_GIVE)
        of_token, of_expert, of_budget = slope
        right = of_expert - (of_pairs.mT @ (of_token / diagonal)[..., None]).squeeze(2)
        solved = torch.linalg.solve(matrix, -torch.cat([right, of_budget[:, None]], 1))
        expert, budget = solved[:, :experts], solved[:, experts]
        token = -(of_token + (of_pairs @ expert[..., None]).squeeze(2)) / diagonal
        return token, expert, budget

    def line_search(self, point: Point, step: Point, tau: Tensor, descent: Tensor, wanted: Tensor) -> Tensor:
        """Step lengths at which the slope along the step is down to half of what it was; 1 where none is wanted.

        The slope grows with the length from -descent, so its zero is bracketed and found by false position.
        """
        length = torch.ones_like(tau)
        low, high = torch.zeros_like(tau), torch.full_like(tau, torch.inf)
        below, above = -descent, torch.ones_like(tau)
        for _ in range(12):
            if not wanted.any():
                break
            along = _dot(self.slope(_moved(point, step, length), tau), step)
            wanted = wanted & (along.abs() > 0.5 * descent)
            short = along < 0
            low, high = torch.where(short, length, low), torch.where(short, high, length)
            below, above = torch.where(short, along, below), torch.where(short, above, along)
            share = (below / (below - above)).clamp(0.1, 0.9)
            other = torch.where(high.isinf(), 3 * length, low + share * (high - low))
            length = torch.where(wanted, other, length)
        return length


def _best(gain: Tensor, low: Tensor | float, high: Tensor | float, tau: Tensor, curved: bool) -> tuple[Tensor, Tensor]:
    """The z that maximises gain*z + tau*(log(z - low) + log(high - z)), and how fast it grows with the gain."""
    width = high - low
    v = gain * (width / tau)
    q = 1 / (2 + (4 + v * v).sqrt())
    y = v * q  # -1 at the lower bound, 1 at the upper; 1 - y*y is 4*q
    z = low + (width / 2) * (1 + y)
    return z, q * q / (1 + y * y) * (2 * width * width / tau) if curved else z


def _dot(one: Point, other: Point) -> Tensor:
    return (one[0] * other[0]).sum(1) + (one[1] * other[1]).sum(1) + one[2] * other[2]


def _moved(point: Point, step: Point, length: Tensor) -> Point:
    each = length[:, None]
    return point[0] + each * step[0], point[1] + each * step[1], point[2] + length * step[2]
