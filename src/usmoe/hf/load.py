"""Loading a model and its tokenizer: the shipped one, a folder, or a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from usmoe.models import SHIPPED

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    model: str | Path | None = None, *, dtype: str = "float32", device: str = "cpu", offline: bool = False
) -> tuple[PreTrainedModel, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    model    None for the one that ships with usmoe; a folder; or a hub id such as allenai/OLMoE-1B-7B-0924
    dtype    float32 | bfloat16 | float16
    device   cpu, cuda, cuda:1, mps
    offline  only what is already on this machine

    Raises ValueError, in one sentence, where there is no such folder or the hub does not give the model.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown. Choose one of: {', '.join(DTYPES)}.")
    place = _known(device)
    source = str(SHIPPED if model is None else model)
    folder = Path(source)
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{source} has no config.json, so it is not a transformers model. Give a model's folder.")
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(f"There is no folder {source}. Give a folder that save_pretrained() wrote, or a hub id.")
    local = offline or folder.exists()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[dtype], local_files_only=local)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        where = (
            "cannot be loaded from its folder" if folder.exists() else "is no folder here, and the hub did not give it"
        )
        raise ValueError(f"The model {source} {where}: {first}") from error
    return loaded.to(place).eval(), tokenizer


def _known(device: str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"The device {device!r} is not available here. Choose cpu, or see torch.cuda.is_available()."
        ) from error
