"""From a text to sequences of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from usmoe.cli.options import read_text
from usmoe.models import CALIBRATION, SAMPLE


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text to measure on and text to calibrate on, as sequences of one length."""

    tokens: Tensor
    """(B, L)."""
    calibration: Tensor
    """(C, L), of a text or a part of it that is not in `tokens`."""
    bytes_per_token: float
    """Bytes of UTF-8 a token, over the text measured on."""
    source: str
    """In words: which text, and which part calibrates."""


def corpus(tokenizer: Any, model: Any, text: str | None, most: int, length: int) -> Corpus:
    """The shipped sample (calibrated on the other shipped text), or a text of the user's: its first quarter
    calibrates, the rest is measured on.

    most    tokens to measure on, at most
    length  tokens of a sequence; cut to what the model can read

    Raises ValueError where the text is too short to do both.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or length
    length = min(length, limit)
    if text is None:
        measured, calibrating = SAMPLE.read_text(encoding="utf-8"), CALIBRATION.read_text(encoding="utf-8")
        source = "held-out novels (shipped sample); thresholds from pieces of many other novels"
    else:
        whole = read_text(text)
        quarter = len(whole) // 4
        calibrating, measured = whole[:quarter], whole[quarter:]
        source = f"{'stdin' if text == '-' else text}: thresholds from its first quarter, measured on the rest"
    ids = token_ids(tokenizer, measured)
    calibration = token_ids(tokenizer, calibrating)
    shortest = min(len(ids), len(calibration))
    if shortest < 32:
        raise ValueError(
            f"The text is too short: {len(ids)} tokens to measure on and {len(calibration)} to calibrate on. "
            "Give a text of at least a few hundred words."
        )
    length = min(length, shortest)
    tokens = _spread(ids, length, max(1, most // length))
    return Corpus(
        tokens=tokens,
        calibration=_spread(calibration, length, max(1, most // length)),
        bytes_per_token=sum(len(tokenizer.decode(row).encode()) for row in tokens) / tokens.numel(),
        source=source,
    )


def token_ids(tokenizer: Any, text: str) -> Tensor:
    """(tokens,) of the text, without special tokens."""
    return tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]


def _spread(ids: Tensor, length: int, most: int) -> Tensor:
    """(B, length): as many whole sequences as there are, `most` at most, evenly spaced over the text."""
    blocks = ids[: len(ids) // length * length].view(-1, length)
    if len(blocks) <= most:
        return blocks
    return blocks[torch.linspace(0, len(blocks) - 1, most).long()]
