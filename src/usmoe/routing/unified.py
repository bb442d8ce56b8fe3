"""USMoE: the best (token, expert) pairs of a pool, with no quota for a token or an expert."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from usmoe.lp.greedy import top
from usmoe.routing.host import ROUTE, Host
from usmoe.routing.pools import Pools, pools
from usmoe.routing.prefix import cut_of, merged, prefix
from usmoe.routing.router import Segments, competing, experts_per_token, is_number, refuse_state
from usmoe.routing.select import budget, own_order, whole
from usmoe.routing.streaming import Runs, Stream, check_state, runs, spend
from usmoe.routing.threshold import as_values, check_threshold, thresholds
from usmoe.routing.unified_score import UnifiedScore
from usmoe.types import Promises, Routing

_CAUSAL = ("token", "threshold", "prefix")


@dataclass(frozen=True, kw_only=True)
class USMoE(UnifiedScore):
    """The best floor(k*S + 0.5) (token, expert) pairs of a pool of S tokens, by a unified score
    (arXiv 2503.22996, Proposition 3.1, Definition 3.2, Algorithm 1).

    There is no quota for a token or an expert, so k may be fractional, a token may get several experts or none, and
    alpha = 0 is not token choice.

    Ties: the lower flat index (token, then expert) wins. A pool with too few finite pairs takes fewer.

    Without `burst`, a higher k chooses all pairs that a lower one chooses, and more.

    pool="prefix" and `burst` remember: `routing.state` of a chunk is `state` of the next, and any split of a sequence
    into chunks gives the same pairs. The state is exact, not a sketch: three integers a sequence for a bucket; for
    prefix also the scores of all pairs so far, up to t*E floats a sequence after t tokens (see `Stream`).
    """

    name: ClassVar[str] = "usmoe"
    pool: Literal["sequence", "batch", "time_step", "token", "threshold", "prefix"] = "sequence"
    """Who competes: the tokens of a sequence, of the batch, at one position of all sequences, a token with itself
    alone (k whole), or nobody: threshold takes every pair whose score reaches a given value. prefix: each token with
    those before it; it takes those of its pairs that are among the floor(k*t + 0.5) best of tokens 1 to t."""
    threshold: float | tuple[float, ...] | None = None
    """The value for pool="threshold": one for all pairs, or E of them, one an expert."""
    burst: float | None = None
    """Of the causal pools (token, threshold, prefix): a token bucket, pairs. After t real tokens of a segment at most
    k*t + burst pairs are used; where it is short, a token loses its lowest scores first. None: no bucket."""
    min_experts: int = 0
    """Of the causal pools: every token gets that many experts at least, whatever its scores (min_experts <= k)."""
    mask_padding: bool = True
    """False: padding competes and adds to the budget, as in the released code."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", as_values(self.threshold))
        self._check()
        if not isinstance(self.mask_padding, bool):
            raise ValueError(f"mask_padding={self.mask_padding!r} is neither True nor False. Choose one of them.")
        if self.pool == "token" and isinstance(self.k, int | float):
            whole(self.k, "pool=token")
        self._refuse_score_of_a_pool(self.pool, without=_CAUSAL)
        check_threshold(self.threshold, self.pool)
        self._check_bucket()

    def _check_bucket(self) -> None:
        for name, idle in (("burst", None), ("min_experts", 0)):
            if getattr(self, name) != idle and self.pool not in _CAUSAL:
                raise ValueError(
                    f"{name}={getattr(self, name)} has no meaning with pool={self.pool}, whose tokens are all served "
                    f"at once. Choose pool={', '.join(_CAUSAL[:-1])} or {_CAUSAL[-1]}, or leave it out."
                )
        if self.burst is not None and not (is_number(self.burst) and 0 <= self.burst < math.inf):
            raise ValueError(f"burst={self.burst!r} is no size of a bucket. Give a number of pairs, 0 or more.")
        if not isinstance(self.min_experts, int) or isinstance(self.min_experts, bool) or self.min_experts < 0:
            raise ValueError(f"min_experts={self.min_experts!r} is no number of experts. Give a whole one, 0 or more.")
        if isinstance(self.k, int | float):
            self._refuse_floor_above(self.k)

    def _refuse_floor_above(self, most: float) -> None:
        if self.min_experts > most:
            raise ValueError(
                f"min_experts={self.min_experts} is more than the {most:g} experts per token that there are to spend. "
                "Choose min_experts <= k."
            )

    @property
    def promises(self) -> Promises:
        causal = self.pool in _CAUSAL
        alone = self.pool in ("token", "threshold") and self.burst is None
        return Promises(
            causal=causal or self.pool == "time_step",
            batch_independent=causal or self.pool == "sequence",
            # at a time step, where the padding stands decides which tokens meet
            padding_independent=alone or (self.mask_padding and self.pool != "time_step"),
            streamable=causal or self.pool == "time_step",
            budget=self._budget(),
        )

    @property
    def remembers(self) -> bool:
        """Whether the router has a state to hand on from chunk to chunk."""
        return self.pool == "prefix" or self.burst is not None

    def _budget(self) -> Literal["exact", "expected", "capped", "none"]:
        if self.pool not in ("threshold", "prefix"):
            return "exact"
        if self.burst is not None:
            return "capped"
        # the prefix pool does not take the floor's pairs from the others; a calibrated threshold does
        return "none" if self.pool == "prefix" and self.min_experts else "expected"

    def __call__(
        self,
        logits: Float[Tensor, "B L E"],
        valid: Bool[Tensor, "B L"] | None = None,
        *,
        segments: Segments = None,
        state: Any = None,
        host: Host = ROUTE,
    ) -> Routing:
        batch, length, experts = logits.shape
        if self.min_experts:
            known = self.k is not None or host.k is not None  # a threshold alone needs no k
            self._refuse_floor_above(experts_per_token(self.k, host, experts) if known else experts)
        flat, competes = competing(logits, valid, self.mask_padding)
        group = pools("token" if self.pool in _CAUSAL else self.pool, batch, length, competes, segments)
        scores, ranked = self.unified_scores(flat, group, host)
        eligible = (ranked > -torch.inf) & competes.reshape(-1, 1)
        if self.remembers:
            check_state(state, self, batch, experts, self.pool == "prefix")
            if state is None:
                state = Stream.begin(batch, experts, ranked.device, ranked.dtype if self.pool == "prefix" else None)
            state = state.like(ranked)
            run = runs(competes, segments, state)
            mask, cut, used, remembered = self._stream(ranked, eligible, group, run, host)
            state = run.after(state, used, remembered)
        else:
            refuse_state(state, self)
            mask, cut = self._choose(ranked, eligible, group, host)
        weights = self.weights(scores, mask, host)
        return Routing.from_dense(weights, mask, cut=cut, state=state, valid=valid, sequences=batch)

    def _choose(self, ranked: Tensor, eligible: Tensor, group: Pools, host: Host) -> tuple[Tensor, Tensor]:
        """Mask (T, E) and cut of the pools that need no memory."""
        if self.pool == "threshold":
            cut = thresholds(self.threshold, self, ranked)
            mask = (ranked >= cut) & eligible
        else:
            k = experts_per_token(self.k, host, ranked.shape[-1])
            if self.pool == "token":
                k = whole(k, "pool=token")
            chosen, cut = top(
                group.gather(ranked).flatten(1),
                (group.gather(eligible) & group.present.unsqueeze(-1)).flatten(1),
                budget(k, group.present.sum(1)),
            )
            mask = group.scatter(chosen.unflatten(1, (-1, ranked.shape[-1])), len(ranked))
        if self.min_experts:
            mask = mask | (own_order(self._preference(ranked), eligible)[1] < self.min_experts) & eligible
        return mask, cut

    def _preference(self, ranked: Tensor) -> Tensor:
        """By what a token prefers its pairs: the score; with a threshold an expert, what it has beyond that."""
        if not isinstance(self.threshold, tuple):
            return ranked
        return ranked - thresholds(self.threshold, self, ranked).clamp(-1e30, 1e30)

    def _stream(
        self, ranked: Tensor, eligible: Tensor, group: Pools, run: Runs, host: Host
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Mask (T, E) and cut of the routers that remember, and what they will remember: pairs used, scores."""
        k = experts_per_token(self.k, host, ranked.shape[-1])
        scores = run.group.gather(self._preference(ranked.detach()))
        able = run.group.gather(eligible) & run.group.present.unsqueeze(-1)
        (ordered, own), place, remembered = own_order(scores, able), run.place, None
        if run.before.scores is not None:
            count = prefix(ordered, budget(k, place), run.before.scores)
            remembered = merged(run.before.scores, ordered.flatten(1))
            cut = cut_of(remembered, budget(k, place.amax(1) if place.shape[1] else run.before.tokens))
        else:
            mask, cut = self._choose(ranked, eligible, group, host)
            count = (run.group.gather(mask) & able).sum(-1)
        count = count.maximum(able.sum(-1).clamp(max=self.min_experts))
        if self.burst is not None:
            count = spend(count, place, run.before.used, k, self.burst)
        mask = run.group.scatter(able & (own < count.unsqueeze(-1)), len(ranked))
        return mask, cut, run.before.used + count.sum(1), remembered
