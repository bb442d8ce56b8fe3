"""Vectors as a file: NumPy's own format, Parquet, or lines of JSON."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from usmoe.embed.rows import import_parquet

Blocks = Iterable[np.ndarray]
"""The rows of a matrix (n, D) in float32, a block of them (m, D) after the other."""
Writer = Callable[[Path, Blocks, int], None]
"""(path, blocks, D) -> None"""


def npy_header(rows: int, dimension: int) -> bytes:
    """What stands before the numbers in an .npy file of float32; as long for many rows as for few."""
    file = io.BytesIO()
    about = {"descr": "<f4", "fortran_order": False, "shape": (rows, dimension)}
    np.lib.format.write_array_header_1_0(file, about)
    return file.getvalue()


def write_parquet(path: Path, blocks: Blocks, dimension: int) -> None:
    """Columns "row" (int64, from 0) and "embedding" (D numbers of float32); a row group a block."""
    parquet = import_parquet()
    import pyarrow as pa

    vector = pa.list_(pa.float32(), dimension)
    schema = pa.schema([("row", pa.int64()), ("embedding", vector)])
    with parquet.ParquetWriter(path, schema, use_dictionary=False) as writer:
        for first, block in _numbered(blocks):
            numbers = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), dimension)
            columns = [pa.array(np.arange(first, first + len(block))), numbers]
            writer.write_batch(pa.record_batch(columns, schema=schema), row_group_size=len(block))


def write_jsonl(path: Path, blocks: Blocks, dimension: int) -> None:
    """{"row": 0, "embedding": [...]} a line; nine digits a number, which name a float32 exactly."""
    with path.open("w", encoding="ascii", newline="\n") as file:
        for first, block in _numbered(blocks):
            for row, vector in enumerate(block, first):
                numbers = ", ".join(map("%.9g".__mod__, vector.tolist()))
                file.write(f'{{"row": {row}, "embedding": [{numbers}]}}\n')


def _numbered(blocks: Blocks) -> Iterator[tuple[int, np.ndarray]]:
    """Each block, behind the number of its first row."""
    first = 0
    for block in blocks:
        yield first, block
        first += len(block)


WRITERS: dict[str, Writer | None] = {".npy": None, ".parquet": write_parquet, ".jsonl": write_jsonl}
"""By the end of a file's name; None for .npy, which is what a part file is already."""


def writer_of(output: Path) -> Writer | None:
    """What writes a file of this name. Raises ValueError for a name that ends otherwise, and for Parquet without
    pyarrow."""
    suffix = output.suffix.lower()
    if suffix not in WRITERS:
        raise ValueError(f"{output.name} does not end in one of {', '.join(WRITERS)}. Give such a name.")
    if suffix == ".parquet":
        import_parquet()
    return WRITERS[suffix]
