"""`MoE`: a sparse mixture-of-experts feed-forward layer under any router."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from usmoe.experts.compute import ACTIVATIONS, experts_by_pairs, refuse_no_size, up_width
from usmoe.layers.cut import MovingCut
from usmoe.layers.mode import DATA, refuse_recording, under_transformation
from usmoe.layers.threshold_form import moving_threshold, threshold_form
from usmoe.routing import OwnChoice, USMoE
from usmoe.routing.gates import GateOutput, gate_of
from usmoe.routing.route import check
from usmoe.routing.router import Router, call, padding_counts, refuse_what_is_no_router
from usmoe.routing.scores import in_float32_at_least
from usmoe.types import RouterOutput, Routing, is_causal


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
        noise: float = 0.0,
        dropout: float = 0.0,
        vocabulary: int | None = None,
        moving: bool = False,
        debug: bool = False,
    ) -> None:
        """
        d_model         D, width of a token
        d_ff            F, width of one expert
        num_experts     E
        router          any router; by default USMoE(k=2) (k=1 where there is one expert)
        activation      swiglu: silu(x W) * x V, then down; relu: relu(x W), then down
        bias            whether the projections of the experts have one
        gate            linear | cosine | noisy | frozen | stable | bias, or a module: (B, L, D) -> (B, L, E), or a
                        GateOutput
        shared_experts  experts of width F that every token passes, beside the routed ones
        noise           standard deviation of Gaussian noise on the logits, in training mode alone
        dropout         share of an expert's hidden units that are dropped, in training mode alone
        vocabulary      number of token ids, for a gate that is given by name and reads them (stable)
        moving          route by the threshold that the moving average of the router's cuts makes, from the second batch
                        of training on and in evaluation mode: the layer is causal then, and its budget is met on
                        average. The router, which must have a threshold form, goes on saying where the cut falls.
                        With ExpertChoice(pool="batch") this is Expert Threshold (arXiv 2603.11535). It stalls a GPU,
                        and does not go with activation checkpointing: the second pass would see the next average
        debug           check logits, valid and segments at every call, as route() does; this stalls a GPU

        Raises ValueError for sizes below 1, unknown names, and a router that cannot work with so many experts, with
        this gate, or with `moving`.
        """
        super().__init__()
        refuse_no_size(d_model=d_model, d_ff=d_ff, num_experts=num_experts)
        if moving and router is not None and is_causal(router):
            raise ValueError(f"{router} is causal as it is: moving=True has no meaning with it. Leave it out.")
        if shared_experts < 0:
            raise ValueError(f"shared_experts={shared_experts} is impossible. Give 0 or more.")
        if not 0 <= noise < math.inf:
            raise ValueError(f"noise={noise} is no standard deviation. Give 0 or more.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} is no share of hidden units. Choose 0 <= dropout < 1.")
        width = up_width(activation, d_ff)
        router = USMoE(k=min(2, num_experts)) if router is None else router
        self.num_experts = num_experts
        self.cut = MovingCut()
        self.gate = gate_of(gate, d_model, num_experts, vocabulary)
        self.moving = moving
        self.reroute(router)
        self.activation = activation
        self.noise = noise
        self.dropout = dropout
        self.debug = debug
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
        tokens: Int[Tensor, "B L"] | None = None,
    ) -> tuple[Float[Tensor, "B L D"], RouterOutput]:
        """The layer's output, and the RouterOutput (routing and logits).

        valid (False for padding), segments and state are those of `usmoe.route`. tokens are token ids, for a gate that
        reads them (`reads_tokens`); other gates never see them. The output has the dtype of x, or of autocast where
        that is on.
        """
        refuse_recording("layer", "Use torch.compile(layer) instead.")
        if x.ndim != 3 or x.shape[-1] != self.up.shape[-1]:
            raise ValueError(f"x is {tuple(x.shape)}. Give (sequences, tokens, {self.up.shape[-1]}).")
        if valid is not None and not padding_counts(self.router):  # a NaN in padding times a gradient of 0 is a NaN
            x = x.masked_fill(~valid.bool().unsqueeze(-1), 0)
            tokens = None if tokens is None else tokens.masked_fill(~valid.bool(), 0)
        if x.is_meta:
            raise ValueError(
                "A batch on the meta device has no values, so nothing can be routed. Move the layer to a device first: "
                "layer.to_empty(device=...), then load its weights."
            )
        gated = self._gated(x, tokens)
        if self.debug:
            check(gated.logits, valid, segments, padding_counts(self.router))
        # compiled code breaks its graph here: the pairs are data, and the selection stays exact
        compiling = torch.compiler.is_compiling()
        if compiling:
            torch._dynamo.graph_break(msg=DATA)
        routed: Any = torch.compiler.disable(self._routed) if compiling else self._routed
        routing = routed(gated, valid, segments, state)
        activation = self._activated if self.dropout and self.training else ACTIVATIONS[self.activation]
        flat = x.flatten(0, 1)
        y = experts_by_pairs(flat, routing, self.up, self.down, activation, self.up_bias, self.down_bias)
        y = y.view_as(x)
        if self.shared_up is not None and self.shared_down is not None:
            y = y + self.shared_down(activation(self.shared_up(x)))
        return y, RouterOutput(routing=routing, logits=gated.logits, distilled=gated.distilled)

    def _gated(self, x: Tensor, tokens: Tensor | None) -> GateOutput:
        """What the gate says, with the noise of training."""
        said = self.gate(x, tokens) if getattr(self.gate, "reads_tokens", False) else self.gate(x)
        gated = said if isinstance(said, GateOutput) else GateOutput(logits=said)
        if not (self.noise and self.training) or gated.fixed:
            return gated
        noisy = gated.logits + self.noise * torch.randn_like(gated.logits)
        return dataclasses.replace(gated, logits=noisy)

    def _routed(self, gated: GateOutput, valid: Tensor | None, segments: Tensor | None, state: Any) -> Routing:
        """What the router says, weighed by the gate where it has weights."""
        given: dict[str, Any] = {"segments": segments, "host": gated.host}
        router = self._moved() if self.moving else self.router
        routing = call(router, gated.logits, valid, state=state, **given)
        if not under_transformation():
            other = None if router is self.router else partial(call, self.router, gated.logits, valid, **given)
            self._track(routing, router, other)
        if gated.weights is None:
            return routing
        weight = in_float32_at_least(gated.weights).reshape(-1).gather(0, routing.pair)
        return dataclasses.replace(routing, weight=weight)

    @torch.no_grad()
    def _track(self, routing: Routing, router: Any, look_ahead: Callable[[], Routing] | None) -> None:
        """What is learnt outside of gradients: in training mode the cut, and the bias of a gate that has one.

        look_ahead: gives the route of the layer's own router, where a moving threshold routes in its place
        """
        if not self.training:
            self.cut.observe(routing, router)
            return
        if not is_causal(self.router):
            self.cut.update((routing if look_ahead is None else look_ahead()).cut, self.router)
        if hasattr(self.gate, "observe"):
            self.gate.observe(routing)  # pyright: ignore[reportCallIssue]

    def _moved(self) -> Any:
        """The threshold router of the moving average; before there is one, in training mode, the router itself."""
        if is_causal(self.router):  # usmoe.to_causal was here
            return self.router
        threshold = moving_threshold(self.cut, self.router)
        if threshold is not None:
            return threshold_form(self.router, threshold)
        if not self.training:
            raise ValueError(
                f"The layer routes by the moving average of the cut of {self.router}, and has tracked none yet. "
                "Run a batch in training mode first (model.train()), or load a checkpoint."
            )
        return self.router

    def _activated(self, hidden: Float[Tensor, "N H"]) -> Float[Tensor, "N F"]:
        """The activation, with the dropout of training."""
        return F.dropout(ACTIVATIONS[self.activation](hidden), self.dropout)

    def reroute(self, router: Any) -> None:
        """Route by another router from now on. Raises ValueError for one that cannot work with so many experts, with
        the gate, or with `moving`."""
        cut = _refuse_impossible(router, self.num_experts)
        if getattr(self.gate, "has_bias", False) and not getattr(router, "heeds_bias", False):
            raise ValueError(
                f"{router} would not heed the bias that the gate balances by. Choose a router that ranks by the score "
                "of the gate: TokenChoice, USMoE or BoundedChoice without a score of its own, alpha below 1."
            )
        if self.moving and not is_causal(router):
            threshold_form(router, 0.0 if isinstance(router, USMoE) else (0.0,) * self.num_experts)
        self.cut.prepare(cut)
        self.router = router

    def extra_repr(self) -> str:
        experts, d_model, d_ff = self.down.shape
        shown = f"d_model={d_model}, d_ff={d_ff}, num_experts={experts}, activation={self.activation}"
        for name in ("noise", "dropout", "moving"):
            shown += f", {name}={getattr(self, name)}" if getattr(self, name) else ""
        return f"{shown}, router={self.router}"


def _refuse_impossible(router: Any, num_experts: int) -> Tensor | None:
    """A router that can never route here is refused when the layer is made, not at its first batch. Its cut of a token,
    where it says one."""
    if isinstance(router, OwnChoice):
        raise ValueError(
            "OwnChoice() is a pretrained model's own rule; a new layer has none. Name one: TokenChoice(k=2)."
        )
    refuse_what_is_no_router(router)
    with torch.device("cpu"):  # a layer may be made on the meta device, where nothing can be tried
        return router(torch.zeros(1, 1, num_experts)).cut if isinstance(router, Router) else None
