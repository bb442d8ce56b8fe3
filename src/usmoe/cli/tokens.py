"""From a text to sequences of tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from usmoe.cli.options import read_text
from usmoe.models import CALIBRATION, SAMPLE

LONG = 1 << 22
"""Characters of a text that is tokenised whole."""

_CHARACTERS, _MARGIN = 8, 64
"""Characters read for a token at first, and tokens beyond those that are wanted: where a text is cut, within a word or
a run of spaces, the last tokens are others than in the whole."""


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
    sequences = max(1, most // length)
    ids, calibration = (_enough(tokenizer, part, length, sequences) for part in (measured, calibrating))
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


def first_tokens(tokenizer: Any, pieces: Iterable[str], most: int) -> Tensor:
    """(tokens,): the first `most` of a text that comes in pieces; fewer where it has fewer. The rest is
    not read.

    They are those of the whole text: a tokenizer looks no further ahead than to the end of a word, and what is read
    goes well beyond the last token that is kept.
    """
    text, wanted = "", _CHARACTERS * (most + _MARGIN)
    pieces = iter(pieces)
    while True:
        while len(text) < wanted and (piece := next(pieces, None)) is not None:
            text += piece
        ids = token_ids(tokenizer, text[:wanted])
        if len(ids) >= most + _MARGIN or len(text) < wanted:
            return ids[:most]
        wanted *= 2


def _enough(tokenizer: Any, text: str, length: int, sequences: int) -> Tensor:
    """(tokens,) of a text; of one that is longer than LONG characters, `sequences` times `length` tokens that begin at
    ends of words, evenly spaced over it, since all of them would take long and much memory."""
    if len(text) <= LONG:
        return token_ids(tokenizer, text)
    found = []
    for near in torch.linspace(0, len(text) - LONG // 4, sequences, dtype=torch.float64).long().tolist():
        space = re.compile(r"\s").search(text, near, near + _CHARACTERS * length) if near else None
        start = near if space is None else space.start()
        found.append(first_tokens(tokenizer, [text[start : start + LONG // 4]], length))
    return torch.cat([one for one in found if len(one) == length] or found)


def _spread(ids: Tensor, length: int, most: int) -> Tensor:
    """(B, length): as many whole sequences as there are, `most` at most, evenly spaced over the text."""
    blocks = ids[: len(ids) // length * length].view(-1, length)
    if len(blocks) <= most:
        return blocks
    return blocks[torch.linspace(0, len(blocks) - 1, most).long()]
