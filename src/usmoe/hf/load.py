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
    """A causal language model in evaluation mode, and its tokenizer; `load_model` says what the arguments mean."""
    loaded = load_model(model, dtype=dtype, device=device, offline=offline)
    tokenizer = _from_pretrained(AutoTokenizer, "tokenizer", model, offline)
    return loaded, tokenizer


def load_model(
    model: str | Path | None = None, *, dtype: str = "float32", device: str = "cpu", offline: bool = False
) -> PreTrainedModel:
    """A causal language model in evaluation mode. Only safetensors are read, and no code that a model brings is run.

    model    None for the one that ships with usmoe; a folder; or a hub id such as allenai/OLMoE-1B-7B-0924
    dtype    float32 | bfloat16 | float16
    device   cpu, cuda, cuda:1
    offline  only what is already on this machine

    Raises ValueError, in one sentence, where there is no such folder or the hub does not give the model.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown. Choose one of: {', '.join(DTYPES)}.")
    place = _known(device)
    loaded = _from_pretrained(AutoModelForCausalLM, "model", model, offline, dtype=DTYPES[dtype], use_safetensors=True)
    return loaded.to(place).eval()


def _from_pretrained(auto: Any, what: str, model: str | Path | None, offline: bool, **options: Any) -> Any:
    source = str(SHIPPED if model is None else model)
    folder = Path(source)
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{source} has no config.json, so it is not a transformers model. Give a model's folder.")
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(f"There is no folder {source}. Give a folder that save_pretrained() wrote, or a hub id.")
    options |= {"local_files_only": offline or folder.exists(), "trust_remote_code": False}
    try:
        return auto.from_pretrained(source, **options)
    except Exception as error:  # whatever transformers, the hub or safetensors raise: the user's model is the matter
        where = (
            "cannot be loaded from its folder" if folder.exists() else "is no folder here, and the hub did not give it"
        )
        raise ValueError(f"The {what} of {source} {where}: {error}") from error


def _known(device: str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"The device {device!r} is not available here. Choose cpu, or see torch.cuda.is_available()."
        ) from error
