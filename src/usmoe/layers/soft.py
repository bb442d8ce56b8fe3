"""`SoftMoE`: every slot of every expert reads a mixture of all tokens (Puigcerver et al. 2023, arXiv 2308.00951)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from usmoe.experts.compute import ACTIVATIONS, refuse_no_size, up_width
from usmoe.routing.scores import in_float32_at_least, masked_softmax
from usmoe.types import Promises, RouterOutput, Routing


class SoftMoE(nn.Module):
    """A fully differentiable layer: no pair is chosen, all are mixed.

    Each slot is a softmax-weighted mean of the tokens of its sequence (dispatch), an expert turns its slots, and each
    token is a softmax-weighted mean of all slots (combine). It looks ahead: not for autoregressive models. Padding
    neither gives to a slot nor takes from one.
    """

    promises = Promises(causal=False, batch_independent=True, padding_independent=True, streamable=False, budget="none")

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        slots_per_expert: int = 1,
        *,
        activation: Literal["swiglu", "relu"] = "swiglu",
        bias: bool = False,
        normalize: bool = True,
    ) -> None:
        """
        d_model, d_ff     D and F, as in MoE
        slots_per_expert  P; the cost is that of E*P tokens, whatever the length of the sequence
        normalize         l2-normalise tokens and slots, with a learned scale (section 2.3 of the paper)
        """
        super().__init__()
        refuse_no_size(d_model=d_model, d_ff=d_ff, num_experts=num_experts, slots_per_expert=slots_per_expert)
        width = up_width(activation, d_ff)
        self.num_experts = num_experts
        self.slots_per_expert = slots_per_expert
        self.activation = activation
        self.normalize = normalize
        self.slots = nn.Parameter(torch.randn(num_experts * slots_per_expert, d_model) * d_model**-0.5)
        self.scale = nn.Parameter(torch.ones(())) if normalize else None
        self.up = nn.Parameter(torch.randn(num_experts, width, d_model) * d_model**-0.5)
        self.down = nn.Parameter(torch.randn(num_experts, d_model, d_ff) * d_ff**-0.5)
        self.up_bias = nn.Parameter(torch.zeros(num_experts, width)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(num_experts, d_model)) if bias else None

    def forward(
        self, x: Float[Tensor, "B L D"], *, valid: Bool[Tensor, "B L"] | None = None
    ) -> tuple[Float[Tensor, "B L D"], RouterOutput]:
        """The layer's output, and a RouterOutput: logits (B, L, E*P), one a slot, and a routing in which every real
        token has every expert, weighted by the share that the expert's slots have in the token's output."""
        batch, length, _ = x.shape
        if valid is not None:
            x = x.masked_fill(~valid.unsqueeze(-1), 0)  # a NaN in padding times a weight of 0 is a NaN
        tokens, slots = in_float32_at_least(x), in_float32_at_least(self.slots)
        if self.scale is not None:
            tokens = torch.nn.functional.normalize(tokens, dim=-1)
            slots = torch.nn.functional.normalize(slots, dim=-1) * self.scale
        logits = tokens @ slots.T  # (B, L, E*P)
        real = torch.ones(batch, length, dtype=torch.bool, device=x.device) if valid is None else valid
        keep = real.unsqueeze(-1).expand_as(logits)
        logits = logits.masked_fill(~keep, 0.0)
        dispatch = masked_softmax(logits, keep, 1)
        combine = masked_softmax(logits, keep, 2)
        inputs = torch.einsum("bld,bls->bsd", x, dispatch.to(x.dtype))
        outputs = self._experts(inputs.unflatten(1, (self.num_experts, self.slots_per_expert)))
        y = torch.einsum("bls,bsd->bld", combine.to(outputs.dtype), outputs.flatten(1, 2))
        share = combine.unflatten(-1, (self.num_experts, self.slots_per_expert)).sum(-1)
        routing = Routing.from_dense(share, real.unsqueeze(-1).expand_as(share), valid=valid)
        return y, RouterOutput(routing=routing, logits=logits)

    def _experts(self, slots: Float[Tensor, "B E P D"]) -> Float[Tensor, "B E P D"]:
        hidden = torch.einsum("bepd,ehd->beph", slots, self.up.to(slots.dtype))
        if self.up_bias is not None:
            hidden = hidden + self.up_bias[:, None]
        out = torch.einsum("bepf,edf->bepd", ACTIVATIONS[self.activation](hidden), self.down.to(slots.dtype))
        return out if self.down_bias is None else out + self.down_bias[:, None]
