"""Which example each token belongs to, where several are packed into one row and no mask of the caller's says so: by
the lengths that flash attention is given, or by positions that begin anew.

Routing keeps examples apart where attention does, and nowhere else. Whether attention does is for each family to say:
some never heed positions, and none does beside a cache. So where positions begin anew, the mask that a layer is handed
by its model decides (`usmoe.hf.forward.settle`); flash attention has none, and decides by the arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.utils.generic import is_flash_attention_requested

from usmoe.hf.masks import Tokens


def is_paged(given: Mapping[str, Any]) -> bool:
    """Whether a forward is a step of transformers' continuous batching: requests one after the other in one row, their
    keys and values in a cache of pages that has a name of its own."""
    return given.get("cache") is not None and isinstance(given.get("cu_seq_lens_q"), Tensor)


def by_lengths(cumulative: Int[Tensor, " N+1"], length: int) -> Tokens:
    """The example of each token of one row, (1, L), from where each begins: 0, their ends, and perhaps the last end
    again. What comes after the last end is padding."""
    index = torch.arange(length, device=cumulative.device)
    real = index < cumulative[-1]
    return real.unsqueeze(0), torch.searchsorted(cumulative[1:].contiguous(), index, right=True).unsqueeze(0)


def begin_anew(given: Mapping[str, Any], length: int) -> bool:
    """Whether the positions of a forward do not go on by one within a row of L tokens."""
    positions = _positions(given, length)
    return positions is not None and bool((positions.diff(dim=1) != 1).any())


def by_flash_attention(config: Any, given: Mapping[str, Any], batch: int, length: int) -> Tokens | None:
    """What flash attention makes of a forward (B, L) without a mask; None where another attention is used."""
    if not is_flash_attention_requested(config):
        return None
    lengths = [given.get(f"{name}_{end}") for name in ("cu_seq_lens", "max_length") for end in ("q", "k")]
    if all(one is not None for one in lengths) and isinstance(lengths[0], Tensor):
        real, example = (cast(Tensor, one).view(batch, length) for one in by_lengths(lengths[0], batch * length))
        return real, example
    positions = _positions(given, length)
    if batch > 1 or positions is None or not begin_anew(given, length):
        return None, None
    return None, torch.nn.functional.pad((positions.diff(dim=1) != 1).long().cumsum(1), (1, 0))


def _positions(given: Mapping[str, Any], length: int) -> Int[Tensor, "B L"] | None:
    positions = given.get("position_ids")
    if not isinstance(positions, Tensor):
        return None
    if positions.ndim == 3 and positions.shape[0] == 4:
        positions = positions[0]  # of text, beside three for images
    return positions if positions.ndim == 2 and positions.shape[1] == length else None
