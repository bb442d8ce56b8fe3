"""`MoE`: a sparse mixture-of-experts feed-forward layer under any router."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from usmoe.experts.compute import ACTIVATIONS, experts_by_pairs, refuse_no_size, up_width
from usmoe.layers.cut import MovingCut
from usmoe.routing import OwnChoice, USMoE
from usmoe.routing.gates import gate_of
from usmoe.routing.route import check
from usmoe.routing.router import Router, call, padding_counts, refuse_what_is_no_router
from usmoe.types import RouterOutput, is_causal


class MoE(nn.Module):
    """A feed-forward layer of E experts, of which a router chooses (token, expert) pairs (arXiv 2503.22996, eq. 1).

        moe = MoE(64, 128, num_experts=16, router=USMoE(k=1.5))
        y, out = moe(x)          # x (B, L, D) -> y (B, L, D); out.routing, out.logits

    A token without an expert gets 0 from the routed experts (a residual around the layer carries it on).

    In training mode, `cut` follows where the router's selections fall (a moving average, in buffers), so that
    `usmoe.to_causal` can serve what was trained with a pool that looks ahead.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        router: Any = None,
        *,
        activation: Literal["swiglu", "relu"] = "swiglu",
        bias: bool = False,
        gate: str | nn.Module = "linear",
        shared_experts: int = 0,
        debug: bool = False,
    ) -> None:
        """
        d_model         D, width of a token
        d_ff            F, width of one expert
        num_experts     E
        router          any router; by default USMoE(k=2) (k=1 where there is one expert)
        activation      swiglu: silu(x W) * x V, then down; relu: relu(x W), then down
        bias            whether the projections of the experts have one
        gate            linear | cosine | noisy | frozen, or a module (B, L, D) -> (B, L, E)
        shared_experts  experts of width F that every token passes, beside the routed ones
        debug           check logits, valid and segments at every call, as route() does; this stalls a GPU

        Raises ValueError for sizes below 1, unknown names, and a router that cannot work with so many experts.
        """
        super().__init__()
        refuse_no_size(d_model=d_model, d_ff=d_ff, num_experts=num_experts)
        if shared_experts < 0:
            raise ValueError(f"shared_experts={shared_experts} is impossible. Give 0 or more.")
        width = up_width(activation, d_ff)
        router = USMoE(k=min(2, num_experts)) if router is None else router
        self.num_experts = num_experts
        self.cut = MovingCut()
        self.reroute(router)
        self.activation = activation
        self.debug = debug
        self.gate = gate_of(gate, d_model, num_experts)
        self.up = nn.Parameter(torch.empty(num_experts, width, d_model))
        self.down = nn.Parameter(torch.empty(num_experts, d_model, d_ff))
        self.up_bias = nn.Parameter(torch.zeros(num_experts, width)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(num_experts, d_model)) if bias else None
        shared = shared_experts * d_ff
        self.shared_up = nn.Linear(d_model, width * shared_experts, bias=bias) if shared else None
        self.shared_down = nn.Linear(shared, d_model, bias=bias) if shared else None
        for weight in (self.up, self.down):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        *,
        valid: Bool[Tensor, "B L"] | None = None,
        segments: Int[Tensor, "B L"] | None = None,
        state: Any = None,
    ) -> tuple[Float[Tensor, "B L D"], RouterOutput]:
        """The layer's output, and the RouterOutput (routing and logits).

        valid (False for padding), segments and state are those of `usmoe.route`. The output has the dtype of x, or of
        autocast where that is on.
        """
        if x.ndim != 3 or x.shape[-1] != self.up.shape[-1]:
            raise ValueError(f"x is {tuple(x.shape)}. Give (sequences, tokens, {self.up.shape[-1]}).")
        if valid is not None and not padding_counts(self.router):  # a NaN in padding times a gradient of 0 is a NaN
            x = x.masked_fill(~valid.bool().unsqueeze(-1), 0)
        logits = self.gate(x)
        if self.debug:
            check(logits, valid, segments, padding_counts(self.router))
        # compiled code breaks its graph here: the pairs are data, and the selection stays exact
        compiling = torch.compiler.is_compiling()
        router: Any = torch.compiler.disable(self.router) if compiling else self.router
        routing = call(router, logits, valid, segments=segments, state=state)
        if self.training and not is_causal(self.router):
            update: Any = torch.compiler.disable(self.cut.update) if compiling else self.cut.update
            update(routing.cut, self.router)
        activation = ACTIVATIONS[self.activation]
        flat = x.flatten(0, 1)
        y = experts_by_pairs(flat, routing, self.up, self.down, activation, self.up_bias, self.down_bias)
        y = y.view_as(x)
        if self.shared_up is not None and self.shared_down is not None:
            y = y + self.shared_down(activation(self.shared_up(x)))
        return y, RouterOutput(routing=routing, logits=logits)

    def reroute(self, router: Any) -> None:
        """Route by another router from now on. Raises ValueError for one that cannot work with so many experts."""
        self.cut.prepare(_refuse_impossible(router, self.num_experts))
        self.router = router

    def extra_repr(self) -> str:
        experts, d_model, d_ff = self.down.shape
        return (
            f"d_model={d_model}, d_ff={d_ff}, num_experts={experts}, activation={self.activation}, router={self.router}"
        )


def _refuse_impossible(router: Any, num_experts: int) -> Tensor | None:
    """A router that can never route here is refused when the layer is made, not at its first batch. Its cut of a token,
    where it says one."""
    if isinstance(router, OwnChoice):
        raise ValueError(
            "OwnChoice() is a pretrained model's own rule; a new layer has none. Name one: TokenChoice(k=2)."
        )
    refuse_what_is_no_router(router)
    return router(torch.zeros(1, 1, num_experts)).cut if isinstance(router, Router) else None
