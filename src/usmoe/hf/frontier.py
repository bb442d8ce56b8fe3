"""What a smaller budget costs, by three ways of spending it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from usmoe.hf.calibrate import calibrate
from usmoe.hf.compare import Contender
from usmoe.hf.layers import Layer
from usmoe.hf.patch import supported_layers
from usmoe.hf.tune import search
from usmoe.routing import OwnChoice, USMoE
from usmoe.routing.router import Experts, experts_per_token

WAYS = ("own choice, fewer experts", "USMoE threshold", "tuned")
"""Labels of the three ways: fewer of the model's own top-k, the same number for every token; thresholds with the budget
spread evenly; thresholds as `tune` finds them."""


def frontier(
    model: PreTrainedModel,
    calibration: Int[Tensor, "C L"],
    budgets: Sequence[Experts],
    *,
    batch_size: int = 8,
    tick: Callable[[], None] = lambda: None,
) -> list[Contender]:
    """The model's own choice, then the three ways for each budget, ready for `compare()`. All but the first way are
    found on the calibration text."""
    layers = supported_layers(model)
    batches = list(calibration.split(batch_size))
    entries = [Contender(label="the model's own choice", router=OwnChoice())]
    for budget in budgets:
        even = calibrate(model, batches, USMoE(k=budget))
        found = (fewer(layers, budget), even, search(model, batches, budget, tick=tick).routers)
        entries += [Contender(label=f"{way}, {budget}", router=router) for way, router in zip(WAYS, found, strict=True)]
    return entries


def fewer(layers: Sequence[Layer], budget: Experts) -> list[OwnChoice]:
    """The model's own choice with whole numbers of experts that meet a budget on average over the layers: where it lies
    between two, the larger number is spread evenly over the depth."""
    routers, owed = [], 0.0
    for layer in layers:
        owed += experts_per_token(budget, layer.host, layer.columns)
        spent = sum(int(router.k or 0) for router in routers)
        routers.append(OwnChoice(k=max(1, int(owed - spent + 0.5))))
    return routers
