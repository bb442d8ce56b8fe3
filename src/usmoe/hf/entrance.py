"""The way into a model that is patched: what stands in place of `forward` on each module that holds MoE layers.

Hooks would not do: torch runs them for `model(...)`, and not for `model.forward(...)`, which sentence-transformers and
peft call.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from usmoe.hf.forward import Patch, enter, leave, settle


class Entrance:
    """A module's own forward, with `enter` before it and `leave` after it, whatever becomes of it."""

    def __init__(self, state: Patch, module: nn.Module) -> None:
        self.state, self.module = state, module
        self.whole = isinstance(module, PreTrainedModel)
        self.before: Any = module.__dict__.get("forward")
        """What another library had put there; None for the forward of the module's class."""
        self.__signature__ = inspect.signature(module.forward)
        """That of the module's own forward: Trainer, generate() and sentence-transformers choose arguments by it."""

    def _plainly(self, args: Any, kwargs: Any) -> Any:
        """What the module's own forward says."""
        if self.before is not None:
            return self.before(*args, **kwargs)
        forward: Any = type(self.module).forward
        return forward(self.module, *args, **kwargs)

    @torch.compiler.disable(recursive=False)  # a compiler takes the modules inside
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state = self.state
        if not state.installed:  # what another library keeps of a patch that is gone
            return self._plainly(args, kwargs)
        if not self.whole and not state.idle:  # a part in its place
            if state.current.unsettled:
                settle(state, _named(self.__signature__, args, kwargs))
            return self._plainly(args, kwargs)
        kwargs = enter(state, self.module, _named(self.__signature__, args, kwargs), kwargs)
        output = None
        try:
            output = self._plainly(args, kwargs)
        finally:
            output = leave(state, self.module, args, kwargs, output)
        return output


def _named(signature: inspect.Signature, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by their names, those too that the function takes as **kwargs."""
    given = signature.bind_partial(*args, **kwargs).arguments
    rest = next((name for name, one in signature.parameters.items() if one.kind is one.VAR_KEYWORD), "")
    return given | given.get(rest, {})


def open_entrances(state: Patch, model: nn.Module) -> None:
    """Put an Entrance on a model, on the models inside of it that hold its MoE layers, and on their parts that do; on a
    block itself where it is handed the mask."""
    blocks = {block for layer in state.layers for block in layer.blocks}
    for module in model.modules():
        if isinstance(module, nn.ModuleList | nn.ModuleDict) or not any(inner in blocks for inner in module.modules()):
            continue
        if module not in blocks or "attention_mask" in inspect.signature(module.forward).parameters:
            module.forward = Entrance(state, module)  # pyright: ignore[reportAttributeAccessIssue]


def close_entrances(state: Patch, model: nn.Module) -> None:
    """Take them away again, also from modules that were copied since."""
    state.installed = False
    for module in model.modules():
        found = module.__dict__.get("forward")
        if isinstance(found, Entrance) and found.state is state:
            del module.forward
            if found.before is not None:
                module.forward = found.before
