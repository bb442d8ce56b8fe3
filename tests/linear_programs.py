"""Linear programs to try `usmoe.lp.solve` on, and two oracles that know their optimum: all masks, and HiGHS.

    Program           scores (T, E), budget, per_token, per_expert: the arguments of solve()
    by_brute_force    the optimum and its first mask, from all 2^(T*E) masks (T*E <= 12)
    by_highs          the optimum, from scipy's solver of linear programs
    ADVERSARIAL       name -> (T, E, seed) -> Program: each feasible, each hard in its own way (T >= 8, E >= 2)
    feasible, wild    the programs that hypothesis draws

The constraints are those of a flow network (each pair counts once among its token's, its expert's and all pairs), so
that the vertices of the linear program are masks and its optimum is the optimum over masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from scipy import sparse
from scipy.optimize import linprog
from torch import Tensor

Bound = int | Tensor | None
Bounds = tuple[Bound, Bound] | None


class Program(NamedTuple):
    """What solve() is asked. A bound of None does not bind."""

    scores: Tensor
    budget: int | None = None
    per_token: Bounds = None
    per_expert: Bounds = None

    def limits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Least and most pairs of each token (T,), (T,), and of each expert (E,), (E,)."""
        T, E = self.scores.shape
        (a, b), (c, d) = self.per_token or (None, None), self.per_expert or (None, None)
        return _each(a, T, 0), _each(b, T, E), _each(c, E, 0), _each(d, E, T)

    def allow(self, masks: Tensor) -> Tensor:
        """Whether masks (..., T, E) keep the budget and all bounds, and leave -inf alone: (...)."""
        of_token, of_expert, pairs = masks.sum(-1), masks.sum(-2), masks.sum((-2, -1))
        lo, hi, least, most = (torch.from_numpy(limit) for limit in self.limits())
        within = ((lo <= of_token) & (of_token <= hi)).all(-1) & ((least <= of_expert) & (of_expert <= most)).all(-1)
        spent = pairs == (pairs if self.budget is None else self.budget)
        return within & spent & ~(masks & ~self.scores.isfinite()).any((-2, -1))

    @property
    def live(self) -> Tensor:
        """The scores that may be chosen, in float64."""
        return self.scores.detach()[self.scores.isfinite()].double()

    def spread(self) -> float:
        """The largest score less the smallest, -inf left out."""
        return float(self.live.max() - self.live.min()) if self.live.numel() else 0.0

    def rounding(self) -> float:
        """How far two honest computations of the optimum may be apart, HiGHS's tolerance (1e-10) included."""
        pairs = self.live.numel() if self.budget is None else self.budget
        scale = self.spread() if self.budget is not None else float(self.live.abs().max()) if self.live.numel() else 0.0
        return 1e-9 * pairs * scale + 1e-14 * float(self.live.abs().sum())


def _each(bound: Bound, size: int, default: int) -> np.ndarray:
    return torch.as_tensor(default if bound is None else bound).expand(size).numpy()


def total(scores: Tensor, mask: Tensor) -> float:
    """The sum of the chosen scores, rounded once."""
    return math.fsum(scores[mask].double().tolist())


# ---- oracles


def by_brute_force(scores: Tensor, *limits: Any, **named: Any) -> tuple[float, Tensor] | None:
    """The optimum of Program(...) and its first mask (T, E), or None where nothing is feasible.

    First: of equally good masks one with the fewest pairs (a score of 0 is not taken for nothing); of two such, the one
    that holds the lowest flat index at which they differ.
    """
    program, pairs = Program(scores, *limits, **named), scores.numel()
    words = np.arange(2**pairs)[::-1, None] >> np.arange(pairs)[::-1] & 1  # the first index is the leading bit
    masks = torch.from_numpy(words).bool().view(-1, *scores.shape)
    allowed = list(masks[program.allow(masks)])
    if not allowed:
        return None
    best = max(allowed, key=lambda mask: (total(scores, mask), -int(mask.sum())))  # of equals, max takes the first
    return total(scores, best), best


def by_highs(scores: Tensor, *limits: Any, **named: Any) -> float | None:
    """The optimum of Program(...), or None where nothing is feasible.

    HiGHS measures in absolute units, so the scores are scaled (and shifted, where the number of pairs is given).
    """
    program = Program(scores, *limits, **named)
    (T, E), budget = scores.shape, program.budget
    lo, hi, least, most = program.limits()
    S = scores.double().numpy().ravel()
    live = np.isfinite(S)
    best = S[live].max(initial=-np.inf) if budget is not None else 0.0
    cost = np.subtract(best, S, out=np.zeros(S.shape), where=live)
    count = sparse.vstack([sparse.kron(sparse.eye(T), np.ones((1, E))), sparse.kron(np.ones((1, T)), sparse.eye(E))])
    answer = linprog(
        cost / (np.abs(cost).max() or 1.0),
        A_ub=sparse.vstack([count, -count]).tocsr(),
        b_ub=np.concatenate([hi, most, -lo, -least]),
        A_eq=None if budget is None else sparse.csr_matrix(np.ones((1, T * E))),
        b_eq=None if budget is None else [budget],
        bounds=np.stack([np.zeros(T * E), live], 1),
        method="highs",
        options={"dual_feasibility_tolerance": 1e-10},
    )
    if answer.status == 2:
        return None
    assert answer.status == 0, answer.message
    mask = torch.from_numpy(answer.x.round().astype(bool)).view(T, E)
    assert program.allow(mask), f"HiGHS left the vertices by {abs(answer.x - answer.x.round()).max()}"
    return total(scores, mask)


