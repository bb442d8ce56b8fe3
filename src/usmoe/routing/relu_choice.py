"""ReLU choice: every pair with a positive logit, weighed by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from usmoe.routing.host import ROUTE, Host
from usmoe.routing.router import Experts, Router, Segments, competing, experts_per_token, refuse_state
from usmoe.types import Promises, Routing


@dataclass(frozen=True, kw_only=True)
class ReLUChoice(Router):
    """Every pair whose logit is above 0, with the logit as its weight: relu(logits) (ReMoE: Wang et al. 2024,
    arXiv 2412.14711, section "ReLU routing").

    The weight falls to 0 where the choice ends, so that training sees no jump. Nothing holds a budget: how many pairs
    there are is what the gate makes of it, and `usmoe.layers.sparsity.SparsityController` trains it towards k.

    A logit of 0 is not chosen. Padding takes nothing. There are no ties, since nobody competes.
    """

    name: ClassVar[str] = "relu_choice"
    k: Experts = None
    """Experts a token that training aims at (`SparsityController.of`); the choice does not depend on it."""

    def __post_init__(self) -> None:
        self._check()

    @property
    def promises(self) -> Promises:
        return Promises(causal=True, batch_independent=True, padding_independent=True, streamable=True, budget="none")

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
        if self.k is not None:
            experts_per_token(self.k, host, logits.shape[-1])  # refuses a target that cannot be met
        flat, competes = competing(logits, valid)
        mask = (flat > 0) & competes.reshape(-1, 1)
        cut = torch.zeros(1, dtype=flat.dtype, device=flat.device)
        return Routing.from_dense(flat.relu() * host.scale, mask, cut=cut, valid=valid, sequences=len(logits))
