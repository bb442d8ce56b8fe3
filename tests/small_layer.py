"""A small layer with spread, its input, its gradients, and the same layer by loops: what the layer tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import reference
from every_router import oracle
from usmoe import MoE, USMoE

B, L, D, F, E = 2, 5, 6, 4, 4
VALID = torch.tensor([[False, True, True, True, True], [True, True, True, False, False]])


def layer(router: Any = None, *, seed: int = 0, dtype: torch.dtype = torch.float64, **given: Any) -> MoE:
    """A small MoE whose gate has spread and whose biases are not 0."""
    torch.manual_seed(seed)
    moe = MoE(D, F, E, USMoE(k=2) if router is None else router, **given).to(dtype)
    with torch.no_grad():
        for name, value in moe.named_parameters():
            value.normal_(std=2.0 if name == "gate.weight" else 0.6)
    return moe


def tokens(seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(y: Tensor, x: Tensor, moe: nn.Module, factors: Tensor) -> dict[str, Tensor]:
    """Gradients of sum(y * factors) by name, that of the input as x; 0 where there is none."""
    named = dict(moe.named_parameters()) | {"x": x}
    found = torch.autograd.grad((y * factors).sum() + 0 * x.sum(), list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def by_loops(moe: MoE, x: Tensor, valid: Tensor | None = None) -> Tensor:
    """The layer, a token and a pair at a time; padding that does not compete is read as 0."""
    if valid is not None and getattr(moe.router, "mask_padding", True):
        x = x * valid.unsqueeze(-1)
    logits = torch.stack([torch.stack([moe.gate.weight @ token for token in sequence]) for sequence in x])
    answer = oracle(moe.router, [[list(row) for row in sequence] for sequence in logits], valid)
    flat = x.flatten(0, 1)
    y = reference.moe(flat, moe, answer)
    if moe.shared_up is not None and moe.shared_down is not None:
        shared = []
        for token in flat:
            hidden = moe.shared_up(token)
            gate, value = hidden.chunk(2)
            hidden = gate * gate.sigmoid() * value if moe.activation == "swiglu" else hidden.clamp(min=0)
            shared.append(moe.shared_down(hidden))
        y = y + torch.stack(shared)
    return y.view_as(x)


class Float32Gate(nn.Module):
    """The same logits in every dtype: in bfloat16 a gate of its own would flip pairs near the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(E, D))

    def forward(self, x: Tensor) -> Tensor:
        return x.float() @ self.weight.float().T
