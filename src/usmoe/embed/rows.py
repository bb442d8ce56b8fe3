"""The texts of a file, read as they are asked for: lines of text, lines of JSON, or a column of Parquet."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from usmoe.data.opened import opened, plain_suffix

_JSON_LINES = (".jsonl", ".ndjson")
_OTHERS = (".csv", ".tsv", ".json")
"""Files whose lines are no texts, though they could be read as such."""


def texts_of(source: str, column: str | None = None) -> Iterator[str]:
    """The texts of a file, in order; one of them at a time is in memory, or, of Parquet, a row group.

    source  "-" for stdin, and what ends in none of the following: UTF-8, a text a line; an empty line is an empty text.
            .jsonl and .ndjson: an object a line; a blank line is none. .parquet: a table. Of a file that is compressed
            (.gz, .bz2, .xz, .zip of one file), what is in it
    column  where the text stands in these two; None: "text"

    Raises ValueError, with the line or row, for what is not UTF-8, not JSON or no text, and where there is no such file
    or column.
    """
    suffix = plain_suffix(Path(source))
    table = suffix in (*_JSON_LINES, ".parquet")
    if column is not None and not table:
        raise ValueError(f"{source} has a text a line, so it has no column {column!r}. Leave --column out.")
    if source == "-":
        yield from _lines(sys.stdin.buffer, "stdin")
        return
    path = Path(source)
    if not path.is_file():
        raise ValueError(
            f"There is no text file {source}. Give a file with a text a line, .jsonl or .parquet, or - for stdin."
        )
    if suffix in _OTHERS:
        raise ValueError(
            f"{source} is no file with a text a line. Make it .jsonl or .parquet, with a column of texts, or .txt."
        )
    if suffix == ".parquet":
        yield from _column(path, column or "text")
        return
    with opened(path) as file:
        yield from _json_lines(file, source, column or "text") if table else _lines(file, source)


def _lines(file: Iterable[bytes], name: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        raw = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        try:
            text = raw.removesuffix(b"\n").removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name} is not UTF-8: line {number} holds byte 0x{raw[error.start]:02x}. Convert it."
            ) from error
        yield text


def _json_lines(file: Iterable[bytes], name: str, column: str) -> Iterator[str]:
    for number, line in enumerate(_lines(file, name), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{name} is not JSON lines: line {number} holds none. Give an object a line.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{name} has no columns: line {number} is not an object. Give an object a line.")
        if column not in row:
            raise ValueError(f"Line {number} of {name} {_missing(column, row)}")
        yield _text(row[column], f"line {number} of {name}", column)


def _column(path: Path, column: str) -> Iterator[str]:
    parquet = import_parquet()
    try:
        file = parquet.ParquetFile(path)
    except ValueError as error:  # pyarrow's ArrowInvalid
        raise ValueError(f"{path} is not Parquet: {error}") from error
    with file:
        if column not in file.schema_arrow.names:
            raise ValueError(f"{path} {_missing(column, file.schema_arrow.names)}")
        row = 0
        for batch in file.iter_batches(1024, columns=[column]):
            for value in batch.column(0).to_pylist():
                yield _text(value, f"row {row} of {path}", column)
                row += 1


def _missing(column: str, columns: Iterable[str]) -> str:
    return f"has no column {column!r}. Name one with --column: {', '.join(columns) or 'it has none'}."


def _text(value: Any, place: str, column: str) -> str:
    if not isinstance(value, str):
        what = "null" if value is None else f"a {type(value).__name__}"
        raise ValueError(f'Column {column!r} holds {what}, not a text, in {place}. Put "" where there is no text.')
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can write half of a character
            raise ValueError(f"Column {column!r} holds half a character (a lone surrogate) in {place}.") from error
    return value


def import_parquet() -> Any:
    """pyarrow.parquet. Raises ValueError where pyarrow is missing."""
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ValueError("Parquet needs pyarrow. Install it: pip install pyarrow, or use .jsonl instead.") from error
    return pyarrow.parquet
