"""The optimum of one program, exactly, whatever the magnitudes: whole numbers of ever finer units.

Chains of exchanges need sums that are not rounded, and float64 adds whole numbers below 2^53 exactly; scores that lie
far apart (1e20 beside 1, or -1e30 for what is masked) are no multiples of one unit that would leave them so small. So
the program is solved at a coarse unit first. What another selection could win by what that unit rounds off is bounded,
which settles most pairs; among the pairs that are left it is solved again, at a unit that is finer by what the others
no longer need (iterative refinement of linear programs, Gleixner, Steffy and Wolter 2016; that far pairs are settled is
the proximity theorem of Tardos 1985). It ends where nothing is rounded off, so that the selection is an optimum of the
scores as they stand; and of all optima one of low flat indices is found, by the same step.

Why a pair is settled. Let the scores be c*u + rest with whole c and |rest| <= u/2, and x an optimum for c, with prices
of tokens, experts and budget by which every exchange of x has a gain of 0 or less. Any optimum y for the scores differs
from x by cycles of exchanges, each of which must pay for itself in the scores, or y would be better without it. A
simple cycle passes m = min(tokens, experts) experts at most, two pairs at each, so that the rests add m*u to it at
most. Its gain in c is thus -m or more; it is the sum of the gains, net of the prices, of its parts, none of them
positive: none is below -m. So a pair whose score net of the prices is further than m from 0 is in y as it is in x, and
a token or an expert whose price is further than m from 0 has as many pairs in y as in x. Where all rests are 0, the
same holds with 0 for m.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from usmoe.lp.bounds import Bounds
from usmoe.lp.exchange import Costs, Counts, Exchange
from usmoe.lp.greedy import within
from usmoe.lp.prices import Start, start

_FINEST = -1074
"""Every float64 is a multiple of 2^-1074."""

_STEPS = 9
"""Power of two of the steps by which ties are broken: finer ones take five times as long where all scores are equal."""
_MOST = 2.0**51
"""No price to begin with is larger, in units: whole scores net of it are not rounded."""

Sides = tuple[Counts, Counts]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class Face:
    """The selections of S tokens and E experts that may still be an optimum, and what their scores are."""

    whole: Costs
    """(S, E), whole numbers of units."""
    rest: Costs
    """(S, E): what is left of the scores, half a unit at most."""
    unit: int
    """Its power of two."""
    open: Flags
    """(S, E): the pairs that are not settled."""
    mask: Flags
    """(S, E): a selection; optimal, where pairs are settled."""
    tokens: Sides
    """Floors and caps."""
    experts: Sides
    """Floors and caps."""
    budget: int | None


def optimum(
    scores: Costs, mask: Flags, tokens: Sides, experts: Sides, budget: int | None, begin: Start, exponent: int
) -> Flags:
    """The mask (S, E) of an optimum. Scores in float64; -inf is chosen as rarely as the bounds allow, and else counts
    nothing.

    mask      any selection within the bounds of the tokens and the budget
    begin     near-optimal prices of the experts for scores * 2^-exponent: good ones make the exchanges few

    The work is bounded: each unit is finer than the last by 2^shift, where shift is what `_finer` proves to be left (7
    bits at least for fewer than a million experts, 34 for 64), so that there are 2,100 / shift of them at most, and
    one more for ties; and at each `Exchange` carries one pair of its surplus at each step.
    """
    face, depth = _coarse(scores, mask, tokens, experts, budget)
    with np.errstate(over="ignore"):
        prices = np.ldexp(begin.prices, exponent - face.unit).clip(-_MOST, _MOST)
    if face.whole.any() or face.rest.any():
        face = _solved(face, prices, begin.net)
    for _ in range(depth):
        if not face.open.any():
            return face.mask
        if not face.rest[face.open].any():
            break
        face = _solved(_finer(face), None, None)
    else:
        raise RuntimeError("Units of the scores have become finer without end: a fault of usmoe.lp.")
    return _solved(_by_index(face), np.zeros(scores.shape[1]), None).mask


def dual_prices(scores: Costs, mask: Flags, tokens: Sides, experts: Sides, budget: int | None) -> Costs:
    """Prices of the experts (E) at which an optimum is the best selection, rounded as the scores that matter are."""
    never = np.isneginf(scores)
    scores = np.where(never & mask, scores[~never].min(initial=0), scores)
    with np.errstate(over="ignore"):  # an exchange that costs more than float64 can say is none
        exchange = Exchange(scores, mask, np.zeros(scores.shape[1]), tokens=tokens, experts=experts, budget=budget)
        return exchange.potentials()[0]


def _bits(experts: int) -> int:
    """Below which power of two whole scores must lie, so that no sum along a chain of exchanges, of two scores at each
    of experts + 3 nodes, is rounded, nor what two such sums differ by."""
    return 50 - math.ceil(math.log2(experts + 3))


def _coarse(scores: Costs, mask: Flags, tokens: Sides, experts: Sides, budget: int | None) -> tuple[Face, int]:
    """The program in whole numbers of the unit that its range asks for, and an upper bound of the number of finer ones.

    Where the number of pairs is given only differences matter, and the middle becomes 0; else 0 stays 0. -inf becomes
    so low that no chain, of 2*E pairs at most, would pay for one: those are as rare as the bounds allow.
    """
    size = scores.shape[1]
    never = np.isneginf(scores)
    finite = np.where(never, 0.0, scores)
    known = scores[~never]
    low, high = (known.min(), known.max()) if known.size else (0.0, 0.0)
    middle = 0.0 if budget is None else low / 2 + high / 2
    most = max(high - middle, middle - low)
    if not most:  # all are equal, and so are all selections
        finite, middle = np.zeros_like(scores), 0.0
    depth = 2 * size + 4 if never.any() else 0
    room = _bits(size) - math.ceil(math.log2(depth + 1)) - 1
    unit = max(math.frexp(most)[1] - room, _FINEST)
    steps = np.rint(np.ldexp(finite, -unit))
    whole = steps - np.rint(np.ldexp(middle, -unit))
    whole = np.where(never, -depth * (np.abs(whole[~never]).max(initial=0) + 1), whole)
    face = Face(
        whole=whole,
        rest=finite - np.ldexp(steps, unit),
        unit=unit,
        open=np.ones(scores.shape, dtype=bool),
        mask=mask,
        tokens=tokens,
        experts=experts,
        budget=budget,
    )
    return face, unit - _FINEST + 2


def _finer(face: Face) -> Face:
    """The same program at a finer unit: as fine as the open pairs leave room for."""
    bits = _bits(face.whole.shape[1])
    coarsest = np.abs(face.whole[face.open]).max()
    if coarsest:  # 3 * min(S, E) at most
        unit = face.unit - (bits - 1 - math.ceil(math.log2(coarsest + 1)))
    else:
        unit = math.frexp(np.abs(face.rest[face.open]).max())[1] - bits
    unit = max(unit, _FINEST)
    if unit >= face.unit:
        raise RuntimeError(f"There is no finer unit than 2^{face.unit}: a fault of usmoe.lp.")
    rest = np.where(face.open, face.rest, 0.0)
    steps = np.rint(np.ldexp(rest, -unit))
    whole = np.ldexp(face.whole, face.unit - unit) + steps  # 0 where a pair is settled
    return replace(face, whole=whole, rest=rest - np.ldexp(steps, unit), unit=unit)


def _by_index(face: Face) -> Face:
    """Among optima: each pair counts the less the higher its flat index; as a root does, so that low indices outweigh
    middle ones."""
    size = face.whole.size
    index = np.arange(1, size + 1).reshape(face.whole.shape)
    whole = -np.rint(np.ldexp(np.sqrt(index / size), _STEPS))
    return replace(face, whole=np.where(face.open, whole, 0.0), rest=np.zeros_like(whole))


def _solved(face: Face, prices: Costs | None, net: Costs | None) -> Face:
    """The face with an optimum of its whole numbers, and what that settles.

    prices  to begin with, in units; None: found here, where it is worth while
    net     (S, E): by what to choose first among pairs that are equal in whole numbers; None: no matter what
    """
    rows = np.flatnonzero(face.open.any(1))
    settled = face.mask & ~face.open
    of_token, of_expert = settled[rows].sum(1), settled.sum(0)
    tokens = face.tokens[0][rows] - of_token, face.tokens[1][rows] - of_token
    experts = face.experts[0] - of_expert, face.experts[1] - of_expert
    budget = None if face.budget is None else face.budget - int(settled.sum())
    scores = np.where(face.open, face.whole, -np.inf)[rows]
    net = None if net is None else net[rows]
    if prices is None:
        prices, net = _begun(scores, face.rest[rows], face.unit, tokens, experts, budget)
    prices = np.rint(prices)
    chosen = _best(scores - prices, net, tokens, budget)
    exchange = Exchange(scores, chosen, prices, tokens=tokens, experts=experts, budget=budget)
    mask = face.mask.copy()
    mask[rows] = (mask & ~face.open)[rows] | exchange.run()
    return _narrowed(replace(face, mask=mask), rows, *exchange.potentials())


def _begun(
    scores: Costs, rest: Costs, unit: int, tokens: Sides, experts: Sides, budget: int | None
) -> tuple[Costs, Costs | None]:
    """Prices to begin with, and by what to choose among equals: none, where so few pairs are open that exchanges alone
    take less time."""
    size = scores.shape[1]
    if np.isfinite(scores).sum() <= 8 * size:
        return np.zeros(size), None
    exponent = _bits(size)
    values = np.ldexp(scores + np.ldexp(rest, -unit), -exponent)
    begin = start(torch.from_numpy(values)[None], _bounds(tokens, experts, budget))[0]
    return np.ldexp(begin.prices, exponent), begin.net


def _bounds(tokens: Sides, experts: Sides, budget: int | None) -> Bounds:
    """The bounds as those of a batch of one."""
    token_low, token_high, low, high = (torch.from_numpy(side)[None] for side in (*tokens, *experts))
    total = None if budget is None else torch.tensor([budget])
    return Bounds(tokens=(token_low, token_high), experts=(low, high), budget=total)


def _best(scores: Costs, net: Costs | None, tokens: Sides, budget: int | None) -> Flags:
    """The best pairs within the bounds of the tokens; of equal ones those of the highest net, where it is given."""
    if net is not None:
        scores = _ranks(scores, net, budget is None)
    floors, caps = (torch.from_numpy(side)[None] for side in tokens)
    total = None if budget is None else torch.tensor([budget])
    return within(torch.from_numpy(scores)[None], floors, caps, total, -1)[0].numpy()


def _ranks(scores: Costs, net: Costs, signed: bool) -> Costs:
    """Whole numbers in the order of the scores, and of net where these are equal; above 0 (signed) where the scores
    are, or where they are 0 and net is above it."""
    first, second = scores.ravel(), net.ravel()
    order = np.lexsort((second, first))
    first, second = first[order], second[order]
    rises = (first[1:] > first[:-1]) | (second[1:] > second[:-1])
    rank = np.concatenate([[0], rises.cumsum()]).astype(np.float64)
    if signed:
        below = (first < 0) | ((first == 0) & (second <= 0))
        rank -= rank[below].max(initial=-1)
    placed = np.empty_like(rank)
    placed[order] = np.where(np.isneginf(first), -np.inf, rank)
    return placed.reshape(scores.shape)


def _narrowed(face: Face, rows: Counts, price: Costs, level: float) -> Face:
    """The face of what can still be an optimum, by the prices of the experts and the level of the budget. A price is
    subtracted from the scores where it settles the number of pairs, so that what is left is small."""
    margin = min(len(rows), int(face.open.any(0).sum())) if face.rest[face.open].any() else 0
    net = face.whole[rows] - price - level
    of_token = np.zeros(len(face.mask))
    of_token[rows] = _token_prices(face, rows, np.where(face.open[rows], net, np.nan), price, margin + 1)
    still = face.open[rows] & (np.abs(net - of_token[rows, None]) <= margin)

    opened, whole = np.zeros_like(face.open), np.zeros_like(face.whole)
    opened[rows] = still
    settled = face.mask & ~opened

    def fixed(sides: Sides, prices: Costs, number: Counts, axis: int) -> tuple[Sides, Costs]:
        """The bounds, no wider than what is open, and met where a price says so; and the prices where they are met."""
        far, least = np.abs(prices) > margin, settled.sum(axis)
        low = np.where(far, number, np.maximum(sides[0], least))
        high = np.where(far, number, np.minimum(sides[1], least + opened.sum(axis)))
        return (low, high), np.where(low == high, prices, 0.0)

    tokens, from_token = fixed(face.tokens, of_token, face.mask.sum(1), 1)
    experts, from_expert = fixed(face.experts, price, face.mask.sum(0), 0)
    whole[rows] = np.where(still, face.whole[rows] - level - from_expert - from_token[rows, None], 0.0)
    return replace(face, whole=whole, open=opened, tokens=tokens, experts=experts)


def _token_prices(face: Face, rows: Counts, net: Costs, price: Costs, far: float) -> Costs:
    """Prices of the tokens that prove the selection optimal, beside those of the experts: no held pair scores below its
    token's price, net of the expert's, and no other above it; above 0 at a cap alone, below 0 at a floor alone. Of the
    prices that will do, the middle, or `far` from the score where one side is open, so that most pairs are settled.

    net (S', E) is NaN where a pair is settled. Raises RuntimeError where there are none: whole numbers either prove the
    selection, or do not.
    """
    (least, most), held = face.tokens, face.mask[rows]
    count, load = face.mask.sum(1), face.mask.sum(0)
    highest = np.where(held & ~np.isnan(net), net, np.inf).min(1, initial=np.inf)
    lowest = np.where(held | np.isnan(net), -np.inf, net).max(1, initial=-np.inf)
    lowest = np.where(count[rows] > least[rows], lowest.clip(min=0), lowest)
    highest = np.where(count[rows] < most[rows], highest.clip(max=0), highest)
    bounds = ((count, face.tokens), (load, face.experts))
    kept = all(((low <= number) & (number <= high)).all() for number, (low, high) in bounds)
    paid = np.where(price > 0, load == face.experts[1], (price == 0) | (load == face.experts[0]))
    spent = face.budget is None or load.sum() == face.budget
    if not (kept and spent and paid.all() and (lowest <= highest).all()):
        raise RuntimeError("The exchanges have ended short of an optimum: a fault of usmoe.lp.")
    low = np.where(np.isneginf(lowest), highest - far, lowest)
    high = np.where(np.isposinf(highest), lowest + far, highest)
    return np.where(np.isneginf(lowest), low, np.where(np.isposinf(highest), high, np.floor((low + high) / 2)))
