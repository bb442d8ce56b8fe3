"""The rule of the model that hosts a router: what a router's fields mean where they are None."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from usmoe.routing.scores import HOST_SCORES, softmax, sparse_mixer

TokenScore = Literal["softmax", "sigmoid"]
Normalize = Literal["none", "all", "chosen"]


@dataclass(frozen=True, kw_only=True)
class Groups:
    """A token may use the experts of its best groups alone (DeepSeek-V2, arXiv 2405.04434, section 2.1.3)."""

    number: int
    """Into how many groups of neighbours the experts divide."""
    kept: int
    """How many of them a token may use."""
    by: Literal["best", "best_two"]
    """A group counts as much as its best expert (DeepSeek-V2), or as its two best together (DeepSeek-V3)."""
    outside: float = -torch.inf
    """The ranking score of the experts of other groups. A few models have 0, which beats a negative biased score."""

    def inside(self, ranking: Float[Tensor, "... E"]) -> Bool[Tensor, "... E"]:
        """Whether an expert is in one of its token's best groups; of two equal groups the lower is kept."""
        grouped = ranking.unflatten(-1, (self.number, -1))
        best = grouped.topk(1 if self.by == "best" else min(2, grouped.shape[-1]), -1).values.sum(-1)
        order = best.sort(dim=-1, descending=True, stable=True).indices[..., : self.kept]
        kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, order, True)
        return kept.unsqueeze(-1).expand_as(grouped).flatten(-2)

    def __str__(self) -> str:
        return f"in the best {self.kept} of {self.number} groups"


@dataclass(frozen=True, kw_only=True, eq=False)
class Host:
    """A model's own routing rule, as data.

    The default is the rule of `route()` and of `MoE`: softmax, no normalisation, alpha 0.5, and no k. A pretrained
    model brings the rule that its own router follows, with alpha 0.
    """

    k: int | None = None
    """Experts a token."""
    score: str = "softmax"
    """Map from the logits of a token to its scores: softmax | sigmoid | softplus | sqrtsoftplus | sparse_mixer."""
    rank: Literal["score", "logits"] = "score"
    """What competes: the score, or the logits as they are."""
    normalize: Normalize = "none"
    """Over what the weights of a token are made to sum to 1. A rule that takes the softmax of the chosen logits alone
    is softmax with "chosen"."""
    scale: float | Float[Tensor, " E"] = 1.0
    """Factor on every weight, after normalisation (routed_scaling_factor), or one an expert."""
    bias: Float[Tensor, " E"] | None = None
    """Added to what competes, for ranking alone (e_score_correction_bias)."""
    groups: Groups | None = None
    """Which experts a token may use at all."""
    jitter: float = 0.0
    """Of sparse_mixer: within which relative distance of a logit the others count."""
    alpha: float = 0.5
    """Share of the expert score in the unified score."""

    def __str__(self) -> str:
        parts = ["?" if self.k is None else f"top {self.k}", f"of {self.score}"]
        parts += ["by logits"] if self.rank == "logits" else []
        parts += ["+ correction bias"] if self.bias is not None else []
        parts += [str(self.groups)] if self.groups is not None else []
        parts += [f"normalised over {self.normalize}"] if self.normalize != "none" else []
        if isinstance(self.scale, Tensor):
            parts.append("times a factor an expert")
        elif self.scale != 1:
            parts.append(f"times {self.scale:g}")
        return " ".join(parts)

    def weighing_scores(self, logits: Float[Tensor, "... E"]) -> Float[Tensor, "... E"]:
        """The scores that become weights."""
        return sparse_mixer(logits, self.jitter) if self.score == "sparse_mixer" else HOST_SCORES[self.score](logits)

    def competing_scores(
        self, logits: Float[Tensor, "... E"], weighing: Float[Tensor, "... E"] | None = None
    ) -> Float[Tensor, "... E"]:
        """The scores that compete, before the groups: the weighing ones (or the logits) with the bias on top.

        weighing: the weighing scores of these logits, where they are known already.
        """
        if self.rank == "logits":
            scores = logits
        elif self.score == "sparse_mixer":  # its weight says how far an expert is ahead of the next, not how good it is
            scores = softmax(logits)
        else:
            scores = self.weighing_scores(logits) if weighing is None else weighing
        return scores if self.bias is None else scores + self.bias.to(scores)

    def limited(self, ranked: Float[Tensor, "... E"], logits: Float[Tensor, "... E"]) -> Float[Tensor, "... E"]:
        """Ranking scores with the model's group limit: by the groups that its own competing scores prefer."""
        if self.groups is None:
            return ranked
        return ranked.masked_fill(~self.groups.inside(self.competing_scores(logits)), self.groups.outside)

    def ranking_scores(
        self, logits: Float[Tensor, "... E"], weighing: Float[Tensor, "... E"] | None = None
    ) -> Float[Tensor, "... E"]:
        """The scores that compete, -inf for an expert that the token may not use."""
        return self.limited(self.competing_scores(logits, weighing), logits)


ROUTE = Host()
"""The host of route() and MoE."""
