"""In what a likelihood is stated: bits a character or a byte, or perplexity a word."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

Unit = Literal["character", "byte", "word"]

UNITS: Mapping[str, Unit] = {"byte": "character", "char": "character", "bpe": "byte", "word": "word"}
"""By the level of a vocabulary: bytes are called characters, as is the custom with enwik8; line ends are words."""


def stated(nats: float, unit: Unit, tokens_per_unit: float) -> dict[str, float]:
    """{"bits": ...} of a character or byte, or {"perplexity": ...} of a word, from nats a token; infinite where the
    perplexity is too large for a float."""
    each = nats * tokens_per_unit
    if unit != "word":
        return {"bits": each / math.log(2)}
    return {"perplexity": math.exp(each) if each < 700 else math.inf}
