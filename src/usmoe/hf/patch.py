"""`patch`: a pretrained MoE model under another router, in place, without training, and back again.

Three hooks do it. One on the model learns which tokens are padding; one on each MoE block learns how many sequences
there are; one on each router module replaces what it returns by our pairs, which the block hands on, untouched, to
our function in transformers' experts interface. No weight and no class is changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from usmoe.hf.experts import IMPLEMENTATION
from usmoe.hf.layers import Layer, moe_layers
from usmoe.routing import OwnChoice
from usmoe.routing.host import Host
from usmoe.routing.router import Router
from usmoe.types import RouterOutput

Listener = Callable[[str, RouterOutput], None]
"""Called with the name of a layer and what its router said."""

_ATTRIBUTE = "_usmoe_patch"


@dataclass(kw_only=True, eq=False)
class Patch:
    """What a patched model carries: enough to route, to listen, and to undo it all."""

    layers: list[Layer]
    routers: list[Any]
    previous: str
    """The experts implementation to restore."""
    handles: list[Any] = field(default_factory=list)
    valid: Tensor | None = None
    """(B, L) of the forward in progress (or the last one: gradient checkpointing runs layers again after it)."""
    listeners: list[Listener] = field(default_factory=list)
    grids: dict[str, tuple[int, int]] = field(default_factory=dict)
    """(B, L) of each block's input."""


def patch(model: PreTrainedModel, router: Any) -> PreTrainedModel:
    """The same model, now routing by `router`; in place.

    router  one for all MoE layers, a list with one for each, or {layer name: router}, where layers that are not named
            keep their own choice. A field that is None means the model's own: its k, its score (correction bias
            included), its normalisation and scaling, with alpha 0.

    A model that is already patched is patched anew. Raises ValueError where the model has no MoE layer or one that is
    not supported, and where a router cannot work in a layer; the model is then as it was.
    """
    routed = {name: module for name, module in model.named_modules() if getattr(module, _ATTRIBUTE, None) is not None}
    inside = [name for name in routed if name]
    if inside:
        raise ValueError(f"{inside[0]} of this model is patched by itself. Unpatch that module first: usmoe.unpatch().")
    layers = supported_layers(model)
    routers = _one_for_each(router, layers)
    for layer, chosen in zip(layers, routers, strict=True):
        _refuse_impossible(chosen, layer)
    unpatch(model)
    state = Patch(layers=layers, routers=routers, previous=model.config._experts_implementation or "eager")
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and "attention_mask" in inspect.signature(module.forward).parameters:
            outermost = module is model
            hook = partial(_learn_padding, state, inspect.signature(module.forward), outermost)
            state.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    for layer, chosen in zip(layers, routers, strict=True):
        state.handles.append(
            layer.block.register_forward_pre_hook(partial(_learn_grid, state, layer.name), with_kwargs=True)
        )
        state.handles.append(layer.router.register_forward_hook(partial(_reroute, state, layer, chosen)))
    model.set_experts_implementation(IMPLEMENTATION)
    setattr(model, _ATTRIBUTE, state)
    return model


