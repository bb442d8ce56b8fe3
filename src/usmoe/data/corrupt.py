"""Corrupted text: the word AAA in the place of some words, or before them.

Section 4 of the paper (arXiv 2503.22996) trains or tests on text that an "AAA" attack has changed, and states neither
the rate nor the split; related work replaces 2.5 to 4 % of the words of the test split.
"""

from __future__ import annotations

import re
from typing import AnyStr, Literal, NamedTuple

import numpy as np

Mode = Literal["replace", "insert"]
"""replace: AAA stands in the place of the chosen word. insert: AAA is a word of its own before it."""

WORD = "AAA"
"""What is written."""

_WORDS = {str: re.compile(r"(\S+)"), bytes: re.compile(rb"(\S+)")}


class Corrupted(NamedTuple):
    """Text and how much of it was changed."""

    text: str | bytes
    """Of the type that was given."""
    count: int
    """Words that were replaced, or before which one was inserted."""


def corrupt(text: AnyStr, mode: Mode, rate: float, seed: int | np.random.Generator, *, word: str = WORD) -> Corrupted:
    """The text with each word corrupted with probability `rate`, and the count of those that were.

    A word is a maximal run of what is no white space: of str as Unicode has it, of bytes as ASCII has it. White space
    and line ends stay as they are.

    Each word is drawn by itself (Bernoulli), the n-th word of the text by the n-th number of the seed's generator:
    the same text and seed give the same result however the text is cut between words (give the generator on from piece
    to piece), and a higher rate of the same seed corrupts all that a lower one does, and more.

    Raises ValueError for a rate that is no probability, and an unknown mode.
    """
    check(mode, rate)
    draws = np.random.default_rng(seed)
    parts = _WORDS[type(text)].split(text)  # white space at even places, words at odd ones
    written = word if isinstance(text, str) else word.encode()
    before = written + (" " if isinstance(text, str) else b" ") if mode == "insert" else None  # pyright: ignore
    chosen = np.flatnonzero(draws.random(len(parts) // 2) < rate)
    for place in (2 * chosen + 1).tolist():
        parts[place] = written if before is None else before + parts[place]
    return Corrupted(text[:0].join(parts), len(chosen))


def check(mode: str, rate: float) -> None:
    """Raises ValueError for what `corrupt` does not know."""
    if mode not in ("replace", "insert"):
        raise ValueError(f"corrupt_mode={mode!r} is unknown. Choose replace or insert.")
    if not 0 <= rate <= 1:
        raise ValueError(f"corrupt_rate={rate} is no share of words. Choose 0 <= corrupt_rate <= 1.")
