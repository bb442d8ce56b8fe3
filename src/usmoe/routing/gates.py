"""Gates: modules that own parameters and map tokens to logits. Everything after them is a function."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from usmoe.routing.scores import in_float32_at_least


class LinearGate(nn.Module):
    """logits = x W: the gate of nearly all MoE layers."""

    def __init__(self, d_model: int, num_experts: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None
        nn.init.normal_(self.weight, std=d_model**-0.5)

    def forward(self, x: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens E"]:
        """Logits of each token for each expert."""
        return F.linear(x, self.weight, self.bias)


class CosineGate(nn.Module):
    """Cosine similarity of low-dimensional projections, over a learned temperature (XMoE: Chi et al. 2022,
    arXiv 2204.09179): invariant to the scale of a token."""

    def __init__(self, d_model: int, num_experts: int, *, dim: int | None = None, temperature: float = 0.07) -> None:
        """dim: width of the projection, by default half the number of experts (as in XMoE), at least 2."""
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"A temperature of {temperature} is impossible. Give one above 0.")
        dim = max(2, num_experts // 2) if dim is None else dim
        self.projection = nn.Parameter(torch.empty(dim, d_model))
        self.experts = nn.Parameter(torch.empty(num_experts, dim))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        nn.init.orthogonal_(self.projection)
        nn.init.normal_(self.experts)

    def forward(self, x: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens E"]:
        """Logits of each token for each expert."""
        token = F.normalize(in_float32_at_least(F.linear(x, self.projection)), dim=-1)
        cosine = token @ F.normalize(self.experts.to(token.dtype), dim=-1).T
        return cosine / self.log_temperature.to(token.dtype).exp()


class NoisyGate(nn.Module):
    """A linear gate with learned Gaussian noise in training (Shazeer et al. 2017, arXiv 1701.06538, eq. 4)."""

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.noise = nn.Parameter(torch.zeros(num_experts, d_model))
        nn.init.normal_(self.weight, std=d_model**-0.5)

    def forward(self, x: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens E"]:
        """Logits of each token for each expert."""
        logits = F.linear(x, self.weight)
        if not self.training:
            return logits
        return logits + torch.randn_like(logits) * F.softplus(F.linear(x, self.noise))


class FrozenGate(nn.Module):
    """A random linear gate that is never trained (SMoE-Dropout: Chen et al. 2023, arXiv 2303.01610). Its weight is a
    buffer: no optimiser sees it, and a checkpoint keeps it."""

    weight: Tensor

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(num_experts, d_model) * d_model**-0.5)

    def forward(self, x: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens E"]:
        """Logits of each token for each expert."""
        return F.linear(x, self.weight.to(x.dtype))


GATES: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": LinearGate,
    "cosine": CosineGate,
    "noisy": NoisyGate,
    "frozen": FrozenGate,
}
"""Gates by name: (d_model, num_experts) -> module."""


def gate_of(gate: str | nn.Module, d_model: int, num_experts: int) -> nn.Module:
    """The gate of a name, or the module itself. Raises ValueError for an unknown name, listing the known ones."""
    if isinstance(gate, nn.Module):
        return gate
    if gate not in GATES:
        raise ValueError(f"There is no gate {gate!r}. Known: {', '.join(GATES)}; or give a module of your own.")
    return GATES[gate](d_model, num_experts)
