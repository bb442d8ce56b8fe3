"""The way into a model that is patched: what stands in place of `forward` on each module that holds MoE layers.

Hooks would not do: torch runs them for `model(...)`, and not for `model.forward(...)`, which sentence-transformers and
peft call. It is a `functools.partial`, so that a copy of a module has one of its own.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from usmoe.hf.forward import Patch, enter, leave, settle
from usmoe.layers.mode import DATA, refuse_recording

_ENTERED = "_usmoe_entered"
"""Attribute of a module that has an entrance: the Patch of which it is."""


def entrance(
    state: Patch, module: nn.Module, before: Any, signature: inspect.Signature, *args: Any, **kwargs: Any
) -> Any:
    """What stands in place of a module's forward. Raises RuntimeError under what would record the pairs of one text,
    and route every other text by them."""
    refuse_recording("model", "Use torch.compile(model) instead, or usmoe.unpatch(model) before it.")
    return _run(state, module, before, signature, *args, **kwargs)


@torch.compiler.disable(recursive=False, reason=DATA)  # a compiler takes the modules inside
def _run(state: Patch, module: nn.Module, before: Any, signature: inspect.Signature, *args: Any, **kwargs: Any) -> Any:
    """A module's own forward, with `enter` before it and `leave` after it, whatever becomes of it.

    before     what another library had put in place of the forward of the module's class; None where none had
    signature  of that forward
    """
    own: Any = partial(type(module).forward, module) if before is None else before
    if module.__dict__.get(_ENTERED) is not state:  # what another library keeps of a patch that is gone
        return own(*args, **kwargs)
    if not isinstance(module, PreTrainedModel) and not state.idle:  # a part in its place
        if state.current.unsettled:
            settle(state, _named(signature, args, kwargs))
        return own(*args, **kwargs)
    kwargs = enter(state, module, _named(signature, args, kwargs), kwargs)
    output = None
    try:
        output = own(*args, **kwargs)
    finally:
        output = leave(state, module, args, kwargs, output)
    return output


def _named(signature: inspect.Signature, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by their names, those too that the module takes as **kwargs."""
    given = signature.bind_partial(*args, **kwargs).arguments
    rest = next((name for name, one in signature.parameters.items() if one.kind is one.VAR_KEYWORD), "")
    return given | given.get(rest, {})


def open_entrances(state: Patch, model: nn.Module) -> None:
    """Put an entrance on a model, on the models inside of it that hold its MoE layers, and on their parts that do; on a
    block itself where it is handed the mask."""
    blocks = {block for layer in state.layers for block in layer.blocks}
    for module in model.modules():
        if isinstance(module, nn.ModuleList | nn.ModuleDict) or not any(inner in blocks for inner in module.modules()):
            continue
        signature = _without_annotations(inspect.signature(module.forward))
        if module not in blocks or "attention_mask" in signature.parameters:
            put: Any = partial(entrance, state, module, module.__dict__.get("forward"), signature)
            put.__wrapped__ = module.forward  # Trainer, generate() and sentence-transformers choose arguments by it
            module.forward = put
            setattr(module, _ENTERED, state)


def _without_annotations(signature: inspect.Signature) -> inspect.Signature:
    """The names and defaults alone: a type such as `Tensor | None` would keep joblib from hashing the model."""
    plain = [one.replace(annotation=one.empty) for one in signature.parameters.values()]
    return inspect.Signature(plain)


def close_entrances(state: Patch, model: nn.Module) -> None:
    """Take them away again, also from modules that were copied since."""
    for module in model.modules():
        if module.__dict__.get(_ENTERED) is not state:
            continue
        delattr(module, _ENTERED)
        found = module.__dict__.get("forward")
        if isinstance(found, partial) and found.args and found.args[0] is state:
            del module.forward
            if found.args[2] is not None:
                module.forward = found.args[2]
