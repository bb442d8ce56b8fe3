"""Which example each token belongs to, where several are packed into one row without a mask that says it: by the
lengths that flash attention is given, or by positions that begin anew.

Routing keeps examples apart where attention does, and nowhere else. Both are decided by transformers, in
`masking_utils` and `modeling_flash_attention_utils`, by rules that are repeated here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
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


def packed(module: nn.Module, given: Mapping[str, Any], batch: int, length: int) -> Tokens:
    """What attention makes of a forward (B, L) without a mask, whose arguments are `given`: (None, None) where a row
    is one example to it, whatever its positions."""
    positions = given.get("position_ids")
    if isinstance(positions, Tensor) and positions.ndim == 3 and positions.shape[0] == 4:
        positions = positions[0]  # of text, beside three for images
    known = isinstance(positions, Tensor) and positions.ndim == 2 and positions.shape[1] == length
    if is_flash_attention_requested(module.config):
        lengths = [given.get(f"{name}_{end}") for name in ("cu_seq_lens", "max_length") for end in ("q", "k")]
        if all(one is not None for one in lengths) and isinstance(lengths[0], Tensor):
            real, example = by_lengths(lengths[0], batch * length)
            return real.view(batch, length), example.view(batch, length)
        return None, _restarts(positions, batch, length) if known and batch == 1 else None
    masked = module.config._attn_implementation in ALL_MASK_ATTENTION_FUNCTIONS
    if not known or not masked or _has_cache(module, given) or not _is_causal(module, given):
        return None, None
    return None, _restarts(positions, batch, length)


def _restarts(positions: Tensor, batch: int, length: int) -> Int[Tensor, "B L"] | None:
    """The example of each token, from positions that do not go on by one; None where all do."""
    breaks = positions.diff(dim=1) != 1
    if not bool(breaks.any()):
        return None
    return torch.nn.functional.pad(breaks.long().cumsum(1), (1, 0)).expand(batch, length)


def _has_cache(module: Any, given: Mapping[str, Any]) -> bool:
    """Whether a model is given a cache, if only an empty one, or makes one."""
    if given.get("past_key_values") is not None:
        return True
    asked = given.get("use_cache")
    asked = getattr(module.config, "use_cache", False) if asked is None else asked
    return bool(asked) and not (getattr(module, "gradient_checkpointing", False) and module.training)


def _is_causal(module: Any, given: Mapping[str, Any]) -> bool:
    asked = given.get("is_causal")
    return bool(getattr(module.config, "is_causal", True) if asked is None else asked)
