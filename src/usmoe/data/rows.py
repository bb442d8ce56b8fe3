"""The rows of a file of data, in the columns that the hub has."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

_UNTYPED = ("_id", "id", "query-id", "corpus-id")
_LONGEST = 2**31 - 1
"""Characters of a field; the csv module's own limit, of the whole process, is 131,072."""


def read(path: Path) -> Dataset:
    """The rows of a .parquet, .jsonl, .json, .csv or .tsv file, in memory; ids in csv and tsv are text.

    Raises ValueError, naming the file, where it cannot be read: truncated, empty, of another format, or with two
    columns of one name."""
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            _refuse_twice(pq.read_schema(path).names)
            return Dataset(pq.read_table(path))  # pyright: ignore[reportArgumentType]
        if kind in (".csv", ".tsv"):
            return _csv(path, "\t" if kind == ".tsv" else ",")
        text = path.read_text(encoding="utf-8-sig")
        whole = json.loads(text) if kind == ".json" else _lines(text)
        if isinstance(whole, dict) and whole and all(isinstance(column, list) for column in whole.values()):
            return Dataset.from_dict(whole)
        if not isinstance(whole, list) or not whole or not all(isinstance(row, dict) for row in whole):
            raise ValueError("it holds no rows, which are JSON objects")
        return Dataset.from_list(whole)
    except (ValueError, TypeError, OSError, pa.ArrowException) as error:
        reason = str(error).strip().rstrip(".").splitlines() or [type(error).__name__]
        raise ValueError(
            f"{path} cannot be read as {kind[1:]}: {reason[0]}. Correct it, or put a whole copy there."
        ) from error


def lines(path: Path) -> Iterator[bytes]:
    """The column text of a .parquet file as lines of UTF-8, each row ended by one line end; a thousand rows at a time.

    Raises ValueError, naming the file, where it has no such column or cannot be read."""
    try:
        with pq.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise ValueError(f"it has no column text, but {_listed(file.schema_arrow.names)}")
            for batch in file.iter_batches(batch_size=1000, columns=["text"]):
                yield joined(batch.column(0).to_pylist())
    except (ValueError, OSError, pa.ArrowException) as error:
        reason = str(error).strip().rstrip(".").splitlines()[0]
        raise ValueError(f"{path} cannot be read as parquet: {reason}. Put a whole copy there.") from error


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


def _csv(path: Path, delimiter: str) -> Dataset:
    """Columns of whole numbers and of numbers become such; ids and all else stay text. Blank lines are no rows."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(_rows(file, delimiter))
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
    if name not in _UNTYPED:
        for kind, form in ((int, r"-?\d{1,18}"), (float, r"-?\d*\.?\d+(e[-+]?\d+)?")):
            if all(re.fullmatch(form, value) for value in column):
                return [kind(value) for value in column]
    return column


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "nothing"
