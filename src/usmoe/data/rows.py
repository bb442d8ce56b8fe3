"""The rows of a file of data, in the columns that the hub has."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from usmoe.data.opened import opened, plain_suffix, utf8

_UNTYPED = ("_id", "id", "query-id", "corpus-id")
_LONGEST = 2**31 - 1
"""Characters of a field; the csv module's own limit, of the whole process, is 131,072."""
_WHOLE = r"0|-?[1-9]\d{0,17}"
_NUMBER = r"-?(?!0\d|\d{16,}$)\d*\.?\d+(e[-+]?\d+)?"


def read(path: Path, *, mixed: bool = True) -> Dataset:
    """The rows of a .parquet, .jsonl (.ndjson), .json, .csv or .tsv file, in memory; ids in csv and tsv are text.

    A .json file holds a list of objects, an object of columns, or an object a line. Rows of JSON have all keys that any
    of them has; a key that a row lacks is null there. Whole numbers beside texts in a column of theirs are texts, so
    that the labels 1 and "1" are one; without `mixed` they are refused.

    Raises ValueError, naming the file, where it cannot be read: truncated, empty, of another format, or with two
    columns of one name."""
    kind = plain_suffix(path)
    try:
        if kind == ".parquet":
            _refuse_twice(pq.read_schema(path).names)
            return Dataset(pq.read_table(path))  # pyright: ignore[reportArgumentType]
        with opened(path) as file:
            text = utf8(file.read())
        if kind in (".csv", ".tsv"):
            return _csv(text, "\t" if kind == ".tsv" else ",")
        whole = _json(text) if kind == ".json" else _lines(text)
        if isinstance(whole, dict) and whole and all(isinstance(column, list) for column in whole.values()):
            return Dataset.from_dict({name: _of_one_kind(name, column, mixed) for name, column in whole.items()})
        if not isinstance(whole, list) or not whole or not all(isinstance(row, dict) for row in whole):
            raise ValueError("it holds no rows, which are JSON objects")
        names = dict.fromkeys(name for row in whole for name in row)
        return Dataset.from_dict({name: _of_one_kind(name, [row.get(name) for row in whole], mixed) for name in names})
    except (ValueError, TypeError, OSError, OverflowError, pa.ArrowException) as error:
        reason = str(error).removeprefix(f"{path} ").strip().rstrip(".").splitlines() or [type(error).__name__]
        raise ValueError(
            f"{path} cannot be read as {kind[1:]}: {reason[0]}. Correct it, or put a whole copy there."
        ) from error


def lines(path: Path) -> Iterator[bytes]:
    """The column text of a file of rows as lines of UTF-8, each row ended by one line end. In memory are a thousand
    rows at a time, or, of .json, .csv and .tsv, all.

    Raises ValueError, naming the file, where it cannot be read, has no such column, or a row without a text."""
    kind, before = plain_suffix(path), 0
    try:
        for batch in _batches(path, kind):
            for number, text in enumerate(batch, before + 1):
                if not isinstance(text, str):
                    what = "null" if text is None else f"a {type(text).__name__}"
                    raise ValueError(f"row {number:,} holds {what} in the column text, and not a text")
            before += len(batch)
            yield joined(batch)
    except (ValueError, OSError, pa.ArrowException) as error:
        reason = str(error).removeprefix(f"{path} ").strip().rstrip(".").splitlines()[0]
        raise ValueError(f"{path} cannot be read as {kind[1:]}: {reason}. Put a whole copy there.") from error


def _batches(path: Path, kind: str) -> Iterator[list[Any]]:
    """The column text, a thousand rows at a time."""
    if kind == ".parquet":
        with pq.ParquetFile(path) as file:
            _require_text(file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1000, columns=["text"]):
                yield batch.column(0).to_pylist()
    elif kind in (".jsonl", ".ndjson"):
        with opened(path) as file:
            rows = (_row(line, number) for number, line in enumerate(file, 1) if line.strip())
            first = True
            while batch := list(itertools.islice(rows, 1000)):
                if first:
                    _require_text(dict.fromkeys(name for row in batch for name in row))
                first = False
                yield [row.get("text") for row in batch]
    else:
        rows = read(path, mixed=False)
        _require_text(rows.column_names)
        for batch in rows.iter(batch_size=1000):
            yield batch["text"]  # pyright: ignore[reportIndexIssue, reportCallIssue, reportArgumentType]


