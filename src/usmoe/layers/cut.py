"""The moving average of the cut: where selections fell in training, remembered for serving."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from usmoe.layers.budget import Spending
from usmoe.types import Routing

_DECAY = 0.99
"""Weight of the past at each batch: the average looks back over some hundred batches."""


class MovingCut(nn.Module):
    """An exponential moving average of `routing.cut` over training batches, in two buffers.

    It is an estimate of the threshold that would have spent the same budget, as batch normalisation's averages are of a
    mean: `usmoe.to_causal` makes thresholds of it. Each batch counts with the mean of its finite cuts; a batch without
    one does not count. The buffers stay in float64 whatever dtype the model is moved to, since a threshold needs more
    bits than bfloat16 has. In distributed training every process follows its own batches, unless the wrapper broadcasts
    buffers. Activation checkpointing runs a layer twice, and counts its batch twice: the average is the same.
    """

    total: Tensor
    """Decayed sum of the batches' cuts: one number, or one an expert (E,)."""
    weight: Tensor
    """Decayed number of batches, of the same shape."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self._forget(shape, None)
        self.router: Any = None
        """Whose cuts these are; None before the first batch, and after loading."""
        self._served: tuple[Spending, int, Any] | None = None

    def prepare(self, cut: Float[Tensor, "G ..."] | None) -> None:
        """Take the shape of a cut before the first batch, so that a state of that shape can be loaded."""
        if cut is not None and (self.total.is_meta or not self.seen) and cut.shape[1:] != self.total.shape:
            self._forget(tuple(cut.shape[1:]), self.total.device)

    def _forget(self, shape: tuple[int, ...], device: torch.device | None) -> None:
        for name in ("total", "weight"):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64, device=device))

    @property
    def seen(self) -> bool:
        """Whether there is an average."""
        return bool((self.weight > 0).all())

    @property
    def average(self) -> Float[Tensor, "..."]:
        """The average cut; NaN before the first batch."""
        return self.total / self.weight

    @torch.no_grad()
    def update(self, cut: Float[Tensor, "G ..."] | None, router: Any = None) -> None:
        """Count a batch of G pools. Another router than before begins anew."""
        if cut is None:
            return
        other = self.router is not None and self.router != router
        if other or cut.shape[1:] != self.total.shape:
            self._forget(tuple(cut.shape[1:]), cut.device)
        elif cut.device != self.total.device:
            self.to(cut.device)
        self.router = router
        finite = cut.isfinite()
        pools = finite.sum(0)
        mean = cut.double().where(finite, 0.0).sum(0) / pools.clamp(min=1)
        for buffer, new in ((self.total, mean), (self.weight, torch.ones_like(mean))):
            buffer.copy_(torch.where(pools > 0, _DECAY * buffer + (1 - _DECAY) * new, buffer))

    def serve(self, spending: Spending, layer: int, router: Any) -> None:
        """From now on, count what a router made of these cuts chooses in evaluation mode, until enough is known."""
        self._served = spending, layer, router

    def observe(self, routing: Routing, router: Any) -> None:
        """What a router chose in evaluation mode: counted where it is the one that is served."""
        if self._served is not None and self._served[2] is router:
            spending, layer, _ = self._served
            if spending.count(layer, routing):
                self._served = None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Take the shape of what is loaded: the router that was trained may be of another kind than the one here."""
        loaded = state_dict.get(f"{prefix}total")
        if loaded is not None and loaded.shape != self.total.shape:
            self._forget(tuple(loaded.shape), self.total.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Any, recurse: bool = True) -> MovingCut:
        """Follow the module to a device, but keep the dtype."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in kept.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self
