"""Where a run computes, in what precision, and by what code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.compiler.config as compiler
from torch import nn

from usmoe.train.config import Precision


def place_of(device: str) -> torch.device:
    """The device of that name. Raises ValueError for what is not here, or is neither a CPU nor a GPU of CUDA's."""
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"There is no device {device!r}. Give cpu, cuda or cuda:1.") from error
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"Training on {device} is not possible here. Give cpu, cuda or cuda:1.")
    here = torch.cuda.device_count()
    if place.type == "cuda" and (place.index or 0) >= here:
        raise ValueError(
            f"There is no {device}: this machine has {here} GPUs that torch can use. Give another, or cpu."
        )
    return place


def precision_of(asked: Precision, device: str) -> Literal["float32", "bfloat16"]:
    """What "auto" stands for on a device: bfloat16 where it pays, which is a GPU that has it."""
    if asked != "auto":
        return asked
    pays = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported()
    return "bfloat16" if pays else "float32"


def compile_here(layers: Iterable[nn.Module]) -> None:
    """torch.compile each layer in place, for this processor.

    The code that inductor keeps on disk is written for the instructions of a processor, and torch 2.13 does not ask for
    them when it reads it again: where machines share a cache, half of the numbers come out wrong, without a word. So
    the key of the cache names them, behind what the user has it name.
    """
    instructions, key = torch.backends.cpu.get_cpu_capability(), compiler.cache_key_tag
    if instructions not in key.split():
        compiler.cache_key_tag = f"{key} {instructions}".strip()
    for layer in layers:
        layer.compile()
