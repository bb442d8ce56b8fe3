"""What a step minimises: the text's likelihood, and what its routers are asked for beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from usmoe.layers.balance import balance_loss
from usmoe.layers.losses import distillation_loss, similarity_loss, z_loss
from usmoe.layers.sparsity import SparsityController
from usmoe.models.language import LanguageModel, LanguageOutput, Memory
from usmoe.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """The loss of a batch and its parts."""

    total: Float[Tensor, ""]
    """Differentiable."""
    nats: Float[Tensor, ""]
    """Of a token, on average: the text's alone, without gradient."""
    out: LanguageOutput


class Learner(nn.Module):
    """A model and what it is trained for: one module, so that a wrapper for several processes sees all of a step."""

    def __init__(self, model: LanguageModel, config: TrainConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        router: Any = model.moe_layers[0].router if config.sparsity else None
        self.sparsity = SparsityController.of(router) if config.sparsity else None

    def forward(
        self, tokens: Int[Tensor, "B L"], targets: Int[Tensor, "B L"], memory: Memory | None = None
    ) -> Objective:
        """The mean negative log-likelihood of the targets, plus each other loss times its coefficient."""
        config = self.config
        out = self.model(tokens, memory=memory, remember=config.memory)
        total, nats = self.model.words.loss(out.hidden.flatten(0, 1), targets.flatten(), config.output_z_loss)
        for coefficient, loss in (
            (config.balance, balance_loss),
            (config.z_loss, z_loss),
            (config.distill, distillation_loss),
            (config.similarity, similarity_loss),
        ):
            if coefficient:
                total = total + coefficient * loss(out.said)
        if self.sparsity is not None:
            total = total + self.sparsity.loss(out.said)
        return Objective(total=total, nats=nats, out=out)