# ---- programs


def normal(random: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def uniform(random: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=random, dtype=torch.float64)


def whole(random: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    """Whole numbers, low <= x < high."""
    return torch.randint(low, high, shape, generator=random)


def plant(random: torch.Generator, scores: Tensor, slack: int) -> tuple[Tensor, Program]:
    """A random mask (T, E), and a program that it solves feasibly: its count is the budget, and the bounds of each
    token and expert lie at most `slack` below and above what it holds there. The counts differ widely."""
    T, E = scores.shape
    mask = uniform(random, T, E) < 1.6 * uniform(random, T, 1) * uniform(random, E)

    def around(count: Tensor, most: int) -> tuple[Tensor, Tensor]:
        below, above = (whole(random, 0, slack + 1, len(count)) for _ in range(2))
        return (count - below).clamp(min=0), (count + above).clamp(max=most)

    return mask, Program(scores, int(mask.sum()), around(mask.sum(1), E), around(mask.sum(0), T))


def routed(scores: Tensor, k: int = 2, least: float = 0.5, most: float = 1.25) -> Program:
    """Bounds as a router asks for them: k*T pairs, 1 to 4 a token, `least` to `most` times its fair share an expert."""
    T, E = scores.shape
    share = k * T / E
    return Program(scores, k * T, (1, 4), (math.floor(least * share), math.ceil(most * share)))


def even(pairs: int, parts: int) -> Tensor:
    """The pairs dealt to so many parts, which differ by one at most."""
    return pairs // parts + (torch.arange(parts) < pairs % parts)


def favour(T: int, E: int, tokens: Any, experts: Any, by: float) -> Tensor:
    """Zeros (T, E), but for some tokens at some experts."""
    bonus = torch.zeros(T, E, dtype=torch.float64)
    bonus[tokens, experts] = by
    return bonus


def ramp(size: int) -> Tensor:
    return torch.linspace(0, 1, size, dtype=torch.float64)


def blocks(T: int, E: int, random: torch.Generator) -> Tensor:
    """Half of the tokens love the first quarter of the experts, the others the next: most pairs must lie elsewhere."""
    half, quarter = torch.arange(T) * 2 // T, torch.arange(E) * 4 // E
    return 3.0 * (half[:, None] == quarter) + 0.1 * normal(random, T, E)


ALL = slice(None)
SCORES: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "all equal": lambda T, E, random: torch.ones(T, E, dtype=torch.float64),
    "same rows": lambda T, E, random: normal(random, E).repeat(T, 1),
    "same columns": lambda T, E, random: normal(random, T, 1).repeat(1, E),
    "0, 1 or 2": lambda T, E, random: whole(random, 0, 3, T, E).double(),
    "signs": lambda T, E, random: 2.0 * whole(random, 0, 2, T, E).double() - 1,
    "one dominant expert": lambda T, E, random: normal(random, T, E) + favour(T, E, ALL, 0, 10.0),
    "huge": lambda T, E, random: 1e8 * normal(random, T, E),
    "tiny": lambda T, E, random: 1e-9 * normal(random, T, E),
    "token offsets": lambda T, E, random: normal(random, T, E) + 1e4 * normal(random, T, 1),
    "expert offsets": lambda T, E, random: normal(random, T, E) + 30 * normal(random, E),
    "negative": lambda T, E, random: -1 - uniform(random, T, E),
    "heavy tails": lambda T, E, random: normal(random, T, E) / normal(random, T, E),
    "low rank": lambda T, E, random: normal(random, T, 2) @ normal(random, 2, E),
    "products": lambda T, E, random: normal(random, T, 1) * normal(random, E),
    "places on a line": lambda T, E, random: -(ramp(T)[:, None] - ramp(E) ** 3).abs(),
    "an outlier": lambda T, E, random: normal(random, T, E) + favour(T, E, T // 2, E // 2, 1e9),
    "dull tokens": lambda T, E, random: normal(random, T, E) - favour(T, E, torch.arange(T) % 4 > 0, ALL, 8.0),
    "eight kinds": lambda T, E, random: normal(random, 8, E)[torch.arange(T) % 8],
    "near ties": lambda T, E, random: 1 + 1e-12 * whole(random, 0, 100, T, E).double(),
    "blocks": blocks,
}
"""(T, E, random) -> scores (T, E), to be routed with floors and caps on both sides."""


def caps_meet_the_budget(T: int, E: int, random: torch.Generator) -> Program:
    scores, budget, (_, caps), (_, most) = plant(random, normal(random, T, E), slack=0)[1]
    return Program(scores, budget, (None, caps), (None, most))


def mostly_forbidden(T: int, E: int, random: torch.Generator) -> Program:
    mask, program = plant(random, normal(random, T, E), slack=1)
    live = mask | (uniform(random, T, E) < 0.1)
    return program._replace(scores=program.scores.masked_fill(~live, -torch.inf))


def balanced(T: int, E: int, random: torch.Generator) -> Program:
    each = max(2 * T // E, 1)
    return Program(normal(random, T, E), each * E, (0, 4), (each, each))


PROGRAMS: dict[str, Callable[[int, int, torch.Generator], Program]] = {
    "default": lambda T, E, random: routed(normal(random, T, E).softmax(1), least=0),
    "bfloat16": lambda T, E, random: routed(normal(random, T, E).softmax(1).bfloat16().double(), least=0),
    "two for all": lambda T, E, random: routed(normal(random, T, E) + favour(T, E, ALL, slice(2), 10.0), most=1),
    "balanced": balanced,
    "regular": lambda T, E, random: Program(normal(random, T, E), 2 * T, (2, 2), (even(2 * T, E), even(2 * T, E))),
    "caps meet the budget": caps_meet_the_budget,
    "wide bounds": lambda T, E, random: plant(random, normal(random, T, E), slack=2)[1],
    "no budget": lambda T, E, random: plant(random, normal(random, T, E), slack=2)[1]._replace(budget=None),
    "mostly forbidden": mostly_forbidden,
    "assignment": lambda T, E, random: Program(uniform(random, E, E), E, (1, 1), (1, 1)),  # of E tokens
    "nothing": lambda T, E, random: Program(normal(random, T, E), 0, (0, 4), (0, T)),
    "everything": lambda T, E, random: Program(normal(random, T, E), T * E, (1, E), (0, T)),
}


def _seeded(make: Callable[[int, int, torch.Generator], Any]) -> Callable[[int, int, int], Program]:
    def program(T: int, E: int, seed: int = 0) -> Program:
        made = make(T, E, torch.Generator().manual_seed(seed))
        return made if isinstance(made, Program) else routed(made)

    return program


ADVERSARIAL = {name: _seeded(make) for name, make in (SCORES | PROGRAMS).items()}
"""name -> (T, E, seed) -> a feasible program."""


@st.composite
def feasible(draw: Any, shape: Any, both: tuple[bool, ...] = (False, True), ties: bool = True) -> Program:
    """A program around a planted mask, with or without a budget, with bounds on both sides, on one or on none, as
    tensors, as whole numbers, or open on one end; with scores -1, 0, 1, 2 (`ties`), normal or far from 0, and -inf."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    T, E = draw(shape)
    scores = whole(random, -1, 3, T, E).double() if ties and draw(st.booleans()) else normal(random, T, E)
    mask, (scores, budget, *sides) = plant(random, scores + draw(st.sampled_from([0, 9, -9])), draw(st.integers(0, 3)))
    live = mask | (uniform(random, T, E) < draw(st.sampled_from([1.0, 0.4])))

    def bounds(lo: Tensor, hi: Tensor) -> Any:
        return draw(st.sampled_from([(lo, hi), (int(lo.min()), int(hi.max())), (lo, None), (None, hi)]))

    per_token, per_expert = bounds(*sides[0]), bounds(*sides[1])
    if not draw(st.sampled_from(both)):
        free = draw(st.sampled_from(["tokens", "experts", "both"]))
        per_token, per_expert = per_token if free == "experts" else None, per_expert if free == "tokens" else None
    scores = scores.masked_fill(~live, -torch.inf)
    return Program(scores, draw(st.sampled_from([budget, None])), per_token, per_expert)


@st.composite
def wild(draw: Any) -> Program:
    """Any bounds with lo <= hi, any budget, some scores of -inf: feasible about half of the time."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    T, E = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    scores = normal(random, T, E)
    if draw(st.booleans()):
        scores = scores.masked_fill(uniform(random, T, E) < 0.2, -torch.inf)

    def bounds(size: int, most: int) -> Any:
        lo = (whole(random, 0, most + 1, size) - draw(st.integers(0, most))).clamp(min=0)
        return draw(st.sampled_from([None, (lo, None), (lo, lo + whole(random, 0, most, size))]))

    return Program(scores, draw(st.none() | st.integers(0, T * E)), bounds(T, E), bounds(E, T))
