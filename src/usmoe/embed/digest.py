"""Which weights a model has, in twelve letters."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from usmoe.hf.wrapped import unwrapped

_SAMPLE = 4096
"""Elements of each tensor that are read, at most."""


def digest(model: Any, tokenizer: Any = None) -> str:
    """Twelve hexadecimal digits of a model's weights and of how many tokens its tokenizer knows.

    Of each tensor that the model would save: name, shape, dtype and 4096 elements, evenly spaced, or all where there
    are fewer. So it takes moments for a model of any size, and sees what training or quantising does to every tensor,
    but not a change of a few elements between those that it reads. A patch, a device or a wrapper changes nothing.
    """
    found = hashlib.sha256()
    for name, value in sorted(unwrapped(model).state_dict().items()):
        if isinstance(value, Tensor):
            for part in _plain(value):
                found.update(f"{name} {tuple(part.shape)} {part.dtype}\n".encode())
                found.update(_bytes(part))
    if tokenizer is not None:
        found.update(f"{len(tokenizer)} tokens".encode())
    return found.hexdigest()[:12]


def _plain(tensor: Any) -> Iterator[Tensor]:
    """A tensor, or those that a subclass of Tensor (as torchao's, of fewer bits) is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor


def _bytes(tensor: Tensor) -> bytes:
    if tensor.is_meta:  # offloaded: its elements are elsewhere
        return b""
    every = tensor.detach().reshape(-1)
    sample = every[:: max(1, -(-len(every) // _SAMPLE))]
    return sample.contiguous().cpu().view(torch.uint8).numpy().tobytes()
