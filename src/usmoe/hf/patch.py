"""`patch`: a pretrained MoE model under another router, in place, without training, and back again.

It is done by what stands around the model's forward (usmoe.hf.entrance), and by hooks on each MoE block and on each
router module (usmoe.hf.forward). The block hands our pairs on, untouched, to our function in transformers' experts
interface. No weight and no class is changed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from usmoe.hf.adapters import follow_peft, write_beside_adapter
from usmoe.hf.entrance import close_entrances, open_entrances
from usmoe.hf.experts import IMPLEMENTATION, PATCHED
from usmoe.hf.forward import CARRIED, Hears, Listener, Patch, learn_grid, patch_of, reroute
from usmoe.hf.generation import ENGINES, forget_engine
from usmoe.hf.layers import Layer, behind_interface, moe_layers, plain_name
from usmoe.hf.packed import packed_experts, refuse_adapted
from usmoe.hf.saved import written
from usmoe.hf.turns import one_at_a_time
from usmoe.hf.wrapped import unwrapped
from usmoe.layers.budget import asked_of
from usmoe.layers.causal import FINDERS, Tracked
from usmoe.layers.cut import MovingCut
from usmoe.routing import OwnChoice
from usmoe.routing.host import Host
from usmoe.routing.router import Router, experts_per_token, refuse_what_is_no_router


@one_at_a_time
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
    inner = unwrapped(model)
    _refuse_nested(inner)
    refuse_adapted(inner)
    layers = supported_layers(inner)
    routers = one_for_each(router, layers)
    for layer, chosen in zip(layers, routers, strict=True):
        refuse_what_is_no_router(chosen)
        if isinstance(chosen, Router):
            _try(chosen, layer)
    _install(inner, layers, routers, object())
    follow_peft(patch_of)
    return model


def _try(router: Router, layer: Layer) -> None:
    """Let a router route one token of the layer's width, so that what cannot work is refused before the patch."""
    try:
        host = _on_cpu(layer.host)
        with torch.device("cpu"):
            router(torch.zeros(1, 1, layer.columns), host=host)
        if getattr(router, "k", None) is not None:  # also where a threshold does not read it
            experts_per_token(router.k, host, layer.columns)  # pyright: ignore[reportAttributeAccessIssue]
    except ValueError as error:
        raise ValueError(f"{layer.name}: {error}") from error


@one_at_a_time
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
    forget_engine(model)
    state = Patch(
        layers=layers,
        routers=routers,
        token=token,
        model=model,
        listeners=[] if old is None else old.listeners,
        cuts=cuts or [MovingCut() for _ in layers],
    )
    setattr(model, CARRIED, state)
    open_entrances(state, model)
    for index, layer in enumerate(layers):
        for block in layer.blocks:
            block.register_forward_pre_hook(partial(learn_grid, state, layer.name), with_kwargs=True)
        for router in layer.routers:
            router.register_forward_hook(partial(reroute, state, index))
        for experts in layer.experts_modules:
            # a configuration of their own for the experts: the model's may be shared with another model
            config = copy.copy(experts.config)
            setattr(config, PATCHED, experts.config)
            config._experts_implementation_internal = IMPLEMENTATION  # pyright: ignore
            experts.config = config
    for name, method in (*ENGINES.items(), ("save_pretrained", save_pretrained)):
        if hasattr(model, name):
            state.methods[name] = model.__dict__.get(name)
            setattr(model, name, types.MethodType(method, model))


