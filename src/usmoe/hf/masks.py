"""Which tokens are real, and which belong to one example, from whatever attention mask a model is handed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Tokens = tuple[Bool[Tensor, "B L"] | None, Int[Tensor, "B L"] | None]
"""Which tokens are real (None: all), and the example of each, where a row holds several (None: it holds one). The last
example of a row has the number 0, those before it -1, -2, ..."""

HIDDEN = -100.0
"""A mask that is added to the scores of attention hides what it lowers by more: exp(-100) is 0 in float32."""


class UnreadableMaskError(ValueError):
    """An attention mask that does not say which tokens are padding, or which belong together."""


class MisshapenMaskError(ValueError):
    """An attention mask that speaks of other tokens than there are."""


def tokens_of_mask(mask: Any, batch: int, length: int, past: int | None) -> Tokens:
    """Which of the tokens (B, L) of a forward are real, and which belong together; the forward has `past` tokens in its
    cache (None: a cache that does not count them).

    mask  None; (B, past + L), 0 for padding; four dimensions, (B or 1, heads, L, keys), bool (True: may look) or what
          is added to the scores; or a mapping of these by the kind of attention.

    Of four dimensions: a token is padding when it may not look at itself. An example is a run of tokens each of which
    may look at the one before; so it is for causal attention, for a window, for a prefix that is looked at from both
    sides, and for attention in both directions. A token that looks at itself alone (packed, or padding whose row was
    filled so that it holds no NaN) is an example by itself.

    Raises MisshapenMaskError for one of another shape, and UnreadableMaskError for what is no tensor and for a mask by
    which a real token may look at padding, or at another example.
    """
    if isinstance(mask, Mapping):
        mask = _widest(mask)
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor):
        raise UnreadableMaskError(f"that is a {type(mask).__name__}")
    keys = mask.shape[-1] if mask.ndim else 0
    known = keys == length + past if past is not None else keys >= length
    if mask.ndim == 2 and len(mask) == batch and known:
        return mask[:, keys - length :].bool(), None
    if mask.ndim == 4 and len(mask) in (1, batch) and mask.shape[2] == length <= keys:
        first = past if past is not None and past + length <= keys else keys - length
        found = _by_looks(_looks(mask), first)
        real, example = (None if one is None else one.expand(batch, length) for one in found)
        return real, example
    held = f" and {past} in the cache" if past else ""
    raise MisshapenMaskError(f"of shape {tuple(mask.shape)} for {batch} x {length} tokens{held}")


def _widest(masks: Mapping[Any, Any]) -> Any:
    """One mask for all kinds of attention: where several have as many keys as any, whatever one of them allows."""
    given = [one for one in masks.values() if one is not None]
    if not all(isinstance(one, Tensor) for one in given) or not given:
        return given[0] if given else None
    most = max((one.ndim, one.shape[-1]) for one in given)
    widest = [one for one in given if (one.ndim, one.shape[-1]) == most]
    if len(widest) == 1 or most[0] != 4 or len({one.shape[2] for one in widest}) > 1:
        return widest[0]
    allowed = _looks(widest[0])
    for one in widest[1:]:
        allowed = allowed | _looks(one)
    return allowed.unsqueeze(1)


def _looks(mask: Tensor) -> Bool[Tensor, "B L keys"]:
    """Whether a token may look at a key, in any head."""
    return (mask if mask.dtype == torch.bool else mask > HIDDEN).any(1)


def _by_looks(looks: Bool[Tensor, "B L keys"], first: int) -> Tokens:
    """What `tokens_of_mask` says of a mask of four dimensions, where the tokens are the keys from `first` on."""
    length = looks.shape[1]
    among = looks[:, :, first : first + length]
    real = among.diagonal(dim1=1, dim2=2)
    if length == 1:
        return real, None
    index = torch.arange(length, device=looks.device).expand(len(looks), length)
    latest = index.where(real, -1).cummax(1).values
    before = torch.nn.functional.pad(latest[:, :-1], (1, 0), value=-1)
    goes_on = among.gather(2, before.clamp(min=0).unsqueeze(2)).squeeze(2)
    begins = real & (before >= 0) & ~goes_on
    example = begins.cumsum(1)
    example = example - example[:, -1:]
    own = real.unsqueeze(1) & (example.unsqueeze(2) == example.unsqueeze(1))
    if bool((among & real.unsqueeze(2) & ~own).any()):
        raise UnreadableMaskError("by which a token may look at padding, or at a part of another example,")
    if not bool(begins.any()):
        return real, None
    if bool((looks[:, :, :first].any(2) & real & (example != example[:, :1])).any()):
        raise UnreadableMaskError("by which several examples go on from one cache")
    return real, example
