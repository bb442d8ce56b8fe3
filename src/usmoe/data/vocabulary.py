"""Vocabularies: what a token is, and text to tokens and back, for bytes, characters, words and BPE.

Each is one frozen value with the same members: `level`, `size`, `encode`, `decode` and `to_dict`. Text may be encoded
piece by piece: at the level of words in pieces that end between words, of BPE in pieces of a million characters.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int, UInt

from usmoe.data.bpe import Pieces
from usmoe.data.corpus import Level
from usmoe.data.corrupt import WORD
from usmoe.data.text import between_words
from usmoe.report.whole import whole_json

EOS, UNKNOWN = "<eos>", "<unk>"
"""The word that stands for a line end, and the one for all words that are not known."""


@dataclass(frozen=True)
class Bytes:
    """The 256 bytes. Nothing is unknown to it."""

    level: ClassVar[Level] = "byte"

    @property
    def size(self) -> int:
        """256."""
        return 256

    def encode(self, text: str | bytes) -> UInt[np.ndarray, "tokens"]:
        """The bytes; of str, those of UTF-8."""
        return np.frombuffer(text.encode() if isinstance(text, str) else text, dtype=np.uint8)

    def decode(self, ids: Int[np.ndarray, "tokens"]) -> str:
        """The text; bytes that are no UTF-8 become the replacement character."""
        return np.asarray(ids, dtype=np.uint8).tobytes().decode(errors="replace")

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"level": self.level}


@dataclass(frozen=True)
class Characters:
    """An alphabet: its characters by code point, then one token for all others where there is one."""

    alphabet: str
    """Each character once, in order of code points."""
    unknown: bool = True
    """Whether there is a token for characters that are not in the alphabet. text8 has none: 27 characters are all."""
    level: ClassVar[Level] = "char"

    def __post_init__(self) -> None:
        if not self.alphabet or self.alphabet != "".join(sorted(set(self.alphabet))):
            raise ValueError("An alphabet is each of its characters once, in order of code points, and one at least.")

    @property
    def size(self) -> int:
        """Characters, and one for the unknown."""
        return len(self.alphabet) + self.unknown

    @property
    def unknown_id(self) -> int | None:
        """The token of what is not in the alphabet."""
        return len(self.alphabet) if self.unknown else None

    @cached_property
    def _points(self) -> Int[np.ndarray, "alphabet"]:
        return _code_points(self.alphabet)

    def encode(self, text: str | bytes) -> Int[np.ndarray, "tokens"]:
        """The place of each character in the alphabet; len(alphabet) for an unknown one.

        Raises ValueError for that where there is no such token, naming the character."""
        points = _code_points(text if isinstance(text, str) else text.decode())
        places = np.minimum(np.searchsorted(self._points, points), len(self._points) - 1)
        known = self._points[places] == points
        if not self.unknown and not known.all():
            raise ValueError(
                f"The text holds {chr(points[np.argmin(known)])!r}, which is none of the {self.size} characters "
                f"{self.alphabet!r}. Give text of that alphabet, or read it as bytes (level byte)."
            )
        return np.where(known, places, len(self.alphabet))

    def decode(self, ids: Int[np.ndarray, "tokens"]) -> str:
        """The text; the replacement character for the unknown."""
        points = np.append(self._points, ord("\N{REPLACEMENT CHARACTER}"))
        return "".join(map(chr, points[np.asarray(ids, dtype=np.int64)].tolist()))

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"level": self.level, "alphabet": self.alphabet, "unknown": self.unknown}


@dataclass(frozen=True)
class Words:
    """Words between white space: <eos> for a line end, <unk> for all that are not known, then words by frequency."""

    words: tuple[str, ...] = field(repr=False)
    """<eos>, <unk>, then the most frequent first, as an adaptive softmax wants it. AAA is always one of them, the last
    where the training text has none: a corruption is no unknown word, in training or after."""
    level: ClassVar[Level] = "word"

    def __post_init__(self) -> None:
        if self.words[:2] != (EOS, UNKNOWN) or len(set(self.words)) < len(self.words) or WORD not in self.words:
            raise ValueError(
                f"A vocabulary of words begins with {EOS} and {UNKNOWN}, and has {WORD} and no word twice."
            )

    @property
    def size(self) -> int:
        """Words, special ones included."""
        return len(self.words)

    @property
    def unknown_id(self) -> int:
        """The token of words that are not known."""
        return self.words.index(UNKNOWN)

    @cached_property
    def _places(self) -> Mapping[str, int]:
        return {word: place for place, word in enumerate(self.words)}

    def encode(self, text: str | bytes) -> Int[np.ndarray, "tokens"]:
        """The place of each word, and 0 for each line end. A word <eos> or <unk> in the text is that token."""
        found = _words(text if isinstance(text, str) else text.decode())
        return np.fromiter(map(self._places.get, found, repeat(1)), dtype=np.int64, count=len(found))

    def decode(self, ids: Int[np.ndarray, "tokens"]) -> str:
        """The words with a space between two, and a line end for <eos>."""
        text = " ".join(self.words[place] if place else "\n" for place in np.asarray(ids).tolist())
        return text.replace(" \n", "\n").replace("\n ", "\n")

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"level": self.level, "words": list(self.words)}


Vocabulary = Bytes | Characters | Words | Pieces
"""What text is encoded by: `level`, `size`, `encode(text)`, `decode(ids)`, `to_dict()`, and equality."""


def learn(level: Level, pieces: Iterable[str], *, size: int | None = None, alphabet: str | None = None) -> Vocabulary:
    """The vocabulary of a training text.

    pieces    the text, in pieces of any size; a byte needs none
    size      words or BPE tokens, special ones included; None: all words
    alphabet  at the level of characters, all that may occur (text8); None: those that occur, and one for others

    The most frequent words are kept, and of words as frequent those of lower code points.
    """
    if level == "byte":
        return Bytes()
    if level == "bpe":
        if size is None:
            raise ValueError("BPE needs a vocabulary_size. Give a number, such as 4096.")
        return Pieces.learn(pieces, size)
    if level == "char":
        return Characters(_alphabet(pieces)) if alphabet is None else Characters(alphabet, unknown=False)
    counts: Counter[str] = Counter()
    for piece in between_words(pieces):
        counts.update(_words(piece))
    del counts[EOS], counts[UNKNOWN]
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    ranked = ranked if size is None else ranked[: size - 2]
    if WORD not in ranked:
        ranked = [*(ranked if size is None else ranked[: size - 3]), WORD]
    return Words((EOS, UNKNOWN, *ranked))


def share_unknown(vocabulary: Vocabulary, *texts: Int[np.ndarray, "tokens"]) -> float | None:
    """The share of the tokens of all texts that stand for what the vocabulary does not know, 0 to 1; None where it has
    no such token, or there are no tokens."""
    unknown, total = getattr(vocabulary, "unknown_id", None), sum(map(len, texts))
    if unknown is None or not total:
        return None
    return sum(int((one == unknown).sum()) for one in texts) / total


def save(vocabulary: Vocabulary, path: Path) -> None:
    """Write a vocabulary as JSON, whole or not at all."""
    whole_json(vocabulary.to_dict(), path)


def load(path: Path) -> Vocabulary:
    """The vocabulary of a file. Raises ValueError, naming the file, where it holds none."""
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise ValueError(f"{path} holds no vocabulary: {error}. Give one that usmoe wrote.") from error


def from_dict(said: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary that `to_dict` described. Raises ValueError, TypeError or KeyError for what is none."""
    fields = dict(said)
    level = fields.pop("level")
    if level == "word":
        return Words(tuple(fields["words"]))
    kinds: Mapping[str, Any] = {"byte": Bytes, "char": Characters, "bpe": Pieces}
    if level not in kinds:
        raise ValueError(f"the level {level!r} is none of {', '.join([*kinds, 'word'])}")
    return kinds[level](**fields)


def digest(vocabulary: Vocabulary) -> str:
    """12 hexadecimal digits of a sha256 over all that it is."""
    return hashlib.sha256(json.dumps(vocabulary.to_dict(), sort_keys=True).encode()).hexdigest()[:12]


def _words(text: str) -> list[str]:
    return text.replace("\n", f" {EOS} ").split()


def _alphabet(pieces: Iterable[str]) -> str:
    found: set[str] = set()
    for piece in pieces:
        found.update(piece)
    return "".join(sorted(found))


def _code_points(text: str) -> Int[np.ndarray, "characters"]:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4").astype(np.int64)
