"""The threshold form of a router that looks ahead: the same score, chosen where it reaches a value."""

from __future__ import annotations

import dataclasses
from typing import Any

from usmoe.layers.cut import MovingCut
from usmoe.routing import BoundedChoice, ExpertChoice, USMoE
from usmoe.routing.router import Router
from usmoe.routing.unified_score import UnifiedScore

Threshold = float | tuple[float, ...]
"""One for all pairs (USMoE), or one an expert (expert and bounded choice)."""


def refuse_no_threshold_form(router: Any, who: str = "The layer") -> None:
    """Raise ValueError, in the words of the layer `who` routes by it, for a router without a threshold form."""
    if not isinstance(router, USMoE | ExpertChoice | BoundedChoice):
        raise ValueError(
            f"{who} routes by {router}, which usmoe cannot turn into a threshold. Give it a causal router of your own."
        )


def threshold_form(router: Any, threshold: Threshold) -> Router:
    """The causal router that stands for one that looks ahead, with the value that its cut would have.

    USMoE and ExpertChoice keep their score. BoundedChoice becomes USMoE with its floor as min_experts; its caps are
    kept on average only, by a threshold an expert.

    Raises ValueError for other routers, and for a score that needs a pool of tokens.
    """
    refuse_no_threshold_form(router)
    if isinstance(router, BoundedChoice):
        score = {field.name: getattr(router, field.name) for field in dataclasses.fields(UnifiedScore)}
        floor = 0 if router.per_token is None else int(router.per_token[0])
        return USMoE(**score, pool="threshold", threshold=threshold, min_experts=floor)
    return dataclasses.replace(router, pool="threshold", threshold=threshold)


def moving_threshold(cut: MovingCut, router: Any) -> Threshold | None:
    """The moving average of a router's cuts as a threshold; None where there is none yet, or it is another router's."""
    if not cut.seen or cut.router not in (None, router) or (cut.total.ndim == 0) != isinstance(router, USMoE):
        return None
    average = cut.average.tolist()
    return tuple(average) if isinstance(average, list) else average
