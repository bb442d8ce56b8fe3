"""What the routers of a model do over many batches, counted without keeping their Routings."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from usmoe import metrics
from usmoe.types import RouterOutput


class Tally:
    """Pairs, dropped tokens and loads of each layer, batch by batch. Padding is left out: a Routing says what it is."""

    def __init__(self, *batches: Sequence[RouterOutput]) -> None:
        self._tokens = 0
        self._dropped: Tensor | int = 0
        self._loads: Tensor | int = 0
        for said in batches:
            self.count(said)

    def count(self, said: Sequence[RouterOutput]) -> None:
        """Count a batch; nothing for a dense model."""
        if not said:
            return
        counts = torch.stack([metrics.experts_per_token(one.routing) for one in said])  # (layers, real tokens)
        self._tokens += counts.shape[1]
        self._dropped = self._dropped + (counts == 0).sum(1)
        self._loads = self._loads + torch.stack([metrics.load(one.routing) for one in said])

    @property
    def figures(self) -> dict[str, float | None]:
        """experts: pairs a token; dropped: share of tokens without an expert; load_cv: variation of the loads of all
        batches; each a mean over the layers. None for a dense model."""
        if not isinstance(self._loads, Tensor) or not isinstance(self._dropped, Tensor):
            return {"experts": None, "dropped": None, "load_cv": None}
        return {
            "experts": self._loads.sum(1).double().mean().item() / self._tokens,
            "dropped": self._dropped.double().mean().item() / self._tokens,
            "load_cv": statistics.fmean(map(metrics.variation, self._loads)),
        }
