"""The routers: token choice, expert choice, USMoE, and a pretrained model's own choice.

Each is a frozen value, equal to another with the same fields, and callable:

    router(logits (B, L, E), valid (B, L) or None, segments=..., state=..., host=...) -> Routing

They do not check the logits: `usmoe.route()` does. A field that is None means what the host says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from usmoe.routing.host import ROUTE, Host, Normalize, TokenScore
from usmoe.routing.pools import Pools, pools
from usmoe.routing.router import Experts, Router, Segments, competing, experts_per_token, refuse_state
from usmoe.routing.scores import EXPERT_CHOICE_SCORES, EXPERT_SCORES, TOKEN_SCORES, masked_softmax
from usmoe.routing.select import budget, capacity, per_expert, top, whole
from usmoe.routing.weigh import NORMALIZATIONS
from usmoe.types import Promises, Routing

Logits = Float[Tensor, "B L E"]
Valid = Bool[Tensor, "B L"] | None

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

    def __call__(
        self,
        logits: Logits,
        valid: Valid = None,
        *,
        segments: Segments = None,
        state: Any = None,
        host: Host = ROUTE,
    ) -> Routing:
        refuse_state(state, self)
        k = whole(experts_per_token(self.k, host, logits.shape[-1]), "Token choice")
        flat, competes = competing(logits, valid)
        if self.score is None:
            scores, ranked = host.weighing_scores(flat), host.ranking_scores(flat)
        else:
            scores = ranked = TOKEN_SCORES[self.score](flat)
        if self.score_order == "topk_then_score":
            ranked = flat
        mask, cut = top(ranked, (flat > -torch.inf) & competes.reshape(-1, 1), competes.reshape(-1) * k)
        if self.score_order == "topk_then_score":  # the score sees the chosen alone
            softmax = (self.score or host.score) == "softmax"
            scores = masked_softmax(flat, mask, -1) if softmax else scores.where(mask, 0)
        weights = NORMALIZATIONS[self.normalize or host.normalize](scores, mask) * host.scale
        return Routing.from_dense(weights, mask, cut=cut, valid=valid, sequences=len(logits))


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

    def __call__(
        self,
        logits: Logits,
        valid: Valid = None,
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
        return TokenChoice(k=self.k)(logits, valid, segments=segments, state=state, host=host)


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
        given: Any = self.threshold
        if isinstance(given, list | Tensor):
            listed = given.tolist() if isinstance(given, Tensor) else given
            object.__setattr__(self, "threshold", tuple(listed))
        self._check()
        if self.pool == "threshold" and self.score == "softmax_tokens":
            raise ValueError(
                "score=softmax_tokens needs a pool of tokens, and pool=threshold has none. "
                "Choose score=sigmoid or softmax_experts, or pool=sequence."
            )
        _check_threshold(self.threshold, self.pool, one_an_expert=True)

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
        logits: Logits,
        valid: Valid = None,
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
            cut = _thresholds(self.threshold, self, scores)
            if len(cut) != experts:
                raise ValueError(
                    f"{self.name} was given {len(cut)} thresholds for {experts} experts. Give one for each expert."
                )
            mask = (scores >= cut) & eligible
        else:
            k = experts_per_token(self.k, host, experts)
            count = capacity(k, group.present.sum(1), experts)
            chosen, cut = per_expert(group.gather(scores), group.gather(eligible) & group.present.unsqueeze(-1), count)
            mask = group.scatter(chosen, len(flat))
        weights = scores * host.scale
        return Routing.from_dense(weights, mask, cut=cut, valid=valid, sequences=batch)


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
        if self.alpha is not None and not (_is_number(self.alpha) and 0 <= self.alpha <= 1):
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
        _check_threshold(self.threshold, self.pool)

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
        logits: Logits,
        valid: Valid = None,
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
            cut = _thresholds(self.threshold, self, scores).reshape(1)
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


def _check_threshold(threshold: Any, pool: str, one_an_expert: bool = False) -> None:
    if threshold is None:
        return
    if pool != "threshold":
        raise ValueError(
            f"threshold={threshold} has no meaning with pool={pool}. Choose pool=threshold, or leave it out."
        )
    values = threshold if one_an_expert else (threshold,)
    if not isinstance(values, tuple) or not all(_is_number(value) and value == value for value in values):
        kind = "a tuple of numbers, one an expert" if one_an_expert else "a number"
        raise ValueError(f"threshold={threshold!r} cannot be compared with scores. Give {kind}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _thresholds(threshold: Any, router: Router, scores: Tensor) -> Tensor:
    if threshold is None:
        raise ValueError(
            f"{router} has no threshold yet. Give one, threshold=0.1 say, or let usmoe.calibrate() find it on text."
        )
    return torch.as_tensor(threshold, dtype=scores.dtype, device=scores.device)
