"""USMoE: the best (token, expert) pairs of a pool, with no quota for a token or an expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from usmoe.routing.host import ROUTE, Host, Normalize, TokenScore
from usmoe.routing.pools import Pools, pools
from usmoe.routing.router import Experts, Router, Segments, competing, experts_per_token, is_number, refuse_state
from usmoe.routing.scores import EXPERT_SCORES, TOKEN_SCORES
from usmoe.routing.select import budget, top, whole
from usmoe.routing.threshold import check_threshold, thresholds
from usmoe.routing.weigh import NORMALIZATIONS
from usmoe.types import Promises, Routing


@dataclass(frozen=True, kw_only=True)
class USMoE(Router):
    """The best floor(k*S + 0.5) (token, expert) pairs of a pool of S tokens, by a unified score
    (arXiv 2503.22996, Proposition 3.1, Definition 3.2, Algorithm 1).

    U = (1 - alpha) * token score + alpha * expert score. There is no quota for a token or an expert, so k may be
    fractional, a token may get several experts or none, and alpha = 0 is not token choice.

    Ties: the lower flat index (token, then expert) wins. A pool with too few finite pairs takes fewer.
    """

    name: ClassVar[str] = "usmoe"
    k: Experts = None
    """Experts a token, on average; may be fractional."""
    alpha: float | None = None
    """Share of the expert score, 0 to 1."""
    token_score: TokenScore | None = None
    """softmax | sigmoid."""
    expert_score: Literal["scaled_sigmoid", "sigmoid", "softmax_tokens"] = "scaled_sigmoid"
    """scaled_sigmoid = 2*sigmoid/E (the released code) | sigmoid (Algorithm 1) | softmax_tokens (Definition 3.2)."""
    normalize: Normalize | None = None
    """Over what the weights of a token sum to 1: none | all | chosen."""
    pool: Literal["sequence", "batch", "time_step", "token", "threshold"] = "sequence"
    """Who competes: the tokens of a sequence, of the batch, at one position of all sequences, a token with itself
    alone (k whole), or nobody: threshold takes every pair whose score reaches a given value."""
    threshold: float | None = None
    """The value for pool="threshold"."""
    mask_padding: bool = True
    """False: padding competes and adds to the budget, as in the released code."""

    def __post_init__(self) -> None:
        self._check()
        if self.alpha is not None and not (is_number(self.alpha) and 0 <= self.alpha <= 1):
            raise ValueError(f"alpha={self.alpha!r} is not a share. Choose 0 <= alpha <= 1.")
        if not isinstance(self.mask_padding, bool):
            raise ValueError(f"mask_padding={self.mask_padding!r} is neither True nor False. Choose one of them.")
        if self.pool == "token" and isinstance(self.k, int | float):
            whole(self.k, "pool=token")
        if self.expert_score == "softmax_tokens" and self.pool in ("token", "threshold"):
            raise ValueError(
                f"expert_score=softmax_tokens needs a pool of tokens, and pool={self.pool} has none. "
                "Choose pool=sequence, batch or time_step, or another expert_score."
            )
        check_threshold(self.threshold, self.pool)

    @property
    def promises(self) -> Promises:
        alone = self.pool in ("token", "threshold")
        return Promises(
            causal=alone or self.pool == "time_step",
            batch_independent=alone or self.pool == "sequence",
            # at a time step, where the padding stands decides which tokens meet
            padding_independent=alone or (self.mask_padding and self.pool != "time_step"),
            streamable=alone or self.pool == "time_step",
            budget="expected" if self.pool == "threshold" else "exact",
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
        flat, competes = competing(logits, valid, self.mask_padding)
        group = pools("token" if self.pool == "threshold" else self.pool, batch, length, competes, segments)
        scores, ranked = self.unified_scores(flat, group, host)
        eligible = (flat > -torch.inf) & competes.reshape(-1, 1)
        if self.pool == "threshold":
            cut = thresholds(self.threshold, self, scores).reshape(1)
            mask = (ranked >= cut) & eligible
        else:
            k = experts_per_token(self.k, host, experts)
            if self.pool == "token":
                k = whole(k, "pool=token")
            chosen, cut = top(
                group.gather(ranked).flatten(1),
                (group.gather(eligible) & group.present.unsqueeze(-1)).flatten(1),
                budget(k, group.present.sum(1)),
            )
            mask = group.scatter(chosen.unflatten(1, (-1, experts)), len(flat))
        weights = NORMALIZATIONS[self.normalize or host.normalize](scores, mask) * host.scale
        return Routing.from_dense(weights, mask, cut=cut, valid=valid, sequences=batch)

    def unified_scores(
        self, flat: Float[Tensor, "T E"], group: Pools, host: Host
    ) -> tuple[Float[Tensor, "T E"], Float[Tensor, "T E"]]:
        """The unified score that weighs, and the one that ranks (they differ by the host's correction bias alone)."""
        alpha = host.alpha if self.alpha is None else self.alpha
        if self.token_score is None:
            scores, ranked = host.weighing_scores(flat), host.ranking_scores(flat)
        else:
            scores = ranked = TOKEN_SCORES[self.token_score](flat)
        if not alpha:
            return scores, ranked
        expert = alpha * EXPERT_SCORES[self.expert_score](flat, group)
        return (1 - alpha) * scores + expert, (1 - alpha) * ranked + expert
