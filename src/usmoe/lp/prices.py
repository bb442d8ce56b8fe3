"""Prices: what a place at each expert is worth, from the smoothed dual of the linear program, by Newton's method.

The program  max sum S*x  with x in [0,1], row sums r in [floor, cap], column sums c in [floor, cap], sum c = n  has as
its dual  min over (token price v, expert price m, budget price l) of  sum f(S - v - m) + sum f(v) + sum f(m - l) + n*l,
where f(g) is the largest g*z for z within its bounds. Each f is smoothed by a logarithmic barrier of strength tau,
max g*z + tau*(log(z - low) + log(high - z)), whose best z and curvature have a closed form. What is left is a smooth
convex function: Newton's method on it, the tokens eliminated (their block is diagonal), costs a system of E + 1
unknowns a step; tau goes down geometrically. All pools of a batch go together, each at its own tau and step length.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from usmoe.lp.bounds import Bounds

_SHRINK = 0.2
"""Factor from one tau to the next."""
_STEPS = 400
"""Newton steps after which the prices are taken as they are: any prices give a true bound."""


@torch.no_grad()
def expert_prices(scores: Float[Tensor, "G S E"], bounds: Bounds, last: float = 1e-4) -> Float[Tensor, "G E"]:
    """Near-optimal prices of the experts: positive where a cap binds, negative where a floor does, 0 elsewhere.

    scores  -inf: never chosen
    last    strength of the last barrier, as a share of the range of a pool's scores: the prices' relative precision
    """
    allowed = scores > -torch.inf
    low = scores.masked_fill(~allowed, torch.inf).amin((1, 2), keepdim=True)
    high = scores.amax((1, 2), keepdim=True)
    low, high = low.where(low < torch.inf, 0.0), high.where(high > -torch.inf, 0.0)
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
        point = _moved(point, step, torch.where(going, length, 0.0))
        going = going & ~((tau <= last) & (decrement < 0.5))
        if not going.any():
            break
        tau = torch.where(decrement < 3, (tau * _SHRINK).clamp(min=last), tau)
    _, expert, budget = point
    price = expert - budget[:, None]
    price = torch.where(price.abs() < 2 * tau[:, None], 0.0, price)  # a slack bound has a price of about tau / slack
    return price * scale.squeeze(2)


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

    def at(self, point: Point, tau: Tensor) -> tuple[Point, Point]:
        """The slope of the dual, and the curvature of its three kinds of terms: of pairs, tokens, experts."""
        token, expert, budget = point
        token_low, token_high, expert_low, expert_high = self.bounds
        each = tau[:, None]
        x, of_pairs = _best(self.scores - token[..., None] - expert[:, None], 0.0, 1.0, each[..., None])
        if self.never is not None:
            x, of_pairs = x.masked_fill(self.never, 0.0), of_pairs.masked_fill(self.never, 0.0)
        r, of_tokens = _best(token, token_low, token_high, each)
        c, of_experts = _best(expert - budget[:, None], expert_low, expert_high, each)
        left = torch.zeros_like(budget) if self.budget is None else self.budget - c.sum(1)
        return (r - x.sum(2), c - x.sum(1), left), (of_pairs, of_tokens, of_experts)

    def newton(self, slope: Point, curve: Point) -> Point:
        """The step to the minimum of the second-order model."""
        of_pairs, of_tokens, of_experts = curve
        experts = of_experts.shape[1]
        tiny = torch.finfo(of_pairs.dtype).tiny
        diagonal = of_pairs.sum(2) + of_tokens + tiny
        matrix = of_pairs.new_zeros(len(of_pairs), experts + 1, experts + 1)
        matrix[:, :experts, :experts] = torch.diag_embed(of_pairs.sum(1) + of_experts)
        matrix[:, :experts, :experts] -= of_pairs.mT @ (of_pairs / diagonal[..., None])
        if self.budget is None:
            matrix[:, experts, experts] = 1
        else:
            matrix[:, :experts, experts] = matrix[:, experts, :experts] = -of_experts
            matrix[:, experts, experts] = of_experts.sum(1)
        # where floors equal caps the equations repeat each other: a trace of the diagonal keeps them solvable
        size = matrix.diagonal(dim1=1, dim2=2).amax(1)
        matrix.diagonal(dim1=1, dim2=2).add_((size * 1e-14 + tiny)[:, None])
        of_token, of_expert, of_budget = slope
        right = of_expert - (of_pairs.mT @ (of_token / diagonal)[..., None]).squeeze(2)
        solved = torch.linalg.solve(matrix, -torch.cat([right, of_budget[:, None]], 1))
        expert, budget = solved[:, :experts], solved[:, experts]
        token = -(of_token + (of_pairs @ expert[..., None]).squeeze(2)) / diagonal
        return token, expert, budget

    def line_search(self, point: Point, step: Point, tau: Tensor, descent: Tensor, wanted: Tensor) -> Tensor:
        """Step lengths at which the slope along the step is down to half of what it was; 1 where none is wanted."""
        length = torch.ones_like(tau)
        low, high = torch.zeros_like(tau), torch.full_like(tau, torch.inf)
        for _ in range(12):
            if not wanted.any():
                break
            along = _dot(self.at(_moved(point, step, length), tau)[0], step)
            wanted = wanted & (along.abs() > 0.5 * descent)
            short = along < 0
            low, high = torch.where(short, length, low), torch.where(short, high, length)
            other = torch.where(high.isinf(), 3 * length, 0.75 * low + 0.25 * high)
            length = torch.where(wanted, other, length)
        return length


def _best(gain: Tensor, low: Tensor | float, high: Tensor | float, tau: Tensor) -> tuple[Tensor, Tensor]:
    """The z that maximises gain*z + tau*(log(z - low) + log(high - z)), and how fast it grows with the gain."""
    width = high - low
    v = gain * width / tau
    y = v / (2 + (4 + v * v).sqrt())  # z is the middle for y = 0, low for -1, high for 1
    square = y * y
    return low + width * (1 + y) / 2, width * width * (1 - square) ** 2 / (8 * tau * (1 + square))


def _dot(one: Point, other: Point) -> Tensor:
    return (one[0] * other[0]).sum(1) + (one[1] * other[1]).sum(1) + one[2] * other[2]


def _moved(point: Point, step: Point, length: Tensor) -> Point:
    each = length[:, None]
    return point[0] + each * step[0], point[1] + each * step[1], point[2] + length * step[2]
