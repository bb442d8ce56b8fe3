"""The unified score, and the fields that describe it: what USMoE and BoundedChoice rank by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from usmoe.routing.host import Host, Normalize, TokenScore
from usmoe.routing.pools import Pools
from usmoe.routing.router import Experts, Router, is_number
from usmoe.routing.scores import EXPERT_SCORES, TOKEN_SCORES
from usmoe.routing.weigh import NORMALIZATIONS


@dataclass(frozen=True, kw_only=True)
class UnifiedScore(Router):
    """U = (1 - alpha) * token score + alpha * expert score (arXiv 2503.22996, Proposition 3.1, Definition 3.2,
    Algorithm 1)."""

    k: Experts = None
    """Experts a token, on average; may be fractional."""
    alpha: float | None = None
    """Share of the expert score, 0 to 1."""
    token_score: TokenScore | None = None
    """softmax | sigmoid."""
    expert_score: Literal["scaled_sigmoid", "sigmoid", "softmax_tokens", "identity"] = "scaled_sigmoid"
    """scaled_sigmoid = 2*sigmoid/E (the released code) | sigmoid (Algorithm 1) | softmax_tokens (Definition 3.2) |
    identity: the logit itself, which may be negative (with pool="batch" and alpha=1: Expert Race, arXiv 2503.16057)."""
    normalize: Normalize | None = None
    """Over what the weights of a token sum to 1: none | all | chosen."""

    @property
    def heeds_bias(self) -> bool:
        """The bias is a part of the token's side of the score, (1 - alpha) of the whole."""
        return self.token_score is None and self.alpha != 1

    def _check(self) -> None:
        super()._check()
        if self.alpha is not None and not (is_number(self.alpha) and 0 <= self.alpha <= 1):
            raise ValueError(f"alpha={self.alpha!r} is not a share. Choose 0 <= alpha <= 1.")
        if self.normalize is not None:
            self._refuse_sum_of_logits(self.normalize)

    def _refuse_sum_of_logits(self, normalize: Normalize) -> None:
        """Raise ValueError where weights that may be negative would be divided by their sum."""
        if self.expert_score == "identity" and normalize != "none":
            raise ValueError(
                f"expert_score=identity gives weights that may be negative, which normalize={normalize} cannot make "
                "sum to 1. Choose normalize=none, or another expert_score."
            )

    def _refuse_score_of_a_pool(self, pool: str, without: tuple[str, ...]) -> None:
        """Raise ValueError where the expert score needs all tokens of a pool, and `pool` is one `without` them."""
        if self.expert_score == "softmax_tokens" and pool in without:
            raise ValueError(
                f"expert_score=softmax_tokens needs a pool of tokens that are all there, and pool={pool} has none. "
                "Choose pool=sequence, batch or time_step, or another expert_score."
            )

    def unified_scores(
        self, flat: Float[Tensor, "T E"], group: Pools, host: Host
    ) -> tuple[Float[Tensor, "T E"], Float[Tensor, "T E"]]:
        """The unified score that weighs, and the one that ranks: with the host's correction bias on top, and -inf for
        pairs that cannot be chosen (a logit of -inf; an expert outside of the groups that the host allows)."""
        alpha = host.alpha if self.alpha is None else self.alpha
        if self.token_score is None:
            scores = host.weighing_scores(flat)
            ranked = host.competing_scores(flat, scores)
        else:
            scores = ranked = TOKEN_SCORES[self.token_score](flat)
        if alpha:
            expert = alpha * EXPERT_SCORES[self.expert_score](flat, group)
            scores, ranked = (1 - alpha) * scores + expert, (1 - alpha) * ranked + expert
        ranked = host.limited(ranked, flat) if self.token_score is None else ranked
        return scores, ranked.masked_fill(flat == -torch.inf, -torch.inf)

    def weights(self, scores: Float[Tensor, "T E"], mask: Bool[Tensor, "T E"], host: Host) -> Float[Tensor, "T E"]:
        """The weights of the chosen pairs, read where the mask is True."""
        normalize = self.normalize or host.normalize
        self._refuse_sum_of_logits(normalize)
        return NORMALIZATIONS[normalize](scores, mask) * host.scale
