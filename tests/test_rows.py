"""Files of rows: what is read of csv, tsv, JSON lines and parquet, and what is refused, with its line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="the extra usmoe[train]")

import pyarrow as pa
import pyarrow.parquet as pq

from usmoe.data.rows import read

BROKEN = {
    "nothing": ("csv", "", r"it is empty\."),
    "blank lines": ("csv", "\n\n", r"it is empty\."),
    "a head": ("csv", "text,label\n\n", r"it has a head alone, and no rows\."),
    "a short row": ("csv", 'text,label\n"a\nb",0\n\nc\n', r"line 5 has 1 field, and the head has 2\."),
    "a quote": (
        "csv",
        'text,label\na,0\n"b,1\nc,0\n',
        r"quotes do not match in the row that begins in line 3 \(unexpected end of data\)\.",
    ),
    "two columns": ("tsv", "text\tlabel\tlabel\na\t0\t1\n", r"two columns are called 'label'\."),
    "a line of JSON": ("jsonl", '{"text": "a"}\n{"text": }\n', r"Expecting value: line 2 column 10\."),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_with_its_line(tmp_path: Path, case: str):
    ending, text, reason = BROKEN[case]
    path = tmp_path / f"test.{ending}"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=rf"test\.{ending} cannot be read as {ending}: .*{reason} Correct it, or put a"
    ):
        read(path)


def test_two_columns_of_one_name_in_parquet_are_refused(tmp_path: Path):
    columns = [pa.array(["a"]), pa.array([0]), pa.array([1])]
    pq.write_table(pa.table(columns, names=["text", "label", "label"]), tmp_path / "test.parquet")
    with pytest.raises(ValueError, match=r"test\.parquet cannot be read as parquet: two columns are called 'label'\."):
        read(tmp_path / "test.parquet")


def test_blank_lines_and_columns_without_a_name_are_no_data(tmp_path: Path):
    (tmp_path / "test.csv").write_text("\ntext,label,,\n\na,0,,\nb,1,,\n\n")
    rows = read(tmp_path / "test.csv")
    assert (rows["text"][:], rows["label"][:]) == (["a", "b"], [0, 1])


def test_a_text_may_be_long_and_hold_every_line_end(tmp_path: Path):
    """U+2028 and U+0085 end no line of JSON; the csv module's limit, of the whole process, is as before."""
    before = csv.field_size_limit()
    long, odd = "word " * 40_000, "one\u2028two\u0085three\x0bfour"
    with (tmp_path / "test.CSV").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text", "label"], [long, 0], [odd, 1]])
    rows = [json.dumps({"text": text, "label": label}, ensure_ascii=False) for label, text in enumerate((long, odd))]
    (tmp_path / "test.JSONL").write_bytes("\r\n".join(rows).encode())
    for name in ("test.CSV", "test.JSONL"):
        assert read(tmp_path / name)["text"][:] == [long, odd]
    assert csv.field_size_limit() == before
