"""`solve`: the best (token, expert) pairs under a budget, floors and caps."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from usmoe.lp.bounds import Bounds
from usmoe.lp.optimum import best_pairs, worth

Bound = int | Tensor | None
Pair = tuple[Bound, Bound] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """The chosen pairs, what they are worth, and a proof of how good they are."""

    mask: Bool[Tensor, "T E"]
    """True for the chosen pairs."""
    value: float
    """Sum of their scores."""
    upper_bound: float
    """No selection within the bounds has a higher sum: the value of a dual solution (the value itself where a greedy
    selection is optimal), equal to the value to rounding."""


def solve(
    scores: Float[Tensor, "T E"], *, budget: int | None = None, per_token: Pair = None, per_expert: Pair = None
) -> Solution:
    """The selection of (token, expert) pairs with the highest sum of scores: the linear program of routing, whose
    solutions are whole (its matrix is that of a flow), so that choosing pairs is solving it.

    scores      (T, E), any float dtype; worked on in float64. -inf: never chosen
    budget      exactly so many pairs; None: as many as pay, within the bounds
    per_token   (floor, cap) of the pairs of a token: each an int, an int tensor (T,), or None; None: no bounds
    per_expert  (floor, cap) of the pairs of an expert: each an int, an int tensor (E,), or None; None: no bounds

    Exact: no selection within the bounds has a higher sum of the scores as they stand, whatever their magnitudes (value
    is that sum, rounded). What cannot be chosen, or need not be, costs no digits: a masked pair may hold -inf, -1e9 or
    the lowest number of its dtype, and a large negative score that the bounds ask for counts like any other.

    Where the bounds are on one side at most, a greedy selection is optimal (budget with token bounds alone, or with
    expert bounds alone: the argument is in usmoe.lp.greedy), value == upper_bound, and the lower flat index wins a tie.
    With bounds on both sides successive shortest paths lead from near-optimal prices of the experts to an optimum, in
    whole numbers of finer and finer units until nothing is rounded off (usmoe.lp.exact: with the proof, and with bounds
    of units and of exchanges); of equal optima one of low flat indices is found. upper_bound is then the dual value of
    prices in float64, a certificate that does not rest on the paths; where scores that cannot be chosen exceed those
    that are by so much that float64 does not hold both, it is the value.

    Raises ValueError for bounds that cannot be met, with the numbers that conflict; for NaN and +inf scores; and for
    shapes and values that do not fit.
    """
    check_scores(scores)
    tokens, experts = scores.shape
    bounds = Bounds(
        tokens=_sides("per_token", per_token, tokens, experts, scores.device),
        experts=_sides("per_expert", per_expert, experts, tokens, scores.device),
        budget=_budget(budget, scores.device),
    )
    conflict = bounds.conflict()
    if conflict:
        raise ValueError(f"The bounds cannot be met: {conflict}. Widen a bound or change the budget.")
    wide = scores.detach().double()
    mask, _, upper = best_pairs(wide[None], bounds)
    never = mask[0] & (wide == -torch.inf)
    if never.any():
        raise ValueError(f"The bounds cannot be met: {_lacking(wide, bounds, mask[0])}.")
    return Solution(mask=mask[0], value=worth(wide[None], mask).item(), upper_bound=upper.item())


def _lacking(scores: Tensor, bounds: Bounds, mask: Tensor) -> str:
    """Where scores of -inf leave too few pairs, in words."""
    finite = scores > -torch.inf
    for kind, (floors, _), count in (
        ("token", bounds.tokens, finite.sum(1)),
        ("expert", bounds.experts, finite.sum(0)),
    ):
        short = (count < floors[0]).nonzero().flatten()
        if len(short):
            row = int(short[0])
            return (
                f"{kind} {row} has {int(count[row])} finite scores and a floor of {int(floors[0, row])}. Lower the "
                "floor, or let more pairs be chosen"
            )
    return (
        f"they need {int(mask.sum())} pairs, of which {int((mask & ~finite).sum())} would score -inf; "
        f"{int(finite.sum())} pairs are finite. Widen a bound, change the budget, or let more pairs be chosen"
    )


def check_scores(scores: Any) -> None:
    """Raise ValueError unless the scores are a float matrix without NaN and +inf."""
    if not isinstance(scores, Tensor) or scores.ndim != 2 or not scores.is_floating_point():
        what = (
            f"{tuple(scores.shape)} of {scores.dtype}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        )
        raise ValueError(f"scores are {what}. Give a float tensor (tokens, experts).")
    for name, wrong in (("NaN", scores.isnan()), ("+inf", scores == torch.inf)):
        if wrong.any():
            raise ValueError(
                f"{int(wrong.sum())} of {wrong.numel()} scores are {name}. Give finite scores, and -inf where a pair "
                "must never be chosen."
            )


def _budget(budget: Any, device: torch.device) -> Tensor | None:
    if budget is None:
        return None
    if isinstance(budget, bool) or not isinstance(budget, numbers.Integral) or int(budget) < 0:
        raise ValueError(f"budget={budget!r} is no number of pairs. Give a whole number, 0 or more.")
    return torch.tensor([int(budget)], device=device)


def _sides(name: str, pair: Any, rows: int, most: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Floors and caps (1, rows), within 0 to `most`."""
    if pair is None:
        pair = (None, None)
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ValueError(f"{name}={pair!r} is no pair of bounds. Give (floor, cap), either of them None.")
    floors, caps = (_counts(name, bound, rows, idle, device) for bound, idle in zip(pair, (0, most), strict=True))
    if (floors > caps).any():
        row = int((floors > caps).nonzero()[0, 0])
        raise ValueError(
            f"{name} has a floor of {int(floors[row])} above a cap of {int(caps[row])}. Swap or widen them."
        )
    if (floors > most).any():
        there = f"{most} {'experts' if name == 'per_token' else 'tokens'}"
        raise ValueError(f"{name} has a floor of {int(floors.max())}, but there are {there}. Choose one <= {most}.")
    return floors[None], caps.clamp(max=most)[None]


def _counts(name: str, bound: Any, rows: int, idle: int, device: torch.device) -> Tensor:
    if bound is None:
        bound = idle
    if isinstance(bound, numbers.Integral) and not isinstance(bound, bool):
        bound = torch.full((rows,), int(bound))
    if isinstance(bound, np.ndarray):
        bound = torch.from_numpy(bound)
    if not isinstance(bound, Tensor) or bound.is_floating_point() or bound.is_complex() or bound.dtype == torch.bool:
        raise ValueError(f"A bound of {name} is {bound!r}. Bounds are counts: give a whole number, or an int tensor.")
    if tuple(bound.shape) != (rows,):
        raise ValueError(f"A bound of {name} has shape {tuple(bound.shape)}. Give one number, or a tensor ({rows},).")
    if (bound < 0).any():
        raise ValueError(f"A bound of {name} is {int(bound.min())}. Bounds are counts: give 0 or more.")
    return bound.to(device).long()
