"""Where the MoE layers of a transformers model are, and what each of them does by itself.

Layers are found through the model's own declaration of what can be recorded (`_can_record_outputs["router_logits"]`
names the router module) and through the experts interface, never by a list of class names. A layer's own rule is
recognised by behaviour: the router runs on a few random states, and the rule that gives the same experts with the
same weights is its rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from usmoe.routing import OwnChoice
from usmoe.routing.host import Host


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """One MoE layer of a pretrained model."""

    name: str
    """Name of the block in the model, such as model.layers.0.mlp."""
    block: nn.Module
    """The module that holds router and experts; its input is (B, L, D)."""
    router: nn.Module
    experts: nn.Module | None
    num_experts: int
    host: Host | None
    """The layer's own rule, or None where it was not recognised."""
    outputs: RouterOutputs | None
    """Where in the router's output things stand."""
    reason: str | None = None
    """Why the layer cannot be patched; None where it can."""

    @property
    def flops_per_pair(self) -> int:
        """Floating-point operations of one token in one expert, 2 per multiply-add; forward."""
        assert self.experts is not None
        matrices = [p for p in self.experts.parameters(recurse=False) if p.ndim == 3]
        return sum(2 * p.numel() for p in matrices) // self.num_experts


@dataclass(frozen=True, kw_only=True)
class RouterOutputs:
    """Positions in the tuple that a router module returns."""

    logits: int
    weights: int
    indices: int


def moe_layers(model: nn.Module) -> list[Layer]:
    """Every MoE layer of the model, in order; empty for a model that is not a mixture of experts.

    Raises TypeError for what is not a transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"A {type(model).__name__} is not a transformers model. Give a PreTrainedModel, such as "
            "AutoModelForCausalLM.from_pretrained(...) returns; for a layer of your own use usmoe.MoE."
        )
    modules = dict(model.named_modules())
    return [_layer(name, module, index, modules) for name, module, index in _routers(model)]


def _routers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, int]]:
    """(name, router module, index of the logits in its output), in the order of the model's modules."""
    specs = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            recorded = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
            specs += recorded if isinstance(recorded, list | tuple) else [recorded] if recorded is not None else []
    for name, module in model.named_modules():
        for spec in specs:
            target = getattr(spec, "target_class", spec)
            inside = getattr(spec, "layer_name", None)
            if isinstance(target, type) and isinstance(module, target) and (inside is None or inside in name):
                yield name, module, getattr(spec, "index", 0)
                break


def _layer(name: str, router: nn.Module, index: int, modules: Mapping[str, nn.Module]) -> Layer:
    parent = name.rpartition(".")[0]
    block = modules[parent]
    found = [m for m in block.modules() if hasattr(m, "is_transposed") and hasattr(m, "_apply_gate")]
    experts = found[0] if len(found) == 1 else None
    number, host, outputs, reason = 0, None, None, None
    if experts is None:
        reason = "its experts are not behind transformers' experts interface"
    else:
        number = int(next(p for p in experts.parameters(recurse=False) if p.ndim == 3).shape[0])
        try:
            host, outputs = own_rule(router, index)
        except UnknownRuleError as error:
            reason = str(error)
    return Layer(
        name=parent,
        block=block,
        router=router,
        experts=experts,
        num_experts=number,
        host=host,
        outputs=outputs,
        reason=reason,
    )


class UnknownRuleError(ValueError):
    """A router whose rule is none of those that usmoe can express."""


