"""`patch`: a pretrained MoE model under another router, in place, without training, and back again.

Three hooks do it. One on the model learns which tokens are padding; one on each MoE block learns how many sequences
there are; one on each router module replaces what it returns by our pairs, which the block hands on, untouched, to
our function in transformers' experts interface. No weight and no class is changed.
"""

from __future__ import annotations

import contextlib
import copy
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
from usmoe.layers.causal import FINDERS, Tracked
from usmoe.layers.cut import MovingCut
from usmoe.routing import OwnChoice
from usmoe.routing.host import Host
from usmoe.routing.router import Router, call, refuse_what_is_no_router
from usmoe.types import RouterOutput, is_causal, promises_of

Listener = Callable[[str, RouterOutput], None]
"""Called with the name of a layer and what its router said."""

_ATTRIBUTE = "_usmoe_patch"


@dataclass(kw_only=True, eq=False)
class Patch:
    """What a patched model carries: enough to route, to listen, and to undo it all."""

    layers: list[Layer]
    routers: list[Any]
    token: object
    """Who made it: a patch that is put back has the token that it had."""
    configs: list[tuple[nn.Module, Any]] = field(default_factory=list)
    """Experts modules, each with the configuration to restore."""
    handles: list[Any] = field(default_factory=list)
    valid: Tensor | None = None
    """(B, L) of the forward in progress (or the last one: gradient checkpointing runs layers again after it)."""
    running: bool = False
    """Whether the patched model's own forward is in progress."""
    listeners: list[Listener] = field(default_factory=list)
    grids: dict[str, tuple[int, int]] = field(default_factory=dict)
    """(B, L) of each block's input."""
    cuts: list[MovingCut] = field(default_factory=list)
    """Of each layer: where its selections fell in training."""


def patch(model: PreTrainedModel, router: Any) -> PreTrainedModel:
    """The same model, now routing by `router`; in place.

    router  one for all MoE layers, a list with one for each, or {layer name: router}, where layers that are not named
            keep their own choice. A field that is None means the model's own: its k, its score (correction bias
            included), its normalisation and scaling, with alpha 0. A router of the user's own is called as
            router(logits (B, L, E), valid (B, L) or None, host=...), where host carries the model's own rule.

    A model that is already patched is patched anew. With activation checkpointing, run backward before the next
    forward: the recomputation knows the padding of the last forward alone.

    Raises ValueError where the model has no MoE layer or one that is not supported, and where a router cannot work in a
    layer; the model is then as it was.
    """
    _refuse_nested(model)
    layers = supported_layers(model)
    routers = _one_for_each(router, layers)
    for layer, chosen in zip(layers, routers, strict=True):
        refuse_what_is_no_router(chosen)
        if isinstance(chosen, Router):
            chosen(torch.zeros(1, 1, layer.num_experts), host=_on_cpu(layer))
    _install(model, layers, routers, object())
    return model


def _install(
    model: PreTrainedModel,
    layers: list[Layer],
    routers: list[Any],
    token: object,
    cuts: list[MovingCut] | None = None,
) -> None:
    """Replace whatever patch there is; those who listen to the old one listen to the new one.

    cuts: what a patch that is put back had tracked.
    """
    old = patch_of(model)
    unpatch(model)
    state = Patch(
        layers=layers,
        routers=routers,
        token=token,
        listeners=[] if old is None else old.listeners,
        cuts=cuts or [MovingCut() for _ in layers],
    )
    setattr(model, _ATTRIBUTE, state)
    for name, module in model.named_modules():
        # models that hold MoE layers: the mask of a vision tower beside them is none of theirs
        holds = not name or any(layer.name.startswith(f"{name}.") for layer in layers)
        if holds and isinstance(module, PreTrainedModel):
            signature = inspect.signature(module.forward)
            if "attention_mask" in signature.parameters:
                learn = partial(_learn_padding, state, signature, module is model)
                state.handles.append(module.register_forward_pre_hook(learn, with_kwargs=True))
    state.handles.append(model.register_forward_hook(partial(_leave, state), always_call=True))
    for index, layer in enumerate(layers):
        assert layer.experts is not None
        # a configuration of their own for the experts: the model's may be shared with another model
        state.configs.append((layer.experts, layer.experts.config))
        layer.experts.config = copy.copy(layer.experts.config)
        layer.experts.config._experts_implementation_internal = IMPLEMENTATION  # pyright: ignore
        learn = partial(_learn_grid, state, layer.name)
        state.handles.append(layer.block.register_forward_pre_hook(learn, with_kwargs=True))
        state.handles.append(layer.router.register_forward_hook(partial(_reroute, state, index)))