@one_at_a_time
def unpatch(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, routing by itself again; bit for bit as before. Nothing happens to one that is not patched."""
    inner = unwrapped(model)
    state = patch_of(inner)
    if state is not None:
        forget_engine(inner)
        close_entrances(state, inner)
        for module in inner.modules():  # also those that were copied since, hooks and all
            _without_hooks(module, state)
            before = getattr(getattr(module, "config", None), PATCHED, None)
            if before is not None and behind_interface(module):
                module.config = before
        for name, before in state.methods.items():
            delattr(inner, name)
            if before is not None:
                setattr(inner, name, before)
        delattr(inner, CARRIED)
    return model


def _without_hooks(module: nn.Module, state: Patch) -> None:
    """Drop the hooks of a patch from a module."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        ours = [key for key, hook in hooks.items() if isinstance(hook, partial) and hook.args[:1] == (state,)]
        for key in ours:
            hooks.pop(key)
            for companion in _companions(module):
                companion.pop(key, None)


def _companions(module: nn.Module) -> list[Any]:
    """Where torch keeps what it knows of each hook."""
    return [
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
    ]


def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own save_pretrained(), with the routers, and the cuts that they have tracked in training, in the
    configuration, where usmoe.from_pretrained() finds them; plain transformers loads the model as it was before the
    patch."""
    state = patch_of(self)
    assert state is not None
    packed = packed_experts(self)
    if packed:
        raise ValueError(
            f"The experts of {packed[0]} are in 4 bits, and transformers cannot write them so. Save the model before "
            "its experts are quantised, and quantise them again after loading."
        )
    routers, cuts = _named(state, state.routers), _named(state, state.cuts)
    with written(self.config, routers, cuts):
        before = state.methods["save_pretrained"]
        said = type(self).save_pretrained(self, *args, **kwargs) if before is None else before(*args, **kwargs)
    if getattr(self, "_hf_peft_config_loaded", False):  # transformers then writes the adapter alone
        write_beside_adapter(Path(args[0] if args else kwargs["save_directory"]), routers, cuts)
    return said


def _named(state: Patch, values: list[Any]) -> dict[str, Any]:
    """{layer name: value} of one value a layer."""
    return {layer.name: value for layer, value in zip(state.layers, values, strict=True)}


def routers(model: nn.Module) -> dict[str, Any]:
    """{layer name: router} that a model is patched with, itself or within what wraps it (peft, torch.compile,
    DistributedDataParallel); empty where it is not patched.

    Of a module around a patched model, or of a part of one, it is what its own MoE layers route by, under their names
    in that module. Raises TypeError for what holds no transformers model, and ValueError for one that is sharded.
    """
    inner = unwrapped(model)
    state = patch_of(inner)
    if state is not None:
        return _named(state, state.routers)
    places = {id(module): plain_name(name) for name, module in inner.named_modules()}
    found = {}
    for module in inner.modules():
        for hook in module._forward_hooks.values():
            if isinstance(hook, partial) and hook.func is reroute:
                state, index = hook.args[:2]
                layer = state.layers[index]
                found[places.get(id(layer.block), layer.name)] = state.routers[index]
    return found


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
                _install(unwrapped(model), before.layers, before.routers, before.token, before.cuts)


@contextlib.contextmanager
def listening(model: PreTrainedModel, listener: Listener) -> Iterator[None]:
    """Call `listener` at every routing of a patched model in the with block, whatever patches come and go in it."""
    state = patch_of(model)
    assert state is not None
    hears = Hears(listener=listener)
    state.listeners.append(hears)
    try:
        yield
    finally:
        state.listeners.remove(hears)


def supported_layers(model: PreTrainedModel) -> list[Layer]:
    """The MoE layers of a model that can be patched; ValueError, with the reason, for one that cannot."""
    model = unwrapped(model)
    layers = moe_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no MoE layer that transformers declares, so there is nothing to route. "
            "Give a mixture-of-experts model, such as OLMoE, Mixtral or Qwen-MoE."
        )
    for layer in layers:
        if layer.reason and not layer.fixed:
            raise ValueError(
                f"{layer.name} of {type(model).__name__} cannot be patched: {layer.reason}. "
                "usmoe.supported(model) lists every layer."
            )
    free = [layer for layer in layers if not layer.fixed]
    if not free:
        raise ValueError(f"No layer of {type(model).__name__} can be patched: {layers[0].reason}.")
    return free


def one_for_each(router: Any, layers: Sequence[Layer]) -> list[Any]:
    """One router a layer, from one for all, a list, or {layer name: router}."""
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
    inside = [name for name, module in model.named_modules() if name and CARRIED in module.__dict__]
    if inside:
        raise ValueError(f"{inside[0]} of this model is patched by itself. Unpatch that module first: usmoe.unpatch().")
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    if patch_of(model) is None and any(getattr(hook, "func", None) is reroute for hook in hooks):
        raise ValueError("This module is part of a model that is patched. Patch the whole model, or unpatch it first.")


def _on_cpu(host: Host) -> Host:
    tensors = {name: getattr(host, name) for name in ("bias", "scale")}
    return dataclasses.replace(host, **{n: t.detach().cpu() for n, t in tensors.items() if isinstance(t, torch.Tensor)})


def _tracked_layers(model: nn.Module) -> list[Tracked]:
    """The layers of every patched model inside, for usmoe.to_causal."""
    return [
        Tracked(
            name=layer.name,
            router=router,
            cut=cut,
            become=partial(patch.routers.__setitem__, index),
            asked=partial(asked_of, router, layer.num_experts, layer.host),
        )
        for patch in (module.__dict__.get(CARRIED) for module in model.modules())
        if patch is not None
        for index, (layer, router, cut) in enumerate(zip(patch.layers, patch.routers, patch.cuts, strict=True))
    ]


FINDERS.append(_tracked_layers)
