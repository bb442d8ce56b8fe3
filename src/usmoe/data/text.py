"""Text read piece by piece: files plain or packed, cut into splits, decoded, in pieces that end between words.

Nothing here holds more of a file than a few megabytes, unless there is no white space in it.
"""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import AnyStr, Protocol

from usmoe.data.corpus import Level
from usmoe.data.local import ENDINGS
from usmoe.data.opened import opened, plain_suffix

BLOCK = 1 << 21
"""Bytes that are read at a time."""

_WINDOW = 1 << 16
"""Bytes in which a cut looks for a line end, or white space."""


class Part(Protocol):
    """A run of text: a file, or the rows of a split on the hub."""

    @property
    def name(self) -> str:
        """As errors call it."""
        ...

    def blocks(self) -> Iterator[bytes]:
        """Its bytes, in order, in pieces of any size."""
        ...


@dataclass(frozen=True)
class FilePart:
    """A file of text: plain, or rows (.parquet, .jsonl, .json, .csv, .tsv) with the column text, a row a line; as it
    is, or compressed (.gz, .bz2, .xz, .zip of one file). A byte order mark is no part of the text."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def blocks(self) -> Iterator[bytes]:
        """Raises ValueError, naming the file, where it is cut short, of another format, or has rows without a text."""
        if plain_suffix(self.path) in ENDINGS:
            from usmoe.data.rows import lines

            yield from lines(self.path)
            return
        with opened(self.path) as file:
            block = file.read(BLOCK).removeprefix(codecs.BOM_UTF8)
            while block:
                yield block
                block = file.read(BLOCK)


@dataclass(frozen=True, kw_only=True)
class Text:
    """Parts one after another, or a stretch of them."""

    parts: tuple[Part, ...]
    start: int = 0
    """First byte."""
    stop: int | None = None
    """Byte after the last; None: the end."""

    @property
    def name(self) -> str:
        """As errors call it."""
        return " + ".join(part.name for part in self.parts)

    def blocks(self) -> Iterator[bytes]:
        """The bytes of the stretch."""
        here = 0
        for part in self.parts:
            for block in part.blocks():
                first, here = here, here + len(block)
                if self.stop is not None and first >= self.stop:
                    return
                piece = block[max(self.start - first, 0) : None if self.stop is None else self.stop - first]
                if piece:
                    yield piece


def cut(text: Text, shares: tuple[float, ...], level: Level) -> list[Text]:
    """A whole text cut in consecutive stretches of these shares of its bytes, and the rest as one more.

    At the level of bytes the cuts are exact. Else a cut that falls within a character, or within a line (word, BPE), is
    moved to its end; within a line of more than 64 KiB, to the end of a word.
    """
    total = sum(map(len, text.blocks()))
    wanted = [round(sum(shares[: number + 1]) * total) for number in range(len(shares))]
    places = [0, *(_moved(text, place, level) for place in wanted), total]
    return [Text(parts=text.parts, start=start, stop=stop) for start, stop in itertools.pairwise(places)]


def _moved(text: Text, place: int, level: Level) -> int:
    if level == "byte" or place == 0:
        return place
    window = b"".join(Text(parts=text.parts, start=place - 1, stop=place + _WINDOW).blocks())
    for ending in (rb"\n", rb"\s") if level in ("word", "bpe") else ():
        if found := re.search(ending, window):
            return place - 1 + found.end()
    after = re.compile(rb"[^\x80-\xbf]|\Z").search(window, 1)  # the first byte of a character of UTF-8
    return place - 1 + after.start() if after else place


class NotUTF8Error(ValueError):
    """Bytes that are no UTF-8."""

    def __init__(self, said: str, line: int, byte: int) -> None:
        super().__init__(said)
        self.line, self.byte = line, byte


def decoded(text: Text) -> Iterator[str]:
    """The text of UTF-8. Raises NotUTF8Error, a ValueError, for what is none, with the line."""
    decoder, lines = codecs.getincrementaldecoder("utf-8")(), 1
    try:
        for block in text.blocks():
            piece = decoder.decode(block)
            lines += piece.count("\n")
            yield piece
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        line = lines + error.object[: error.start].count(b"\n")
        raise NotUTF8Error(
            f"{text.name} is no UTF-8 in line {line:,}{' of the split' if text.start else ''}: {error.reason}. Save it "
            "as UTF-8, or read it as bytes (level byte).",
            line,
            error.object[error.start],
        ) from error


def between_words(pieces: Iterable[AnyStr]) -> Iterator[AnyStr]:
    """The same text in pieces that end with white space, the last one aside."""
    kept = None
    for piece in pieces:
        piece = piece if kept is None else kept + piece
        words = piece.rsplit(None, 1) if not piece[-1:].isspace() else [piece[:0]]
        kept = words[-1] if words else piece[:0]
        if len(kept) < len(piece):
            yield piece[: len(piece) - len(kept)]
    if kept:
        yield kept


def of_length(pieces: Iterable[str], length: int) -> Iterator[str]:
    """The same text in pieces of `length` characters, the last one shorter."""
    kept = ""
    for piece in pieces:
        kept += piece
        whole = len(kept) - len(kept) % length
        for start in range(0, whole, length):
            yield kept[start : start + length]
        kept = kept[whole:]
    if kept:
        yield kept
