"""`to_causal`: from the router that a model was trained with to the thresholds that serve it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import nn

from usmoe.layers.budget import Spending, asked_of
from usmoe.layers.cut import MovingCut
from usmoe.layers.moe import MoE
from usmoe.layers.threshold_form import moving_threshold, refuse_no_threshold_form, threshold_form
from usmoe.routing.router import Router
from usmoe.types import is_causal

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """A layer whose router can be replaced by another one."""

    name: str
    router: Any
    cut: MovingCut
    become: Callable[[Router], None]
    asked: Callable[[], float | None]
    """Experts a token that its router is asked for, or None where it says no number."""


FINDERS: list[Callable[[nn.Module], list[Tracked]]] = []
"""What finds the tracked layers of a model; usmoe.hf adds the layers of patched models."""


def to_causal(model: Model) -> Model:
    """The same model with threshold routers in place of those that look ahead or across the batch; in place.

    Each threshold is the moving average of the cut that the layer tracked in training (`routing.cut`): an estimate of
    the value that spends the same budget. Routers that are causal already, thresholds and prefix among them, stay.
    USMoE keeps its score, and becomes causal with one threshold; ExpertChoice with one an expert; BoundedChoice becomes
    USMoE with one threshold an expert and its floor as min_experts (caps are then kept on average only).

    An estimate may be off: the cuts of a bias that moves lag behind it, and other text has other scores. What is spent
    is counted on the first 1,024 tokens of each layer in evaluation mode, and a budget that is missed by more than a
    tenth is said, once, as a UserWarning.

    The model holds `usmoe.MoE` layers, or is patched (`usmoe.patch`) with a transformers model inside.

    Raises ValueError, and changes nothing, where there is no layer, where a layer has tracked no cut yet, and for a
    router that no threshold can stand for.
    """
    made = become_causal(model)
    watched = [(layer, router, layer.asked()) for layer, router in made if router is not layer.router]
    known = [(layer, router, asked) for layer, router, asked in watched if asked is not None]
    spending = Spending(asked for _, _, asked in known)
    for number, (layer, router, _) in enumerate(known):
        layer.cut.serve(spending, number, router)
    return model


def become_causal(model: nn.Module) -> list[tuple[Tracked, Any]]:
    """The same in place, without a word about the budget: each layer as it was, and the router that it has now."""
    layers = [layer for find in FINDERS for layer in find(model)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layer with a router of usmoe: neither a usmoe.MoE, nor a patch. "
            "Patch it first: usmoe.patch(model, router)."
        )
    made = [(layer, _served(layer)) for layer in layers]
    for layer, router in made:
        layer.become(router)
    return made


def _served(layer: Tracked) -> Any:
    """The causal router that stands for a layer's own."""
    router = layer.router
    if is_causal(router):
        return router
    refuse_no_threshold_form(router, layer.name or "The layer")
    if not layer.cut.seen:
        raise ValueError(
            f"{layer.name or 'The layer'} has tracked no cut of {router} yet. Run some batches in training mode first "
            "(model.train()), or find thresholds on text with usmoe.calibrate()."
        )
    threshold = moving_threshold(layer.cut, router)
    if threshold is None:
        raise ValueError(
            f"{layer.name or 'The layer'} routes by {router}, and the cuts that it has tracked are those of another "
            "router. Run some batches in training mode first, or put that router back."
        )
    return threshold_form(router, threshold)


def _moe_layers(model: nn.Module) -> list[Tracked]:
    return [
        Tracked(
            name=name,
            router=layer.router,
            cut=layer.cut,
            become=layer.reroute,
            asked=partial(asked_of, layer.router, layer.num_experts),
        )
        for name, layer in model.named_modules()
        if isinstance(layer, MoE)
    ]


FINDERS.append(_moe_layers)
