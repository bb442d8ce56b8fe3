"""Expert choice: every expert takes its best tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from usmoe.routing.host import ROUTE, Host
from usmoe.routing.pools import pools
from usmoe.routing.router import Experts, Router, Segments, competing, experts_per_token, refuse_state
from usmoe.routing.scores import EXPERT_CHOICE_SCORES
from usmoe.routing.select import capacity, per_expert
from usmoe.routing.threshold import as_values, check_threshold, thresholds
from usmoe.types import Promises, Routing


@dataclass(frozen=True, kw_only=True)
class ExpertChoice(Router):
    """Every expert takes its best tokens (Zhou et al. 2022, arXiv 2202.09368).

    Each takes max(1, floor(k*S/E + 0.5)) of the S real tokens of a pool: balanced by construction, while a token may
    be dropped. The whole exceeds floor(k*S + 0.5) pairs where k*S/E is rounded up: most of all where k*S < E, since
    each expert takes at least one token. That is why no budget is promised.

    Ties: the lower token wins. An empty pool gives nothing.
    """

    name: ClassVar[str] = "expert_choice"
    k: Experts = None
    """Experts a token, on average."""
    score: Literal["sigmoid", "softmax_tokens", "softmax_experts"] = "sigmoid"
    """sigmoid (the paper) | softmax_tokens (which lets later tokens move every earlier weight) | softmax_experts
    (the token's own softmax, as in Zhou et al.)."""
    pool: Literal["sequence", "batch", "threshold"] = "sequence"
    """Among which tokens an expert chooses. threshold: no pool, one threshold an expert (arXiv 2603.11535)."""
    threshold: tuple[float, ...] | None = None
    """E values for pool="threshold": an expert takes every token whose score reaches its own."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", as_values(self.threshold))
        self._check()
        if self.pool == "threshold" and self.score == "softmax_tokens":
            raise ValueError(
                "score=softmax_tokens needs a pool of tokens, and pool=threshold has none. "
                "Choose score=sigmoid or softmax_experts, or pool=sequence."
            )
        check_threshold(self.threshold, self.pool)
        if self.threshold is not None and not isinstance(self.threshold, tuple):
            raise ValueError(f"threshold={self.threshold!r} is one for all. Give a tuple of numbers, one an expert.")

    @property
    def promises(self) -> Promises:
        free = self.pool == "threshold"
        return Promises(
            causal=free,
            batch_independent=self.pool != "batch",
            padding_independent=True,
            streamable=free,
            budget="expected" if free else "none",
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
        flat, competes = competing(logits, valid)
        group = pools("token" if self.pool == "threshold" else self.pool, batch, length, competes, segments)
        scores = EXPERT_CHOICE_SCORES[self.score](flat, group)
        eligible = (flat > -torch.inf) & competes.reshape(-1, 1)
        if self.pool == "threshold":
            cut = thresholds(self.threshold, self, scores)
            mask = (scores >= cut) & eligible
        else:
            k = experts_per_token(self.k, host, experts)
            count = capacity(k, group.present.sum(1), experts)
            chosen, cut = per_expert(group.gather(scores), group.gather(eligible) & group.present.unsqueeze(-1), count)
            mask = group.scatter(chosen, len(flat))
        weights = scores * host.scale
        return Routing.from_dense(weights, mask, cut=cut, valid=valid, sequences=batch)
