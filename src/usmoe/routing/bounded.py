"""Bounded choice: the best pairs of a pool with a floor and a cap for every token and every expert."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from usmoe.lp.bounds import Bounds
from usmoe.lp.greedy import midway
from usmoe.lp.optimum import best_pairs, edges
from usmoe.routing.host import ROUTE, Host
from usmoe.routing.pools import Pools, pools
from usmoe.routing.router import Segments, competing, experts_per_token, is_number, refuse_state
from usmoe.routing.select import budget, cut_above_floors, whole
from usmoe.routing.unified_score import UnifiedScore
from usmoe.types import Promises, Routing


@dataclass(frozen=True, kw_only=True)
class BoundedChoice(UnifiedScore):
    """The best floor(k*S + 0.5) pairs of a pool of S tokens, where every token gets `per_token` experts and every
    expert `per_expert` of its even share: the linear program of arXiv 2503.22996, Proposition 3.1, with all of its
    constraints.

    No token is dropped where its floor is 1, and no expert is loaded beyond its cap. Token choice is
    per_token=(k, k), per_expert=None; expert choice is per_token=None, per_expert=(1, 1), where k*S/E is whole; USMoE
    is both None. It looks ahead: in a pool, every token competes with all others.

    -inf is never chosen: a floor, a cap or a budget that cannot be met without is missed by what is lacking. Ties: the
    lower flat index wins; where both sides have bounds, of equal optima one of low flat indices.
    """

    name: ClassVar[str] = "bounded_choice"
    per_token: tuple[float, float] | None = (1, 4)
    """Floor and cap of the experts of a token, whole numbers with floor <= k <= cap; None: no bounds."""
    per_expert: tuple[float, float] | None = (0, 1.25)
    """Floor and cap of the tokens of an expert, as multiples lo <= 1 <= hi of its even share k*S/E: it gets
    floor(lo*k*S/E) to ceil(hi*k*S/E) of them; None: no bounds."""
    pool: Literal["sequence", "batch", "time_step", "token"] = "sequence"
    """Who competes, and over which tokens an expert's share is counted."""

    def __post_init__(self) -> None:
        for field in ("per_token", "per_expert"):
            given: Any = getattr(self, field)
            if isinstance(given, list):
                object.__setattr__(self, field, tuple(given))
            self._check_pair(field)
        self._check()
        if self.per_token is not None and not all(isinstance(bound, int) for bound in self.per_token):
            raise ValueError(f"per_token={self.per_token} counts experts. Give whole numbers, such as (1, 4).")
        if self.per_expert is not None and not self.per_expert[0] <= 1 <= self.per_expert[1]:
            raise ValueError(
                f"per_expert={self.per_expert} are multiples of an expert's even share. Choose lo <= 1 <= hi, so that "
                "any number of tokens can be routed."
            )
        self._refuse_score_of_a_pool(self.pool, without=("token",))
        if isinstance(self.k, int | float):
            self._refuse_k_outside(self.k)

    def _check_pair(self, field: str) -> None:
        pair: Any = getattr(self, field)
        if pair is None:
            return
        if not isinstance(pair, tuple) or len(pair) != 2 or not all(is_number(b) and b == b and b >= 0 for b in pair):
            raise ValueError(
                f"{field}={pair!r} is no pair of bounds. Give (floor, cap), numbers of 0 or more, or None."
            )
        if pair[0] > pair[1] or pair[0] == math.inf:
            raise ValueError(f"{field}={pair} has a floor above its cap. Swap them.")

    def _refuse_k_outside(self, k: float) -> None:
        if self.pool == "token":
            whole(k, "pool=token")
        if self.per_token is not None and not self.per_token[0] <= k <= self.per_token[1]:
            raise ValueError(
                f"k={k:g} experts per token lie outside of per_token={self.per_token}. Choose per_token=(lo, hi) with "
                "lo <= k <= hi."
            )

    @property
    def promises(self) -> Promises:
        return Promises(
            causal=self.pool in ("token", "time_step"),
            batch_independent=self.pool in ("token", "sequence"),
            padding_independent=self.pool != "time_step",  # where padding stands decides which tokens meet
            streamable=self.pool in ("token", "time_step"),
            budget="exact",
        )

    def __call__(
        self,
        logits: Float[Tensor, "B L E"],
        valid: Bool[Tensor, "B L"] | None = None,
        *,
        segments: Segments = None,
        state: Any = None,
        host: Host = ROUTE,
    ) -> Routing:
        refuse_state(state, self)
        batch, length, experts = logits.shape
        k = experts_per_token(self.k, host, experts)
        self._refuse_k_outside(k)
        flat, competes = competing(logits, valid)
        group = pools(self.pool, batch, length, competes, segments)
        scores, ranked = self.unified_scores(flat, group, host)
        mask, cut = self._select(ranked.detach(), ranked > -torch.inf, group, k)
        weights = self.weights(scores, mask, host)
        return Routing.from_dense(weights, mask, cut=cut, valid=valid, sequences=batch)

    def _select(self, ranked: Tensor, finite: Tensor, group: Pools, k: float) -> tuple[Tensor, Tensor]:
        """Mask (T, E), and the cut of each pool and expert (G, E). Pools of one size are solved together."""
        mask = torch.zeros_like(finite)
        cut = ranked.new_full((len(group.rows), ranked.shape[1]), torch.inf)
        sizes = group.present.sum(1)
        for size in sizes[sizes > 0].unique().tolist():
            pool = (sizes == size).nonzero().squeeze(1)
            tokens = group.rows[pool][group.present[pool]].view(len(pool), size)
            able = finite[tokens]
            scores = ranked[tokens].double().masked_fill(~able, -torch.inf)
            bounds = self._bounds(able, k)
            chosen, prices, _ = best_pairs(scores, bounds)
            mask[tokens.flatten()] = (chosen & able).flatten(0, 1)
            cut[pool] = _cut(scores, chosen, prices, bounds).to(cut.dtype)
        return mask, cut

    def _bounds(self, able: Bool[Tensor, "G S E"], k: float) -> Bounds:
        """Counts for pools of S tokens; floors no higher than what is finite."""
        rows, size, experts = able.shape
        tokens = torch.full((rows,), size, device=able.device)
        total = budget(k, tokens).minimum(able.sum((1, 2)))
        low, high = (0, experts) if self.per_token is None else self.per_token
        share = k * size / experts
        least, most = (0.0, math.inf) if self.per_expert is None else self.per_expert
        grain = 1e-9  # a product that is whole on paper may be a rounding above or below it
        of_expert = (
            math.floor(least * share + grain),
            size if most == math.inf else min(size, math.ceil(most * share - grain)),
        )

        def everywhere(bound: float, width: int) -> Int[Tensor, "G W"]:
            return torch.full((rows, width), int(bound), device=able.device)

        return Bounds(
            tokens=(everywhere(low, size).minimum(able.sum(2)), everywhere(min(high, experts), size)),
            experts=(everywhere(of_expert[0], experts).minimum(able.sum(1)), everywhere(of_expert[1], experts)),
            budget=total,
        )


def _cut(scores: Tensor, chosen: Tensor, prices: Tensor, bounds: Bounds) -> Float[Tensor, "G E"]:
    """The threshold of each expert that would spend the budget without caps of the tokens: its price, above one level
    for all. Beside the pairs that the tokens' floors ask for, as many score above it, net of prices, as the budget
    leaves.

    Where an expert is held by its floor or its cap, its price may be anything between two of its scores: the middle.
    """
    net, finite = scores - prices[:, None], scores > -torch.inf
    assert bounds.budget is not None
    level, optional = cut_above_floors(net, finite, bounds.tokens[0], bounds.budget)
    out_of_reach = net.masked_fill(~optional, -torch.inf).amax((1, 2))
    level = torch.where(level < torch.inf, level, out_of_reach)[:, None] + prices

    last, first_out, held = edges(scores, chosen, bounds)
    middle = midway(last, first_out.minimum(last))
    return torch.where(held & middle.isfinite(), middle, level)
