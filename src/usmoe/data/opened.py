"""Files as bytes of text: compression undone, and what is no UTF-8 refused with its line."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

COMPRESSED = (".gz", ".bz2", ".xz", ".zip")
"""Endings of compressed files. What a file is, its first bytes say, whatever it is called."""

_OPENERS: dict[bytes, Any] = {
    rb"\x1f\x8b\x08": gzip.open,
    rb"BZh[1-9](?:1AY&SY|\x17\x72\x45\x38\x50\x90)": bz2.open,  # a block, or the end of an empty file
    rb"\xfd7zXZ\0": lzma.open,
}
"""By what a compressed file begins with, as a pattern: a text may begin with the letters BZh alone."""

_REFUSED = {
    b"\x28\xb5\x2f\xfd": "is compressed by zstd, which usmoe does not read. Decompress it (zstd -d)",
    b"7z\xbc\xaf\x27\x1c": "is a 7z archive, which usmoe does not read. Unpack it",
}


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file to read from, after decompression: .gz, .bz2, .xz, or .zip of one file, known by content.

    Raises ValueError, naming the file, for a form that is not read here (zstd, 7z), and where the file cannot
    be read or is cut short.
    """
    try:
        with contextlib.ExitStack() as stack:
            yield stack.enter_context(_open(path, stack))
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}. Put a whole copy there.") from error


def _open(path: Path, stack: contextlib.ExitStack) -> IO[bytes]:
    with path.open("rb") as file:
        first = file.read(16)
    for magic, reason in _REFUSED.items():
        if first.startswith(magic):
            raise ValueError(f"{path} {reason}.")
    for magic, open_it in _OPENERS.items():
        if re.match(magic, first):
            return open_it(path)
    if not (first.startswith(b"PK") and zipfile.is_zipfile(path)):
        return path.open("rb")
    packed = stack.enter_context(zipfile.ZipFile(path))
    members = [member for member in packed.infolist() if not member.is_dir()]
    if len(members) != 1:
        raise zipfile.BadZipFile(f"it packs {len(members)} files, and a text is one")
    return packed.open(members[0])


def plain_suffix(path: Path) -> str:
    """The ending of a file's name without that of its compression, in lower case: .jsonl of a.jsonl.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def utf8(raw: bytes) -> str:
    """The text of UTF-8, without a byte order mark. Raises ValueError for what is none, with its line."""
    try:
        return raw.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        form = "it is UTF-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "it is no UTF-8"
        raise ValueError(f"{form}: line {line:,} holds the byte 0x{raw[error.start]:02x}. Save it as UTF-8") from error
