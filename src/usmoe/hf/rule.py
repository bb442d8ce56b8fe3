"""A pretrained model's own rule as a value: what its router does, where it keeps what may change, and what its block is
handed in place of what the router said. `usmoe.hf.recognise` finds it."""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from usmoe.routing.host import Host
from usmoe.types import Routing


@dataclass(frozen=True, kw_only=True)
class Source:
    """A tensor of one value an expert, read where it lives: training, loading and moving a model may replace it."""

    path: str
    """Name in the router, or in the block."""
    in_block: bool = False

    def read(self, router: nn.Module, block: nn.Module) -> Tensor:
        return operator.attrgetter(self.path)(block if self.in_block else router).reshape(-1)


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Positions in the tuple that a router module returns, and what stands there."""

    logits: int
    weights: int
    indices: int
    shared: int | None = None
    """Weights of experts that every token uses, normalised together with the chosen ones (tokens, shared experts)."""
    probabilities: bool = False
    """Whether the softmax of the logits stands where the logits should be."""

    def read_logits(self, out: tuple) -> Tensor:
        """(T, columns): logits, or what has the same softmax as they have."""
        values = out[self.logits]
        values = values.reshape(-1, values.shape[-1])
        return values.clamp(min=torch.finfo(values.dtype).tiny).log() if self.probabilities else values


@dataclass(frozen=True, kw_only=True, eq=False)
class Rule:
    """A router's own rule, and where it keeps what may change."""

    host: Host
    """Without what is read live."""
    outputs: Outputs
    null_experts: int = 0
    """Columns of the logits beyond the experts: a token that chooses one of them skips (its weight is 0)."""
    bias: Source | None = None
    scale: Source | None = None

    def live(self, router: nn.Module, block: nn.Module) -> Host:
        """The rule with the correction bias and the factors that the model has now."""
        host = self.host
        if self.bias is not None:
            host = dataclasses.replace(host, bias=self.bias.read(router, block))
        if self.scale is not None:
            factors = self.scale.read(router, block) * host.scale
            host = dataclasses.replace(host, scale=torch.nn.functional.pad(factors, (0, self.null_experts)))
        return host

    def hand_on(self, out: tuple, routing: Routing, logits: Float[Tensor, "T C"]) -> tuple[Routing, tuple]:
        """What the block gets in place of the router's output: our pairs, flat, and their weights. And the Routing
        without the null experts, whose pairs nobody computes.

        Experts that every token uses and whose weights are normalised together with the chosen ones get what the new
        choice leaves them: with s their scores, w = c * score / (sum of the chosen scores + sum of s).
        """
        replaced = list(out)
        if self.null_experts:
            routing = _without_null(routing, routing.num_experts - self.null_experts)
        if self.outputs.shared is not None:
            weights, shared = out[self.outputs.weights], out[self.outputs.shared]
            theirs = self.host.weighing_scores(logits)
            best = weights.argmax(-1, keepdim=True)
            per_score = weights.gather(1, best) / theirs.gather(1, out[self.outputs.indices].gather(1, best))
            always = shared / per_score  # the shared experts' scores, (T, shared)
            whole = weights.sum(-1) + shared.sum(-1)  # c
            pairs = theirs[routing.token, routing.expert]
            chosen = torch.zeros_like(whole, dtype=theirs.dtype).index_add(0, routing.token, pairs)
            total = chosen + always.sum(-1)
            replaced[self.outputs.shared] = (always * (whole / total).unsqueeze(-1)).to(shared.dtype)
            routing = dataclasses.replace(routing, weight=routing.weight * (whole * chosen / total)[routing.token])
        replaced[self.outputs.weights] = routing.weight
        replaced[self.outputs.indices] = routing.pair
        return routing, tuple(replaced)


def _without_null(routing: Routing, experts: int) -> Routing:
    kept = routing.expert < experts
    return dataclasses.replace(
        routing,
        token=routing.token[kept],
        expert=routing.expert[kept],
        weight=routing.weight[kept],
        num_experts=experts,
    )
