"""Where a run computes, and in what precision."""

from __future__ import annotations

from typing import Literal

import torch

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
