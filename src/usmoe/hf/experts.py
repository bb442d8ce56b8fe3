"""The experts function that transformers' experts interface calls for a patched model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from usmoe.experts.compute import experts_by_pairs
from usmoe.hf.packed import weights_of
from usmoe.types import Routing

IMPLEMENTATION = "usmoe"

PATCHED = "_usmoe_patched"
"""Attribute of an experts module's configuration while it is handed our pairs."""


_of_packed: Any = torch.compiler.disable(experts_by_pairs)
"""Unpacking is no work for a compiler."""


def experts_of_pairs(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """(T, D) -> (T, D). `top_k_index` is either the flat pairs token * E + expert, (N,) and sorted by expert, which
    our router hook hands on, or the (T, k) matrix of a router that was left alone."""
    experts = self.num_experts
    tokens = len(hidden_states)
    if hidden_states.is_meta:
        return torch.empty_like(hidden_states)
    if top_k_index.ndim != 1 and getattr(self.config, PATCHED, False):
        raise RuntimeError(
            "The router of these experts ran where usmoe does not see it: something has replaced the module since "
            "patch(). Patch the model again: usmoe.patch(model, router)."
        )
    if top_k_index.ndim == 1:
        routing = Routing(
            token=top_k_index // experts,
            expert=top_k_index % experts,
            weight=top_k_weights,
            num_tokens=tokens,
            num_experts=experts,
        )
    else:
        mask = torch.zeros(tokens, experts, dtype=torch.bool, device=hidden_states.device)
        dense = top_k_weights.new_zeros(tokens, experts).scatter(1, top_k_index, top_k_weights)
        routing = Routing.from_dense(dense, mask.scatter(1, top_k_index, True))
    gated = self.has_gate
    up, down = weights_of(self, "gate_up_proj" if gated else "up_proj"), weights_of(self, "down_proj")
    if self.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    bias = self.has_bias
    compute = experts_by_pairs if isinstance(up, Tensor) and isinstance(down, Tensor) else _of_packed
    out = compute(
        hidden_states,
        routing,
        up,
        down,
        self._apply_gate if gated else self.act_fn,
        (self.gate_up_proj_bias if gated else self.up_proj_bias) if bias else None,
        self.down_proj_bias if bias else None,
        self.post_expert_norm if self.has_post_expert_norm else None,
    )
    return out.to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_of_pairs)
