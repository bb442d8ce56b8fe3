"""Token choice, and a pretrained model's own choice: every token takes its best experts."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from usmoe.lp.greedy import top, top_alike
from usmoe.routing.host import ROUTE, Host, Normalize, TokenScore
from usmoe.routing.router import Experts, Router, Segments, competing, experts_per_token, refuse_state
from usmoe.routing.scores import TOKEN_SCORES, masked_softmax
from usmoe.routing.select import whole
from usmoe.routing.weigh import NORMALIZATIONS
from usmoe.types import Promises, Routing

_PER_TOKEN = Promises(causal=True, batch_independent=True, padding_independent=True, streamable=True, budget="exact")


@dataclass(frozen=True, kw_only=True)
class TokenChoice(Router):
    """Every token takes its k best experts (Shazeer et al. 2017; the rule of nearly all released models).

    Ties: the lower expert wins. A token with fewer than k finite logits takes fewer. Padding takes none.
    """

    name: ClassVar[str] = "token_choice"
    k: Experts = None
    """Experts a token, a whole number."""
    score: TokenScore | None = None
    """softmax | sigmoid."""
    normalize: Normalize | None = None
    """Over what the weights of a token sum to 1: none | all | chosen."""
    score_order: Literal["score_then_topk", "topk_then_score"] = "score_then_topk"
    """Whether the score sees all experts (OLMoE) or the k chosen ones alone (Mixtral)."""

    def __post_init__(self) -> None:
        self._check()
        if isinstance(self.k, int | float):
            whole(self.k, "Token choice")

    @property
    def promises(self) -> Promises:
        return _PER_TOKEN

    @property
    def heeds_bias(self) -> bool:
        return self.score is None and self.score_order == "score_then_topk"

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
        k = whole(experts_per_token(self.k, host, logits.shape[-1]), "Token choice")
        flat, competes = competing(logits, valid)
        if self.score is None:
            scores = host.weighing_scores(flat)
            ranked = host.ranking_scores(flat, scores)
        else:
            scores = ranked = TOKEN_SCORES[self.score](flat)
        if self.score_order == "topk_then_score":
            ranked = flat
        ranked = ranked.masked_fill(flat == -torch.inf, -torch.inf)
        found = top_alike(ranked, k) if valid is None and ranked.numel() else None
        if found is None:
            eligible = (ranked > -torch.inf) & competes.reshape(-1, 1)
            found = top(ranked, eligible, competes.reshape(-1) * k)
        mask, cut = found
        if self.score_order == "topk_then_score":  # the score sees the chosen alone
            softmax = (self.score or host.score) == "softmax"
            scores = masked_softmax(flat, mask, -1) if softmax else scores.where(mask, 0)
        weights = NORMALIZATIONS[self.normalize or host.normalize](scores, mask) * host.scale
        return Routing.from_dense(weights, mask, cut=cut, valid=valid, sequences=len(logits))


@functools.cache
def _chosen_by_token(k: Experts) -> TokenChoice:
    return TokenChoice(k=k)


@dataclass(frozen=True, kw_only=True)
class OwnChoice(Router):
    """A pretrained model's own rule, through our path: the baseline that `usmoe.patch` must equal.

    With k, the same rule with fewer (or more) experts a token: the usual way to make inference cheaper.
    It has a meaning only where a model hosts it; `route()` and `MoE` refuse it.
    """

    name: ClassVar[str] = "own_choice"
    k: Experts = None
    """Experts a token, a whole number."""

    def __post_init__(self) -> None:
        self._check()
        if isinstance(self.k, int | float):
            whole(self.k, "A model's own choice")

    @property
    def promises(self) -> Promises:
        return _PER_TOKEN

    @property
    def heeds_bias(self) -> bool:
        return True

    def __call__(
        self,
        logits: Float[Tensor, "B L E"],
        valid: Bool[Tensor, "B L"] | None = None,
        *,
        segments: Segments = None,
        state: Any = None,
        host: Host = ROUTE,
    ) -> Routing:
        if host.k is None:
            raise ValueError(
                "OwnChoice() is a pretrained model's own rule, and there is no model here. Use it in usmoe.patch(), "
                "or name the rule: TokenChoice(k=2), say."
            )
        return _chosen_by_token(self.k)(logits, valid, segments=segments, state=state, host=host)