@torch.no_grad()
def own_rule(router: nn.Module, logits_index: int = 0) -> tuple[Host, RouterOutputs]:
    """The rule that a router module follows, as a Host, and where its outputs stand.

    Raises UnknownRuleError, with the reason, where no rule gives what the router gives.
    """
    weight = getattr(router, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise UnknownRuleError("its router has no weight matrix of its own")
    experts = weight.shape[0]
    states = _probe(weight)
    training = router.training
    router.eval()
    try:
        # the forward itself, so that no hook of ours or another's sees the probe
        out = router.forward(states)
    except TypeError as error:
        raise UnknownRuleError("its router cannot be asked by itself: it needs more than the tokens") from error
    finally:
        router.train(training)
    outputs = _positions(out, logits_index, experts)
    logits, weights, indices = out[outputs.logits], out[outputs.weights], out[outputs.indices]
    k = indices.shape[-1]
    # by rank, not by index: where logits tie (in bfloat16 they do), which of the tied is taken is anybody's choice
    theirs = _by_rank(logits, indices, weights)
    for host in _candidates(router, k):
        ours = OwnChoice()(logits.unsqueeze(0), host=host)
        if len(ours.token) != indices.numel():
            continue
        mine = ours.mask().nonzero()[:, 1].view_as(indices)
        ranked = _by_rank(logits, mine, ours.dense().gather(1, mine))
        tolerance = 1e-4 if weights.dtype in (torch.float32, torch.float64) else 2e-2
        scale = _scale(theirs[1] / ranked[1], router, tolerance)
        close = torch.allclose(ranked[1] * scale, theirs[1], rtol=tolerance, atol=1e-6)
        if torch.equal(ranked[0], theirs[0]) and close:
            return dataclasses.replace(host, scale=scale), outputs
    raise UnknownRuleError("its router follows a rule that usmoe cannot express yet")


def _probe(weight: Tensor) -> Tensor:
    """64 random states (64, D) whose logits spread by 0.1 to 3, whatever the size of the router's weight: enough to
    tell rules apart, too little for a score to underflow."""
    states = torch.randn(64, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device)
    spread = (states @ weight.float().T).std(-1, keepdim=True).clamp(min=1e-6)
    wanted = torch.logspace(-1, 0.5, 64, device=weight.device)[:, None]
    return (states * wanted / spread).to(weight.dtype)


def _by_rank(logits: Tensor, indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and weights (64, k) of the chosen experts, both by falling logit (and weight, where logits tie)."""
    chosen, weights = logits.gather(1, indices.long()).double(), weights.double()
    order = weights.argsort(dim=1, descending=True, stable=True)
    chosen, weights = chosen.gather(1, order), weights.gather(1, order)
    order = chosen.argsort(dim=1, descending=True, stable=True)
    return chosen.gather(1, order), weights.gather(1, order)


def _positions(out: Any, logits_index: int, experts: int) -> RouterOutputs:
    """Logits are where the recorder says, (T, E); the indices are the integers (T, k), the weights the floats beside
    them."""
    if not isinstance(out, tuple):
        raise UnknownRuleError("its router returns logits alone, and the block chooses the experts")
    integers = [i for i, x in enumerate(out) if isinstance(x, Tensor) and not x.is_floating_point() and x.ndim == 2]
    if len(integers) != 1:
        raise UnknownRuleError("its router does not return one matrix of chosen experts")
    shape = out[integers[0]].shape
    floats = [i for i, x in enumerate(out) if isinstance(x, Tensor) and x.is_floating_point() and x.shape == shape]
    weights = [i for i in floats if i != logits_index] or floats
    if len(weights) != 1 or out[logits_index].shape[-1] != experts:
        raise UnknownRuleError("its router does not return logits (tokens, experts) and one matrix of weights")
    return RouterOutputs(logits=logits_index, weights=weights[0], indices=integers[0])


def _candidates(router: nn.Module, k: int) -> Iterator[Host]:
    bias = next(
        (b for name, b in [*router.named_buffers(), *router.named_parameters()] if name == "e_score_correction_bias"),
        None,
    )
    for score in ("softmax", "sigmoid"):
        for normalize in ("none", "chosen"):
            yield Host(k=k, score=score, normalize=normalize, bias=bias, alpha=0.0)


def _scale(ratio: Tensor, router: nn.Module, tolerance: float) -> float:
    """The common factor of the weights: 1, or the factor that the router names, where it is that to rounding."""
    middle = ratio.double().nanmedian().item() if ratio.numel() else 1.0
    named = getattr(router, "routed_scaling_factor", None)
    for known in (1.0, named):
        if isinstance(known, int | float) and abs(middle - known) <= tolerance * abs(known):
            return float(known)
    return middle
