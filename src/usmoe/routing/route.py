"""`route`: logits in, Routing out, with the checks that a layer's hot path leaves out."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from usmoe.routing.router import call, padding_counts, refuse_what_is_no_router
from usmoe.types import Routing


def route(
    logits: Float[Tensor, "B L E"],
    router: Any,
    valid: Bool[Tensor, "B L"] | None = None,
    segments: Int[Tensor, "B L"] | None = None,
    state: Any = None,
) -> Routing:
    """The Routing that a router gives for the logits of a batch.

    logits    (B, L, E), any float dtype; scores are computed in float32 at least. -inf: that pair is never chosen.
    router    a router of usmoe, or any callable (logits, valid, **kw) -> Routing
    valid     (B, L) bool, False for padding. Padding never competes and adds no budget. None: all tokens are real.
    segments  (B, L) int, which packed example each token belongs to: no pool crosses them. Under prefix and burst,
              whose tokens are taken in order, a segment ends where the id changes
    state     what the previous chunk's routing.state was, for routers that stream

    Raises ValueError for shapes and dtypes that do not fit, and for NaN or +inf logits of real tokens.
    """
    refuse_what_is_no_router(router)
    check(logits, valid, segments, padding_counts(router))
    return call(router, logits, valid, segments=segments, state=state)


def check(logits: Tensor, valid: Tensor | None, segments: Tensor | None, padding_competes: bool = False) -> None:
    """Raise ValueError unless the inputs of a router are what they should be."""
    if not isinstance(logits, Tensor) or logits.ndim != 3 or not logits.is_floating_point():
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        kind = logits.dtype if isinstance(logits, Tensor) else "no tensor"
        raise ValueError(f"logits are {shape} of {kind}. Give a float tensor (sequences, tokens, experts).")
    if logits.shape[-1] == 0:
        raise ValueError("logits have no experts: the last axis is empty. Give at least one expert.")
    grid = tuple(logits.shape[:2])
    if valid is not None and (_shape(valid) != grid or valid.dtype != torch.bool):
        kind = getattr(valid, "dtype", "no dtype")
        raise ValueError(
            f"valid is {_shape(valid)} of {kind}. Give a bool tensor {grid}, False for padding "
            "(attention_mask.bool(), say)."
        )
    if segments is not None and (
        _shape(segments) != grid or segments.is_floating_point() or segments.dtype == torch.bool
    ):
        raise ValueError(
            f"segments are {_shape(segments)} of {getattr(segments, 'dtype', 'no dtype')}. Give an int tensor {grid}."
        )
    read = logits if valid is None or padding_competes else logits[valid]
    for name, wrong in (("NaN", read.isnan()), ("+inf", read == torch.inf)):
        if wrong.any():
            raise ValueError(
                f"{int(wrong.sum())} of {wrong.numel()} logits are {name}. A router cannot rank them: give finite "
                "logits, and -inf where a pair must never be chosen."
            )


def _shape(value: Any) -> Any:
    """The shape of a tensor; what it is, for anything else."""
    return tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