def unpatch(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, routing by itself again; bit for bit as before. Nothing happens to one that is not patched."""
    state = patch_of(model)
    if state is not None:
        for handle in state.handles:
            handle.remove()
        for experts, config in state.configs:
            experts.config = config
        delattr(model, _ATTRIBUTE)
    return model


@contextlib.contextmanager
def patched(model: PreTrainedModel, router: Any) -> Iterator[PreTrainedModel]:
    """The model under `router` for the length of a with block; then as it was before, patched or not. A patch that was
    made inside of the block, by patch() or unpatch(), is left as it is."""
    before = patch_of(model)
    patch(model, router)
    mine = patch_of(model)
    assert mine is not None
    try:
        yield model
    finally:
        now = patch_of(model)
        if now is not None and now.token is mine.token:
            if before is None:
                unpatch(model)
            else:
                _install(model, before.layers, before.routers, before.token, before.cuts)


def patch_of(model: nn.Module) -> Patch | None:
    """The Patch that a model carries, or None."""
    return model.__dict__.get(_ATTRIBUTE)


@contextlib.contextmanager
def listening(model: PreTrainedModel, listener: Listener) -> Iterator[None]:
    """Call `listener` at every routing of a patched model in the with block, whatever patches come and go in it."""
    state = patch_of(model)
    assert state is not None
    state.listeners.append(listener)
    try:
        yield
    finally:
        state.listeners.remove(listener)


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


def _refuse_nested(model: PreTrainedModel) -> None:
    inside = [name for name, module in model.named_modules() if name and patch_of(module) is not None]
    if inside:
        raise ValueError(f"{inside[0]} of this model is patched by itself. Unpatch that module first: usmoe.unpatch().")
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    if patch_of(model) is None and any(getattr(hook, "func", None) is _reroute for hook in hooks):
        raise ValueError("This module is part of a model that is patched. Patch the whole model, or unpatch it first.")


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
    elif outermost or not state.running:
        if mask is not None:
            _refuse_unreadable(state, mask)
        state.valid = None
    if outermost or not state.running:
        _refuse_half_remembered(state, arguments.get("past_key_values"))
    if outermost:
        state.running = True
        _refuse_their_balance_loss(state, module, arguments | arguments.get("kwargs", {}))


def _refuse_unreadable(state: Patch, mask: Any) -> None:
    """Where tokens compete, padding must be known; a router that looks at one token alone may do without."""
    for router in state.routers:
        promises = promises_of(router)
        if not (promises.causal and promises.batch_independent):
            kind = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"that is a {type(mask).__name__}"
            raise ValueError(
                f"usmoe cannot tell from an attention mask {kind} which tokens are padding, and under {router} padding "
                "would compete. Give attention_mask (sequences, tokens), 0 for padding."
            )


def _refuse_half_remembered(state: Patch, cache: Any) -> None:
    """A router with memory must see a sequence from its first token on: the cache remembers keys and values alone."""
    if cache is None or not hasattr(cache, "get_seq_length") or not cache.get_seq_length():
        return
    for router in state.routers:
        if getattr(router, "remembers", False):
            raise ValueError(
                f"{router} remembers the tokens before, and a cache of keys and values does not hold what it needs to "
                "go on. Run the whole sequence with use_cache=False, or use pool=threshold without burst."
            )


def _leave(state: Patch, module: nn.Module, args: Any, output: Any) -> Any:
    """After the model's forward, also one that failed. A balance loss that it computed for token choice is none."""
    state.running = False
    if _others(state) and getattr(output, "aux_loss", None) is not None:
        output.aux_loss = None
    return output


def _others(state: Patch) -> list[Any]:
    """The routers that are not the model's own choice, as it is."""
    return [router for router in state.routers if router != OwnChoice()]


def _refuse_their_balance_loss(state: Patch, module: nn.Module, arguments: Mapping[str, Any]) -> None:
    asked = arguments.get("output_router_logits")
    asked = getattr(module.config, "output_router_logits", False) if asked is None else asked
    other = _others(state)
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
def _reroute(state: Patch, index: int, module: nn.Module, args: Any, output: tuple) -> tuple:
    layer, router = state.layers[index], state.routers[index]
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
    routing = call(router, logits, None if valid is None else valid.to(logits.device), host=layer.host)
    if module.training and not is_causal(router):
        state.cuts[index].update(routing.cut, router)
    said = RouterOutput(routing=routing, logits=logits)
    for listener in state.listeners:
        listener(layer.name, said)
    replaced = list(output)
    replaced[where.weights] = routing.weight
    replaced[where.indices] = routing.pair
    return tuple(replaced)


def _tracked_layers(model: nn.Module) -> list[Tracked]:
    """The layers of every patched model inside, for usmoe.to_causal."""
    return [
        Tracked(name=layer.name, router=router, cut=cut, become=partial(patch.routers.__setitem__, index))
        for patch in map(patch_of, model.modules())
        if patch is not None
        for index, (layer, router, cut) in enumerate(zip(patch.layers, patch.routers, patch.cuts, strict=True))
    ]


FINDERS.append(_tracked_layers)
