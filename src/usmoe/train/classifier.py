"""A language model that classifies texts: its body, and a small head on its last state, or on a mean of them."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from usmoe.layers.pooling import POOLINGS, Pooling
from usmoe.models.language import LanguageModel
from usmoe.types import RouterOutput


@dataclass(frozen=True, kw_only=True, eq=False)
class Classified:
    """What a forward of a classifier gives."""

    logits: Float[Tensor, "B C"]
    """Of the classes, in float32 at least."""
    said: tuple[RouterOutput, ...]
    """What each MoE layer says; empty for a dense model."""


class Classifier(nn.Module):
    """A body and a head: Linear - Tanh - Dropout - Linear on one state of a text (usmoe.layers.pooling). The last real
    token's is the released code's, which in a causal model has seen the whole text; the mean over the real tokens
    leaves less for a small body to carry.

        classifier = Classifier(load_run(folder).model, classes=2)
        logits = classifier(tokens, valid).logits

    A text is one segment without memory. It stands at the left, padding at its right: no token of a causal body sees
    what comes after it, and `valid` keeps padding out of the routers' pools.
    """

    def __init__(self, body: LanguageModel, classes: int, dropout: float = 0.1, pooling: Pooling = "last") -> None:
        """Raises ValueError for fewer than two classes."""
        super().__init__()
        if classes < 2:
            raise ValueError(f"{classes} classes leave nothing to tell apart. Give 2 or more.")
        width = body.config.d_model
        self.body = body
        self.pooling: Pooling = pooling
        self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, classes))

    def forward(self, tokens: Int[Tensor, "B L"], valid: Bool[Tensor, "B L"]) -> Classified:
        """Logits of each text. Every row of `valid` begins with a real token and ends with its padding."""
        out = self.body(tokens, valid=valid)
        pooled = POOLINGS[self.pooling](out.hidden, valid.sum(1))
        logits = self.head(pooled.to(next(self.head.parameters()).dtype))
        return Classified(logits=logits if logits.dtype.itemsize >= 4 else logits.float(), said=out.said)
