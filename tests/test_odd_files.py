"""Odd files, given to every reader: what is read of them is right, or one sentence names the file and what to do.

A form that some program writes is one line of FILES, and a command that reads files one line of READERS.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="the extra usmoe[train]")

import pyarrow as pa
import pyarrow.parquet as pq

from usmoe.cli.options import read_text
from usmoe.data.labelled import labelled_rows
from usmoe.data.rows import read
from usmoe.data.text import FilePart, Text, decoded
from usmoe.embed.rows import texts_of

ROWS = [{"text": "the cat", "label": 0}, {"text": "a dog — é", "label": 1}]
TEXTS = [row["text"] for row in ROWS]
LATE = [{"text": "the cat"}, *ROWS[1:]]
"""The first row lacks a key."""


def _jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _csv(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    return "".join(f"{one}{delimiter}{two}\n" for one, two in [("text", "label"), *(r.values() for r in rows)]).encode()


def _parquet(texts: Any, **columns: Any) -> bytes:
    written = io.BytesIO()
    pq.write_table(pa.table({"text": texts, "label": pa.array([0, 1])} | columns), written)
    return written.getvalue()


def _zip(*members: bytes) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as packed:
        for number, member in enumerate(members):
            packed.writestr(f"{number}.txt", member)
    return written.getvalue()


PLAIN = "".join(f"{text}\n" for text in TEXTS).encode()
ROWS_OF = {
    "rows.jsonl": _jsonl(ROWS),
    "crlf.jsonl": _jsonl(ROWS).replace(b"\n", b"\r\n"),
    "bom.jsonl": b"\xef\xbb\xbf" + _jsonl(ROWS),
    "blank last line.jsonl": _jsonl(ROWS) + b"\n",
    "blank lines.jsonl": _jsonl(ROWS).replace(b"\n", b"\n\n"),
    "rows.ndjson": _jsonl(ROWS),
    "list.json": json.dumps(ROWS).encode(),
    "columns.json": json.dumps({"text": TEXTS, "label": [0, 1]}).encode(),
    "lines called.json": _jsonl(ROWS),
    "rows.csv": _csv(ROWS),
    "crlf.csv": _csv(ROWS).replace(b"\n", b"\r\n"),
    "bom.csv": b"\xef\xbb\xbf" + _csv(ROWS),
    "rows.tsv": _csv(ROWS, "\t"),
    "upper case.CSV": _csv(ROWS),
    "rows.parquet": _parquet(TEXTS),
    "large strings.parquet": _parquet(pa.array(TEXTS, pa.large_string())),
    "dictionary.parquet": _parquet(pa.array(TEXTS).dictionary_encode()),
    "packed.jsonl": gzip.compress(_jsonl(ROWS)),
}
"""Files of the two rows."""

TEXT_OF = {
    "plain.txt": PLAIN,
    "no suffix": PLAIN,
    "bom.txt": b"\xef\xbb\xbf" + PLAIN,
    "a.txt.gz": gzip.compress(PLAIN),
    "a.txt.bz2": bz2.compress(PLAIN),
    "a.txt.xz": lzma.compress(PLAIN),
    "a.zip": _zip(PLAIN),
    "gzip called.txt": gzip.compress(PLAIN),
    "a.jsonl.gz": gzip.compress(_jsonl(ROWS)),
    "a.csv.bz2": bz2.compress(_csv(ROWS)),
} | ROWS_OF
"""Files of the two lines, or of two rows with them."""

BROKEN = {
    "nothing.csv": (b"", "empty"),
    "nothing.jsonl": (b"", "rows|holds no text|no column|empty"),
    "latin.csv": (b"text,label\nok,0\ncaf\xe9,1\n", "line 3"),
    "latin.jsonl": (b'{"text": "ok"}\n{"text": "caf\xe9"}\n', "line 2"),
    "utf-16.csv": (_csv(ROWS).decode().encode("utf-16"), "UTF-16"),
    "cut.jsonl": (_jsonl(ROWS)[:-8], "line 2"),
    "cut.parquet": (_parquet(TEXTS)[:-9], "cut.parquet"),
    "cut.json": (json.dumps(ROWS).encode()[:-5], "cut.json"),
    "cut.jsonl.gz": (gzip.compress(_jsonl(ROWS) * 100)[:-20], "cut.jsonl.gz"),
    "two.zip": (_zip(PLAIN, PLAIN), "packs 2 files"),
    "a.zst": (b"\x28\xb5\x2f\xfd" + bytes(20), "zstd"),
    "numbers.jsonl": (_jsonl([1, 2]), "line 1|rows"),
    "no text.jsonl": (_jsonl([{"label": 0}, {"label": 1}]), "text"),
    "null.jsonl": (_jsonl([*ROWS, {"text": None, "label": 1}]), "3"),
    "missing later.jsonl": (_jsonl([*ROWS, {"label": 1}]), "3"),
    "bytes.parquet": (_parquet(pa.array([b"a", b"b"])), "bytes"),
    "lists.parquet": (_parquet(pa.array([["a"], ["b"]])), "list"),
    "ints.parquet": (_parquet(pa.array([3, 4])), "int"),
    "null.parquet": (_parquet(pa.array(["a", None])), "null|no text"),
    "blank lines.csv": (b"\n\n", "empty"),
    "list called.jsonl": (json.dumps(ROWS).encode(), "line 1|JSON objects"),
    "large whole numbers.json": (json.dumps([{"text": "a", "label": 2**70}]).encode(), "large|big|int"),
    "utf-16.txt": (PLAIN.decode().encode("utf-16"), "UTF-8"),
    "two texts.csv": (b"text,text\na,b\n", "two columns"),
    "mixed.jsonl": (_jsonl([{"text": "a", "label": 0}, {"text": ["b"], "label": 1}]), "2"),
}
"""Files that no one can read, each with what every reader that reads its format says beside its name."""


def _corpus(path: Path) -> list[str]:
    return "".join(decoded(Text(parts=(FilePart(path),)))).splitlines()


def _labelled(path: Path) -> list[str]:
    return list(labelled_rows(str(path))["train"].texts)


TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
UNREADABLE = ("nothing", "latin", "utf", "cut", "numbers", "two", "mixed", "blank", "list called", "large whole")
"""Of BROKEN: what no columns are read of; what the columns hold is the matter of the task that reads them."""

READERS: dict[str, tuple[Callable[[Path], list[str]], tuple[str, ...], bool]] = {
    "train": (_corpus, (), True),
    "eval RUN --text, route, patch, tune, demo": (lambda path: read_text(str(path)).splitlines(), (), True),
    "embed, standardize": (lambda path: list(texts_of(str(path))), (".json", ".csv", ".tsv"), True),
    "finetune": (_labelled, (), False),
    "eval --data": (lambda path: list(read(path)["text"]), (), False),
}
"""Reader -> texts of a file, the endings that it refuses, and whether it reads texts that are no rows."""


def _cases(files: Any) -> list[Any]:
    found = []
    for reader, (_, _, plain) in READERS.items():
        for name in files:
            broken_elsewhere = reader == "eval --data" and name in BROKEN and not name.startswith(UNREADABLE)
            if (plain or Path(name).suffix.lower() in TABLES) and not broken_elsewhere:
                found.append(pytest.param(reader, name, id=f"{reader}-{name}"))
    return found


def _written(folder: Path, name: str, raw: bytes) -> Path:
    path = folder / name
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize(("reader", "name"), _cases(TEXT_OF))
def test_the_texts_of_an_odd_file_are_its_texts(tmp_path: Path, reader: str, name: str):
    texts, refused, _ = READERS[reader]
    path = _written(tmp_path, name, TEXT_OF[name])
    if any(suffix.lower() in refused for suffix in path.suffixes):
        with pytest.raises(ValueError, match=r"is no file with a text a line\. Make it \.jsonl or \.parquet"):
            texts(path)
    else:
        assert [text.rstrip("\r") for text in texts(path)] == TEXTS


@pytest.mark.parametrize(("reader", "name"), _cases(BROKEN))
def test_a_broken_file_is_named_in_a_sentence(tmp_path: Path, reader: str, name: str):
    texts, refused, _ = READERS[reader]
    raw, said = BROKEN[name]
    path = _written(tmp_path, name, raw)
    if name == "nothing.jsonl" and reader.startswith(("embed", "train")):
        assert texts(path) == []  # what is to be done with no text at all, the command says
        return
    with pytest.raises(ValueError) as error:
        texts(path)
    sentence = str(error.value)
    assert path.name in sentence
    assert sentence.endswith((".", ")"))
    assert len(sentence.splitlines()) == 1
    if not any(suffix.lower() in refused for suffix in path.suffixes):
        assert re.search(said, sentence), sentence


@pytest.mark.parametrize("name", ["late.jsonl", "late.json"])
def test_a_key_that_the_first_row_lacks_is_a_column_of_all(tmp_path: Path, name: str):
    """Rows of a corpus with titles: one without a title came first, and no title was read."""
    raw = _jsonl(LATE) if name.endswith("l") else json.dumps(LATE).encode()
    rows = read(_written(tmp_path, name, raw))
    assert rows.column_names == ["text", "label"]
    assert list(rows["label"]) == [None, 1]


def test_labels_that_differ_as_written_are_different_classes(tmp_path: Path):
    rows = labelled_rows(str(_written(tmp_path, "a.csv", b"text,label\na,01\nb,1\nc,2\n")))["train"]
    assert rows.keys == ("01", "1", "2")
    long = labelled_rows(
        str(_written(tmp_path, "b.csv", b"text,label\na,12345678901234567890\nb,12345678901234567891\n"))
    )
    assert len(set(long["train"].keys)) == 2


def test_labels_of_json_that_are_numbers_and_texts_are_one_class(tmp_path: Path):
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": "1"}, {"text": "c", "label": 0}]
    found = labelled_rows(str(_written(tmp_path, "a.jsonl", _jsonl(rows))))["train"]
    assert found.keys == ("1", "1", "0")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_number_among_the_texts_of_a_corpus_is_refused(tmp_path: Path, name: str):
    rows = [*ROWS, {"text": 7, "label": 1}]
    raw = _jsonl(rows) if name.endswith("l") else json.dumps(rows).encode()
    with pytest.raises(ValueError, match=r"a\.jsonl? cannot be read .* row 3.* a int"):
        _corpus(_written(tmp_path, name, raw))


def test_a_text_may_begin_as_a_compressed_file_does(tmp_path: Path):
    for begin in (b"BZh is no word\n", b"BZh91AY is none\n", b"PK is a name\n", b"7z is short\n"):
        assert read_text(str(_written(tmp_path, "a.txt", begin))) == begin.decode()


def test_a_row_without_a_text_far_into_a_file_is_named_by_its_row(tmp_path: Path):
    rows = [{"text": "a"}] * 1_000 + [{"label": 1}] * 1_000
    with pytest.raises(ValueError, match=r"row 1,001 holds null in the column text"):
        _corpus(_written(tmp_path, "a.jsonl", _jsonl(rows)))
