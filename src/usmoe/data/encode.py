"""A split written as an array of tokens: read, corrupted where that is asked for, and encoded, piece by piece."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from usmoe.data.array import writing
from usmoe.data.bpe import PIECE
from usmoe.data.corpus import SPLITS, Corpus
from usmoe.data.corrupt import WORD, Corrupted, corrupt
from usmoe.data.text import Text, between_words, decoded, of_length
from usmoe.data.vocabulary import Bytes, Characters, Vocabulary


def write_split(path: Path, split: str, corpus: Corpus, text: Text, vocabulary: Vocabulary) -> dict[str, int]:
    """Encode a split of a corpus to a new .npy file; returns its counts of tokens, units and corrupted words.

    Units are bytes at the level of BPE, else tokens. At the level of words a last line without an end is given one.
    Each split is corrupted by draws of its own.

    Raises ValueError for text that is empty, not UTF-8, or unknown to the vocabulary; OSError where the disk is full.
    """
    count = {"tokens": 0, "units": 0, "corrupted": 0}
    with writing(path, vocabulary.size) as write:
        for piece in _pieces(split, corpus, text, vocabulary, count):
            try:
                tokens = vocabulary.encode(piece)
            except ValueError as error:
                raise ValueError(f"The {split} split of {text.name}: {error}") from error
            count["tokens"] += len(tokens)
            count["units"] += len(piece.encode()) if vocabulary.level == "bpe" else len(tokens)
            write(tokens)
    if not count["tokens"]:
        raise ValueError(f"The {split} split of {text.name} is empty. Give a text, or a longer one.")
    return count


def _pieces(split: str, corpus: Corpus, text: Text, vocabulary: Vocabulary, count: dict[str, int]) -> Iterator[Any]:
    """The split as it is to be encoded, piece by piece; corrupted words are added to `count`."""
    pieces: Iterator[Any] = text.blocks() if isinstance(vocabulary, Bytes) else decoded(text)
    if corpus.corrupt_mode is not None and split in corpus.corrupt_splits:
        draws = np.random.default_rng([corpus.corrupt_seed, SPLITS.index(split)])
        change = functools.partial(
            corrupt, mode=corpus.corrupt_mode, rate=corpus.corrupt_rate, seed=draws, word=_written(vocabulary)
        )
        pieces = _counted(map(change, between_words(pieces)), count)
    if vocabulary.level == "bpe":
        pieces = of_length(pieces, 8 * PIECE)  # as many are encoded side by side
    if vocabulary.level == "word":
        pieces = _lines(between_words(pieces))
    yield from pieces


def _lines(pieces: Iterator[str]) -> Iterator[str]:
    """The same text, its last line ended."""
    last = "\n"
    for last in pieces:
        yield last
    if not last.endswith("\n"):
        yield "\n"


def _counted(pieces: Iterable[Corrupted], count: dict[str, int]) -> Iterator[str | bytes]:
    for text, number in pieces:
        count["corrupted"] += number
        yield text


def _written(vocabulary: Vocabulary) -> str:
    """AAA, or aaa in an alphabet that has no A, as text8's. Raises ValueError for one that has neither."""
    if not isinstance(vocabulary, Characters) or "A" in vocabulary.alphabet:
        return WORD
    if "a" in vocabulary.alphabet:
        return WORD.lower()
    raise ValueError("The alphabet has neither A nor a: AAA would be unknown. Corrupt at the level byte or word.")
