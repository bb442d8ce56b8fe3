"""The ways in which a patched model generates: its own, after what cannot be right has been refused or said."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

from transformers.generation.configuration_utils import ContinuousBatchingConfig, GenerationMode

from usmoe.hf.forward import Patch, patch_of
from usmoe.hf.identity import text_of
from usmoe.hf.memory import refuse_continuous_batching
from usmoe.types import SAY_SO, is_causal, makes_promises


def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own generate(), with a warning, once, where its router looks ahead: what it then generates is not
    what it was scored on.

    Raises ValueError for assisted decoding under a router that remembers.
    """
    state = _patch(self)
    own = _own(self, state, "generate")
    given = inspect.signature(own).bind_partial(*args, **kwargs).arguments
    _refuse_assistance(self, state, given, given.get("kwargs", {}))
    _warn_of_look_ahead(state)
    return own(*args, **kwargs)


def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own init_continuous_batching(), through which generate_batch() and `transformers serve` go, too; with
    the same warning, and without graphs of the accelerator, which hold no route that is data.

    Raises ValueError under a router that remembers, and where such graphs are asked for.
    """
    state = _patch(self)
    refuse_continuous_batching(router for router in state.routers if getattr(router, "remembers", False))
    own = _own(self, state, "init_continuous_batching")
    bound = inspect.signature(own).bind_partial(*args, **kwargs)
    bound.arguments["continuous_batching_config"] = _without_graphs(self, bound.arguments)
    _warn_of_look_ahead(state)
    return own(*bound.args, **bound.kwargs)


ENGINES = {"generate": generate, "init_continuous_batching": init_continuous_batching}
"""Methods of a model while it is patched."""


_ENGINE = "_cached_continuous_batching_manager"


def forget_engine(model: Any) -> None:
    """Drop the engine of continuous batching that a model keeps from call to call (`persistent_manager`): its cache and
    its graphs are those of another route."""
    if _ENGINE in model.__dict__:
        model.destroy_cached_continuous_batching_manager()


def leave_engine(view: Any) -> None:
    """Leave such an engine to the model that a view is of: it goes on there."""
    view.__dict__.pop(_ENGINE, None)


def _patch(model: Any) -> Patch:
    state = patch_of(model)
    assert state is not None
    return state


def _own(model: Any, state: Patch, name: str) -> Any:
    """A method as it was before the patch."""
    before = state.methods[name]
    return getattr(type(model), name).__get__(model) if before is None else before


def _warn_of_look_ahead(state: Patch) -> None:
    ahead = next((router for router in state.routers if not is_causal(router)), None)
    if ahead is not None and not state.warned:
        state.warned = True
        if makes_promises(ahead):
            said = (
                f"{ahead} looks at tokens that are not generated yet, or at other sequences: step by step it routes "
                "otherwise than over a whole text. For generation use thresholds, "
                "usmoe.patch(model, usmoe.calibrate(model, batches, router)), or USMoE(pool='prefix')."
            )
        else:
            said = (
                f"{text_of(ahead)} does not promise that it is causal. If it looks at tokens that are not generated "
                f"yet, or at other sequences, it routes step by step otherwise than over a whole text. {SAY_SO}"
            )
        warnings.warn(said, stacklevel=3)


def _refuse_assistance(model: Any, state: Patch, given: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Assisted decoding takes tokens back; what a router that remembers has spent on them it cannot."""
    router = next((router for router in state.routers if getattr(router, "remembers", False)), None)
    if router is None or options.get("cache_implementation") == "paged":
        return
    config = copy.deepcopy(given.get("generation_config") or model.generation_config)
    for name, value in vars(model.generation_config).items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    for name in options.keys() & vars(config).keys():
        setattr(config, name, options[name])
    where = "with this model as assistant" if config.is_assistant else "under it"
    mode = config.get_generation_mode(given.get("assistant_model"))
    if config.is_assistant or mode == GenerationMode.ASSISTED_GENERATION:
        raise ValueError(
            f"{router} remembers the tokens before, and what it has spent on a token cannot be taken back: assisted "
            f"decoding, which drops tokens again, does not work {where}. Use a threshold without burst, or generate "
            "without an assistant."
        )


def _without_graphs(model: Any, given: Mapping[str, Any]) -> Any:
    """The configuration of continuous batching that was given, or the one that there would be, with graphs of the
    accelerator turned off."""
    generation = given.get("generation_config") or model.generation_config
    config = given.get("continuous_batching_config") or getattr(generation, "continuous_batching_config", None)
    config = ContinuousBatchingConfig() if config is None else copy.copy(config)
    if config.use_cuda_graph is not None and any(config.cuda_graph_booleans):
        raise ValueError(
            "use_cuda_graph=True replays the kernels of one batch for the next, and under a patch which experts a "
            "token has is data. Leave use_cuda_graph out of the ContinuousBatchingConfig."
        )
    config.use_cuda_graph = (False, False)
    return config