def unpatch(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, routing by itself again; bit for bit as before. Nothing happens to one that is not patched."""
    state: Patch | None = getattr(model, _ATTRIBUTE, None)
    if state is not None:
        for handle in state.handles:
            handle.remove()
        model.set_experts_implementation(state.previous)
        delattr(model, _ATTRIBUTE)
    return model


@contextlib.contextmanager
def patched(model: PreTrainedModel, router: Any) -> Iterator[PreTrainedModel]:
    """The model under `router` for the length of a with block; then as it was before, patched or not."""
    before = patch_of(model)
    patch(model, router)
    try:
        yield model
    finally:
        if before is None:
            unpatch(model)
        else:
            patch(model, before.routers)


def patch_of(model: nn.Module) -> Patch | None:
    """The Patch that a model carries, or None."""
    return getattr(model, _ATTRIBUTE, None)


def supported_layers(model: PreTrainedModel) -> list[Layer]:
    """The MoE layers of a model that can be patched; ValueError, with the reason, for one that cannot."""
    layers = moe_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no MoE layer that transformers declares, so there is nothing to route. "
            "Give a mixture-of-experts model, such as OLMoE, Mixtral or Qwen-MoE."
        )
    for layer in layers:
        if layer.reason:
            raise ValueError(
                f"{layer.name} of {type(model).__name__} cannot be patched: {layer.reason}. "
                "usmoe.supported(model) lists every layer."
            )
    return layers


def _one_for_each(router: Any, layers: Sequence[Layer]) -> list[Any]:
    names = [layer.name for layer in layers]
    if isinstance(router, Mapping):
        for name in router:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, 1)
                raise ValueError(
                    f"There is no MoE layer {name!r}."
                    + (f" Did you mean {near[0]!r}?" if near else "")
                    + f" The layers are {names[0]} to {names[-1]}."
                )
        return [router.get(name, OwnChoice()) for name in names]
    if isinstance(router, list | tuple):
        if len(router) != len(layers):
            raise ValueError(
                f"{len(router)} routers were given for {len(layers)} MoE layers. Give one for each, or one."
            )
        return list(router)
    return [router] * len(layers)


def _refuse_impossible(router: Any, layer: Layer) -> None:
    if isinstance(router, Router):
        router(torch.zeros(1, 1, layer.num_experts), host=_on_cpu(layer))
    elif not callable(router):
        raise TypeError(f"router={router!r} is not a router. Give one of usmoe's, or a callable (logits, valid, **kw).")


def _on_cpu(layer: Layer) -> Host:
    host = layer.host
    assert host is not None
    return dataclasses.replace(host, bias=None if host.bias is None else host.bias.detach().cpu())


def _learn_padding(
    state: Patch, signature: inspect.Signature, outermost: bool, module: nn.Module, args: Any, kwargs: Any
) -> None:
    """Before a model's forward: which tokens are real, from its attention mask. An inner model that is handed none
    (or one that the outer has already worked into another form) leaves what the outer said."""
    arguments = signature.bind_partial(*args, **kwargs).arguments
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        tokens = arguments.get("input_ids")
        tokens = arguments.get("inputs_embeds") if tokens is None else tokens
        length = mask.shape[1] if tokens is None else tokens.shape[1]
        state.valid = mask[:, mask.shape[1] - length :].bool()
    elif outermost:
        state.valid = None
    if outermost:
        _refuse_their_balance_loss(state, module, arguments | arguments.get("kwargs", {}))


def _refuse_their_balance_loss(state: Patch, module: nn.Module, arguments: Mapping[str, Any]) -> None:
    asked = arguments.get("output_router_logits")
    asked = getattr(module.config, "output_router_logits", False) if asked is None else asked
    other = [router for router in state.routers if not isinstance(router, OwnChoice)]
    if asked and other and arguments.get("labels") is not None:
        raise ValueError(
            f"output_router_logits=True adds a balance loss that assumes token choice, and this model routes by "
            f"{other[0]}. Leave it off, and compute a balance loss from usmoe.record(model) if you want one."
        )


@torch.compiler.disable
def _learn_grid(state: Patch, name: str, block: nn.Module, args: Any, kwargs: Any) -> None:
    hidden = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
    if isinstance(hidden, Tensor) and hidden.ndim == 3:
        state.grids[name] = (hidden.shape[0], hidden.shape[1])
    else:
        state.grids.pop(name, None)


@torch.compiler.disable  # the pairs are data: compiled code breaks its graph here
def _reroute(state: Patch, layer: Layer, router: Any, module: nn.Module, args: Any, output: tuple) -> tuple:
    where = layer.outputs
    assert where is not None
    flat = output[where.logits]
    batch, length = state.grids.get(layer.name, (1, len(flat)))
    logits = flat.view(batch, length, -1)
    valid = state.valid
    if valid is not None and tuple(valid.shape) != (batch, length):
        raise ValueError(
            f"{layer.name} sees {batch} x {length} tokens, but the attention mask speaks of {tuple(valid.shape)}. "
            "usmoe cannot tell which of them are padding."
        )
    routing = router(logits, None if valid is None else valid.to(logits.device), host=layer.host)
    said = RouterOutput(routing=routing, logits=logits)
    for listener in state.listeners:
        listener(layer.name, said)
    replaced = list(output)
    replaced[where.weights] = routing.weight
    replaced[where.indices] = routing.pair
    return tuple(replaced)