def _require_text(names: Iterable[str]) -> None:
    if "text" not in names:
        raise ValueError(f"it has no column text, but {_listed(list(names))}")


def _row(line: bytes, number: int) -> dict[str, Any]:
    """The object in a line of JSON lines."""
    try:
        row = json.loads(line.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no UTF-8: line {number:,} holds the byte 0x{line[error.start]:02x}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg}: line {number:,} column {error.colno:,}") from error
    if not isinstance(row, dict):
        raise ValueError(f"line {number:,} is no row, which is a JSON object")
    return row


def joined(rows: Iterable[str | None]) -> bytes:
    """Rows of text as lines. WikiText's rows end with a line end of their own, or are empty: both are one line."""
    return "".join((row or "").removesuffix("\n") + "\n" for row in rows).encode()


def require_columns(rows: Dataset, columns: Sequence[str], path: Path) -> None:
    """Raises ValueError where a file's rows lack columns, naming the file, what is missing and what is there."""
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise ValueError(
            f"{path} lacks {_listed(missing)}: it has {_listed(rows.column_names)}. Give it the columns that it has "
            "on the hub."
        )


def _json(text: str) -> Any:
    """A whole of JSON, or, as many files called .json are, an object a line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        return _lines(text)


def _of_one_kind(name: str, column: list[Any], mixed: bool) -> list[Any]:
    """A column of JSON as Arrow can hold it: with `mixed`, whole numbers beside texts become texts.

    Raises ValueError, with the row, for other mixtures."""
    kinds = {type(value) for value in column if value is not None}
    if len(kinds) < 2 or kinds <= {int, float}:
        return column
    if mixed and kinds == {str, int}:
        return [str(value) if isinstance(value, int) else value for value in column]
    first = next(value for value in column if value is not None)
    number, other = next((n, v) for n, v in enumerate(column, 1) if v is not None and type(v) is not type(first))
    raise ValueError(
        f"the column {name!r} holds a {type(first).__name__} and, in row {number:,}, a {type(other).__name__}, and a "
        "column is of one kind"
    )


def _lines(text: str) -> list[Any]:
    """JSON, an object a line. A line ends at a line feed alone: U+2028 and its like may stand in a text."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{error.msg}: line {number:,} column {error.colno:,}") from error
    return found


def _csv(text: str, delimiter: str) -> Dataset:
    """Columns of whole numbers and of numbers become such; ids and all else stay text. Blank lines are no rows."""
    rows = list(_rows(io.StringIO(text, newline=""), delimiter))
    if not rows:
        raise ValueError("it is empty")
    (_, head), *body = rows
    if not body:
        raise ValueError("it has a head alone, and no rows")
    _refuse_twice(name for name in head if name)  # columns without a name are no one's: what a spreadsheet leaves
    for line, row in body:
        if len(row) != len(head):
            fields = "1 field" if len(row) == 1 else f"{len(row)} fields"
            raise ValueError(f"line {line:,} has {fields}, and the head has {len(head)}")
    columns = dict(zip(head, zip(*(row for _, row in body), strict=True), strict=True))
    return Dataset.from_dict({name: _typed(name, column) for name, column in columns.items()})


def _rows(file: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Each row that is not blank, with the line in which it begins."""
    before, line = csv.field_size_limit(_LONGEST), 1
    try:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"the quotes do not match in the row that begins in line {line:,} ({error})") from error
    finally:
        csv.field_size_limit(before)


def _refuse_twice(names: Iterable[str]) -> None:
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise ValueError(f"two columns are called {twice[0]!r}")


def _typed(name: str, column: Sequence[str]) -> Sequence[Any]:
    """A column of csv as numbers, where no two texts that differ in digits would become one number: 01 is no 1, and of
    a number of 19 digits a float has not all."""
    if name not in _UNTYPED:
        for kind, form in ((int, _WHOLE), (float, _NUMBER)):
            if all(re.fullmatch(form, value) for value in column):
                return [kind(value) for value in column]
    return column


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "nothing"
