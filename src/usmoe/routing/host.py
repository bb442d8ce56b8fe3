"""The rule of the model that hosts a router: what a router's fields mean where they are None."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from usmoe.routing.scores import TOKEN_SCORES

TokenScore = Literal["softmax", "sigmoid"]
Normalize = Literal["none", "all", "chosen"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Host:
    """A model's own routing rule, as data.

    The default is the rule of `route()` and of `MoE`: softmax, no normalisation, alpha 0.5, and no k. A pretrained
    model brings the rule that its own router follows, with alpha 0.
    """

    k: int | None = None
    """Experts a token."""
    score: TokenScore = "softmax"
    """Map from the logits of a token to its scores."""
    normalize: Normalize = "none"
    """Over what the weights of a token are made to sum to 1. A rule that takes the softmax of the chosen logits alone
    is softmax with "chosen"."""
    scale: float = 1.0
    """Factor on every weight, after normalisation (routed_scaling_factor)."""
    bias: Float[Tensor, " E"] | None = None
    """Added to the scores for ranking alone (e_score_correction_bias)."""
    alpha: float = 0.5
    """Share of the expert score in the unified score."""

    def __str__(self) -> str:
        parts = ["?" if self.k is None else f"top {self.k}", f"of {self.score}"]
        parts += ["+ correction bias"] if self.bias is not None else []
        parts += [f"normalised over {self.normalize}"] if self.normalize != "none" else []
        parts += [f"times {self.scale:g}"] if self.scale != 1 else []
        return " ".join(parts)

    def weighing_scores(self, logits: Float[Tensor, "... E"]) -> Float[Tensor, "... E"]:
        """The scores that become weights."""
        return TOKEN_SCORES[self.score](logits)

    def ranking_scores(self, logits: Float[Tensor, "... E"]) -> Float[Tensor, "... E"]:
        """The scores that compete: the weighing ones with the correction bias on top."""
        scores = self.weighing_scores(logits)
        return scores if self.bias is None else scores + self.bias.to(scores)


ROUTE = Host()
"""The host of route() and MoE."""
