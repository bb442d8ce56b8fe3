"""Which tokens are real, from whatever attention mask a model is handed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor


class UnreadableMaskError(ValueError):
    """An attention mask that does not say which tokens are padding."""


class MisshapenMaskError(ValueError):
    """An attention mask that speaks of other tokens than there are."""


def real_tokens(mask: Any, batch: int, length: int, past: int | None) -> Bool[Tensor, "B L"] | None:
    """False for padding among the tokens (B, L) of a forward that has `past` tokens in its cache (None: a cache that
    does not count them); None: all are real.

    mask  None; (B, past + L), 0 for padding; or what generate() makes of it for a static cache: (B, 1, L, keys), bool
          (True: may look) or float (0: may look), or a mapping of these by the kind of attention. A token is real when
          it may look at itself.

    Raises MisshapenMaskError for one of another shape, and UnreadableMaskError for what is no tensor.
    """
    if isinstance(mask, Mapping):
        given = [one for one in mask.values() if one is not None]
        mask = max(given, key=lambda one: one.shape[-1] if isinstance(one, Tensor) else 0) if given else None
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise UnreadableMaskError(f"that is a {type(mask).__name__}")
    keys = mask.shape[-1] if mask.ndim else 0
    known = keys == length + past if past is not None else keys >= length
    if mask.ndim == 2 and len(mask) == batch and known:
        return mask[:, keys - length :].bool()
    if mask.ndim == 4 and len(mask) in (1, batch) and mask.shape[2] == length <= keys:
        first = past if past is not None and past + length <= keys else keys - length
        itself = mask[:, 0, :, first : first + length].diagonal(dim1=1, dim2=2)
        return (itself if mask.dtype == torch.bool else itself == 0).expand(batch, length)
    held = f" and {past} in the cache" if past else ""
    raise MisshapenMaskError(f"of shape {tuple(mask.shape)} for {batch} x {length} tokens{held}")
