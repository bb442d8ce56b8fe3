"""`usmoe embed`: a row a text, in order, whatever stops the work in between."""

from __future__ import annotations

import contextlib
import io
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

import usmoe
from tiny import tiny
from usmoe.cli import main
from usmoe.embed import encoder as encoder_module
from usmoe.embed import part, stream
from usmoe.embed.features import Features
from usmoe.embed.part import Done, Part
from usmoe.embed.rows import texts_of
from usmoe.embed.standardize import Statistics
from usmoe.embed.stream import embed_file
from usmoe.models import SAMPLE

FORMATS = [".npy", ".parquet", ".jsonl"]
TEXTS = ["one", "", "drei", "ein \u2028 Strich", "five  ", " ", "seven\tseven", "acht", "neun", "ten"]


class Fake:
    """Vectors that tell what their text is, made so quickly that only the streaming is left."""

    model = tiny()
    tokenizer = None
    statistics: Any = None
    text_alone = True

    def __init__(self, width: int = 4, stop: int | None = None, error: type[BaseException] = RuntimeError):
        self.width, self.stop, self.error = width, stop, error
        self.seen: list[int] = []
        self.settings: dict[str, Any] = {"prompt": "none"}

    def about(self) -> dict[str, Any]:
        return self.settings

    def encode(self, texts, *args: Any, **options: Any) -> np.ndarray:
        found = [[zlib.crc32(text.encode()) / 3, len(text)] + [0.1] * (self.width - 2) for text in texts]
        return np.array(found, dtype=np.float32).reshape(-1, self.width)

    def features(self, texts, *args: Any, **options: Any) -> Features:
        if len(self.seen) == self.stop:
            raise self.error("stopped")
        self.seen.append(len(texts))
        return Features(hidden=self.encode(texts), router=None, cut=np.array([len(text) > 8 for text in texts]))

    def combine(self, features: Features) -> np.ndarray:
        return features.whole

    def working(self, processes: int) -> Any:
        return contextlib.nullcontext()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Four texts a chunk at batch_size 2."""
    monkeypatch.setattr(stream, "BATCHES", 2)


@pytest.fixture(scope="session")
def shipped():
    return usmoe.Encoder()


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "texts.txt", TEXTS)


def write(path: Path, texts) -> Path:
    path.write_bytes("".join(f"{text}\n" for text in texts).encode())
    return path


def run(encoder: Any, source: Any, output: Path, **options: Any):
    return embed_file(encoder, source, output, batch_size=options.pop("batch_size", 2), progress=False, **options)


def read(path: Path) -> np.ndarray:
    """The vectors of a file, of which row i must be the i-th."""
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        rows = parquet.read_table(path).to_pylist()
    assert [row["row"] for row in rows] == list(range(len(rows)))
    return np.array([row["embedding"] for row in rows], dtype=np.float32)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("suffix", FORMATS)
def test_row_i_is_text_i_in_every_format(shipped, tmp_path, suffix):
    file, output = write(tmp_path / "in.txt", TEXTS), tmp_path / f"out{suffix}"
    written = run(shipped, file, output, batch_size=3)
    found = read(output)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, shipped.encode(TEXTS), atol=1e-4)
    assert (written.rows, written.dimension, written.empty, written.cut) == (10, found.shape[1], 2, 0)
    assert names(tmp_path) == {"in.txt", f"out{suffix}"}


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_holds_the_same_float32_bit_for_bit(file, tmp_path, suffix):
    output = tmp_path / f"out{suffix}"
    run(Fake(), file, output)
    assert read(output).tobytes() == Fake().encode(TEXTS).tobytes()
    if suffix == ".parquet":
        schema = parquet.read_schema(output)
        assert str(schema.field("row").type) == "int64"
        assert str(schema.field("embedding").type).startswith("fixed_size_list<")


def test_a_parquet_file_has_a_row_group_a_block(file, tmp_path, monkeypatch):
    monkeypatch.setattr(part, "_BLOCK", 12)
    run(Fake(), file, tmp_path / "out.parquet")
    found = parquet.ParquetFile(tmp_path / "out.parquet")
    assert [found.metadata.row_group(group).num_rows for group in range(4)] == [3, 3, 3, 1]
    assert read(tmp_path / "out.parquet").tobytes() == Fake().encode(TEXTS).tobytes()


def test_inputs_of_three_kinds_say_the_same(tmp_path, monkeypatch):
    plain = write(tmp_path / "a.txt", TEXTS)
    lines = write(tmp_path / "a.jsonl", [json.dumps({"n": n, "text": text}) for n, text in enumerate(TEXTS)])
    parquet.write_table(pa.table({"title": TEXTS, "text": ["x"] * 10}), tmp_path / "a.parquet", row_group_size=3)
    windows = tmp_path / "windows.txt"
    windows.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(TEXTS).encode())  # with a mark, and no end of the last line
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(plain.read_bytes())))
    sources = [("-", None), (plain, None), (lines, None), (tmp_path / "a.parquet", "title"), (windows, None)]
    for source, column in sources:
        assert list(texts_of(str(source), column)) == TEXTS


def test_no_more_than_a_chunk_is_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "BATCHES", 32)
    monkeypatch.setattr(part, "_BLOCK", 2**12)
    for output, rows in (("out.npy", 200_000), ("out.jsonl", 20_000)):
        file = write(tmp_path / "long.txt", (f"text {number}" for number in range(rows)))
        encoder = Fake()
        tracemalloc.start()
        run(encoder, file, tmp_path / output, batch_size=64)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert encoder.seen == [2048] * (rows // 2048) + [rows % 2048]
        assert peak < 2e6, "2,048 texts and their vectors; all would be ten times as much"
    assert np.load(tmp_path / "out.npy", mmap_mode="r").shape == (200_000, 4)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("stop", [0, 1, 2])
def test_what_was_done_is_kept(file, tmp_path, stop, error):
    output = tmp_path / "out.npy"
    with contextlib.suppress(error):
        run(Fake(stop=stop + 1 if stop else 0, error=error), file, output)  # one more: an empty text is tried first
    assert not output.exists()
    assert (tmp_path / "out.npy.part").exists() == (stop > 0)
    encoder = Fake()
    written = run(encoder, file, output)
    assert written.kept == min(4 * stop, 10)
    assert sum(encoder.seen[1:]) == 10 - written.kept
    assert np.load(output).tobytes() == Fake().encode(TEXTS).tobytes()
    assert (written.rows, written.empty, written.cut) == (10, 2, 2)
    assert names(tmp_path) == {"texts.txt", "out.npy"}


def test_an_interruption_says_what_is_kept(file, tmp_path):
    with pytest.raises(KeyboardInterrupt) as stop:
        run(Fake(stop=2, error=KeyboardInterrupt), file, tmp_path / "out.npy")
    assert stop.value.__notes__ == ["4 rows are kept: the same command goes on from there."]


@pytest.mark.parametrize("torn", [0, 5])
@pytest.mark.parametrize("suffix", FORMATS)
def test_killed_at_any_moment_it_goes_on(file, tmp_path, monkeypatch, suffix, torn):
    """A copy of the folder before each thing that is made to stay is what a kill would leave; once more with the end of
    what was written last torn off, where it is not counted yet."""
    work, output = tmp_path / "work", f"out{suffix}"
    work.mkdir()
    copies: list[Path] = []

    def kill() -> None:
        copies.append(shutil.copytree(work, tmp_path / f"copy{len(copies)}"))

    real, replace, unlink = part.os.fsync, Path.replace, Path.unlink
    monkeypatch.setattr(part.os, "fsync", lambda number: (kill(), real(number))[1])
    monkeypatch.setattr(Path, "replace", lambda path, to: (kill(), replace(path, to), kill())[1])
    monkeypatch.setattr(Path, "unlink", lambda path, **options: (kill(), unlink(path, **options), kill())[1])
    run(Fake(), file, work / output)
    monkeypatch.undo()
    monkeypatch.setattr(stream, "BATCHES", 2)
    whole = (work / output).read_bytes()
    assert len(copies) > 15
    kept = set()
    for copy in copies:
        if (copy / output).exists():  # all was done but the clearing up
            assert (copy / output).read_bytes() == whole
            continue
        tear(copy / f"{output}.part", torn)
        kept.add(run(Fake(), file, copy / output).kept)
        assert (copy / output).read_bytes() == whole
        assert names(copy) == {output}
    assert kept == {0, 4, 8, 10}


def tear(path: Path, count: int) -> None:
    """Take off the last bytes, unless they are counted."""
    beside = path.with_name(f"{path.name}.json")
    rows = json.loads(beside.read_text())["done"]["rows"] if beside.exists() else 0
    size = path.stat().st_size
    if size - count > 128 + 16 * rows:
        with path.open("r+b") as file:
            file.truncate(size - count)


@pytest.mark.slow
def test_a_process_that_is_killed_goes_on(shipped, tmp_path):
    lines = [line for line in SAMPLE.read_text(encoding="utf-8").split("\n") if line][:150]
    file, output = write(tmp_path / "in.txt", lines), tmp_path / "out.npy"
    words = [sys.executable, "-m", "usmoe", "embed", "shipped", str(file), "-o", str(output), "--batch-size", "1"]
    process = subprocess.Popen([*words, "--processes", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while done_in(tmp_path / "out.npy.part.json") == 0:
        assert process.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    kept = done_in(tmp_path / "out.npy.part.json")
    assert 0 < kept < 150
    again = subprocess.run([*words, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(again.stdout)["kept"] == kept
    np.testing.assert_allclose(np.load(output), shipped.encode(lines), atol=1e-4)
    assert children
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


def done_in(beside: Path) -> int:
    return json.loads(beside.read_text())["done"]["rows"] if beside.exists() else 0


def interrupted(source: Any, output: Path, **options: Any) -> None:
    """Two chunks, eight rows, are done."""
    with pytest.raises(RuntimeError):
        run(Fake(stop=3), source, output, **options)


def test_other_settings_are_refused_by_name(file, tmp_path):
    output = tmp_path / "out.npy"
    interrupted(file, output)
    other = Fake()
    other.settings = {"prompt": "prompteol", "w": 2}
    with pytest.raises(ValueError, match=r"begun with prompt='none', not 'prompteol'; w=None, not 2\. Give --force"):
        run(other, file, output)
    with pytest.raises(ValueError, match="instruction=None, not 'Find'"):
        run(Fake(), file, output, instruction="Find")
    other = Fake()
    other.model = tiny(num_hidden_layers=1)
    with pytest.raises(ValueError, match="begun with model="):
        run(other, file, output)
    other = Fake()
    other.statistics = Statistics(name="two", texts=2, mean=np.zeros(2), deviation=np.ones(2))
    with pytest.raises(ValueError, match="begun with statistics=None"):
        run(other, file, output)
    other.settings = {"prompt": "sentiment"}
    assert run(other, file, output, force=True).kept == 0
    interrupted(file, output, force=True)
    assert run(Fake(), file, output, force=True).kept == 8, "--force begins anew only what does not fit"


def test_another_batch_size_goes_on_only_where_vectors_depend_on_their_text_alone(file, tmp_path):
    output = tmp_path / "out.npy"
    interrupted(file, output)
    assert run(Fake(), file, output, batch_size=5).kept == 8
    output.unlink()
    Fake.text_alone = False
    try:
        interrupted(file, output)
        with pytest.raises(ValueError, match="begun with batch_size=2, not 5"):
            run(Fake(), file, output, batch_size=5)
        assert run(Fake(), file, output).kept == 8
    finally:
        Fake.text_alone = True


def test_other_texts_are_refused_where_they_were_done(file, tmp_path):
    output = tmp_path / "out.npy"
    interrupted(file, output)
    for texts in (["ONE", *TEXTS[1:]], TEXTS[:7], ["onedrei", *TEXTS[1:]], TEXTS[::-1]):
        write(file, texts)
        with pytest.raises(ValueError, match=r"begun with other texts: the first 8 of .*Give --force"):
            run(Fake(), file, output)
    behind = [*TEXTS[:8], "nine", "zehn", "elf"]
    assert run(Fake(), write(file, behind), output).kept == 8
    assert np.load(output).tobytes() == Fake().encode(behind).tobytes()
    interrupted(file, tmp_path / "new.npy")
    assert run(Fake(), write(file, TEXTS[::-1]), tmp_path / "new.npy", force=True).kept == 0
    assert np.load(tmp_path / "new.npy").tobytes() == Fake().encode(TEXTS[::-1]).tobytes()


def test_where_a_text_ends_is_part_of_the_input(tmp_path):
    """ab and c are other texts than a and bc."""
    first, other = write(tmp_path / "a.txt", ["ab", "c"] * 5), write(tmp_path / "b.txt", ["a", "bc"] * 5)
    with pytest.raises(RuntimeError):
        run(Fake(stop=2), first, tmp_path / "out.npy")
    with pytest.raises(ValueError, match="begun with other texts"):
        run(Fake(), other, tmp_path / "out.npy")


def test_stdin_goes_on_too_and_force_begins_anew(tmp_path, monkeypatch):
    raw = "\n".join(TEXTS).encode()

    def stdin() -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        return "-"

    with pytest.raises(RuntimeError):
        run(Fake(stop=2), stdin(), tmp_path / "out.npy")
    assert run(Fake(), stdin(), tmp_path / "out.npy").kept == 8
    assert np.load(tmp_path / "out.npy").tobytes() == Fake().encode(TEXTS).tobytes()
    with pytest.raises(RuntimeError):
        run(Fake(stop=2), stdin(), tmp_path / "out.npy", force=True)
    assert run(Fake(), stdin(), tmp_path / "out.npy", force=True).kept == 0
    raw = b"fine\nfine\nfine\nfine\n\xff\n"
    with pytest.raises(ValueError, match="stdin is not UTF-8: line 5 holds byte 0xff") as error:
        run(Fake(), stdin(), tmp_path / "new.npy")
    assert error.value.__notes__[0].startswith("4 rows are kept")


def test_part_files_that_say_too_little_are_never_overwritten(file, tmp_path):
    output, beside = tmp_path / "out.npy", tmp_path / "out.npy.part.json"
    half = tmp_path / "out.npy.part"
    half.write_bytes(b"somebody else's download")
    with pytest.raises(ValueError, match=r"out.npy.part.json does not say what it holds. Give --force"):
        run(Fake(), file, output)
    assert half.read_bytes() == b"somebody else's download"
    half.unlink()
    interrupted(file, output)
    counted = json.loads(beside.read_text())
    for text in ("{", "[]", json.dumps(counted | {"done": {"rows": 1, "columns": 2}})):
        beside.write_text(text)
        with pytest.raises(ValueError, match="does not say what it holds"):
            run(Fake(), file, output)
    beside.write_text(json.dumps(counted | {"schema": 2}))
    with pytest.raises(ValueError, match="by another version of usmoe"):
        run(Fake(), file, output)
    beside.write_text(json.dumps(counted))
    with half.open("r+b") as torn:
        torn.truncate(half.stat().st_size - 1)
    with pytest.raises(ValueError, match="holds fewer than the 8 rows"):
        run(Fake(), file, output)
    assert run(Fake(), file, output, force=True).kept == 0
    assert np.load(output).tobytes() == Fake().encode(TEXTS).tobytes()
    beside.write_text(json.dumps(counted))  # a count of nothing
    output.unlink()
    assert run(Fake(), file, output).kept == 0


@pytest.mark.parametrize(
    ("suffix", "width", "size", "limit", "kept"),
    [
        (".npy", 256, 100, 1_250_000, 1200),
        (".npy", 16, 25, 100_000, 1550),  # a chunk that waits in Python's own buffer
        (".jsonl", 256, 100, 2_100_000, 2000),  # enough for the vectors, too little for their digits
    ],
)
def test_a_full_disk_costs_the_last_chunk(tmp_path, suffix, width, size, limit, kept):
    """No file may grow beyond `limit` bytes."""
    file, output = write(tmp_path / "in.txt", map(str, range(2000))), tmp_path / f"out{suffix}"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            run(Fake(width), file, output, batch_size=size)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.__notes__ == [f"{kept:,} rows are kept: the same command goes on from there."]
    assert names(tmp_path) == {"in.txt", f"out{suffix}.part", f"out{suffix}.part.json"}
    assert run(Fake(width), file, output, batch_size=size).kept == kept
    assert read(output).tobytes() == Fake(width).encode(map(str, range(2000))).tobytes()


def test_two_runs_do_not_write_one_output(file, tmp_path):
    with Part(tmp_path / "out.npy", {}, 4, force=False, anew=False) as held:
        with pytest.raises(ValueError, match="Another process is writing"):
            run(Fake(), file, tmp_path / "out.npy", force=True)
        held.append(np.zeros((1, 4)), Done(rows=1))
    assert held.path.exists()


def test_a_vector_that_is_not_finite_is_no_vector(file, tmp_path):
    encoder = Fake()
    encoder.combine = lambda features: np.where(features.whole[:, 1:2] == 9, np.nan, features.whole)  # type: ignore[method-assign]
    write(file, [*TEXTS[:5], "nine chars"[:9], *TEXTS[6:]])
    with pytest.raises(ValueError, match=r"The vector of row 5 is not finite. Try --dtype float32") as error:
        run(encoder, file, tmp_path / "out.npy")
    assert error.value.__notes__ == ["4 rows are kept: the same command goes on from there."]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_without_a_text_has_no_rows(tmp_path, suffix):
    output = tmp_path / f"out{suffix}"
    assert run(Fake(), write(tmp_path / "in.txt", []), output).rows == 0
    assert len(read(output)) == 0
    if suffix == ".npy":
        assert np.load(output).shape == (0, 4)


@pytest.mark.parametrize(
    ("name", "raw", "column", "message"),
    [
        ("a.txt", b"fine\ncaf\xe9\n", None, "a.txt is not UTF-8: line 2 holds byte 0xe9. Convert it."),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', None, "a.jsonl is not UTF-8: line 2 holds byte 0xff"),
        ("a.txt", b"fine\n", "text", "has a text a line, so it has no column 'text'"),
        ("a.jsonl", b'{"text": "a"}\n{\n', None, "is not JSON lines: line 2 holds none"),
        ("a.jsonl", b'"a"\n', None, "line 1 is not an object"),
        ("a.jsonl", b'{"a": 1, "b": 2}\n', None, "has no column 'text'. Name one with --column: a, b."),
        ("a.jsonl", b'{"text": null}\n', None, "Column 'text' holds null, not a text, in line 1 of"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', None, "half a character (a lone surrogate) in line 1"),
        ("a.csv", b"text\na\n", None, "is no file with a text a line. Make it .jsonl or .parquet"),
        ("a.parquet", b"no such thing", None, "a.parquet is not Parquet"),
        (None, b"", None, "There is no text file"),
    ],
)
def test_bad_input_is_refused_before_the_work_begins(tmp_path, name, raw, column, message):
    source = tmp_path / (name or "missing.txt")
    if name:
        source.write_bytes(raw)
    encoder = Fake()
    with pytest.raises(ValueError) as error:
        run(encoder, source, tmp_path / "out.npy", column=column)
    assert message in str(error.value)
    assert encoder.seen == []
    assert names(tmp_path) == ({name} if name else set())


def test_a_column_of_parquet_that_is_none(tmp_path):
    path = str(tmp_path / "a.parquet")
    parquet.write_table(pa.table({"a": ["x", None], "b": [1, 2]}), path)
    with pytest.raises(ValueError, match=r"has no column 'text'. Name one with --column: a, b\."):
        list(texts_of(path))
    with pytest.raises(ValueError, match="Column 'a' holds null, not a text, in row 1 of"):
        list(texts_of(path, "a"))
    with pytest.raises(ValueError, match="Column 'b' holds a int, not a text, in row 0 of"):
        list(texts_of(path, "b"))


def test_bad_requests_are_refused_in_a_sentence(shipped, file, tmp_path):
    with pytest.raises(ValueError, match=r"out.csv does not end in one of .npy, .parquet, .jsonl. Give such a name"):
        run(Fake(), file, tmp_path / "out.csv")
    with pytest.raises(ValueError, match="batch_size=0 is impossible"):
        run(shipped, file, tmp_path / "out.npy", batch_size=0)
    with pytest.raises(ValueError, match="processes=0 is impossible"):
        run(shipped, file, tmp_path / "out.npy", processes=0)
    (tmp_path / "out.npy").write_text("dear")
    with pytest.raises(ValueError, match=r"out.npy is already there. Give --force"):
        run(Fake(), file, tmp_path / "out.npy")
    assert (tmp_path / "out.npy").read_text() == "dear"
    assert run(Fake(), file, tmp_path / "out.npy", force=True).rows == 10
    assert names(tmp_path) == {"texts.txt", "out.npy"}


def test_a_missing_pyarrow_is_said_at_once(file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"Parquet needs pyarrow\. Install it: pip install pyarrow"):
        run(encoder := Fake(), file, tmp_path / "out.parquet")
    assert encoder.seen == []


def test_what_an_encoder_has_against_an_empty_text_it_says_first(file, tmp_path):
    encoder = Fake(stop=0, error=ValueError)
    with pytest.raises(ValueError, match="stopped"):
        run(encoder, file, tmp_path / "out.npy")
    assert names(tmp_path) == {"texts.txt"}


def test_processes_are_started_once_for_the_whole_stream(shipped, file, tmp_path, monkeypatch):
    started = []

    class Counted:
        def __init__(self, model: Any, extract: Any, routers: Any, processes: int):
            started.append(processes)
            self.extract = partial(extract, model)

        def __call__(self, batches: Any) -> Any:
            return map(self.extract, batches)

        def __enter__(self) -> Counted:
            return self

        def __exit__(self, *error: Any) -> None:
            started.append("ended")

    monkeypatch.setattr(encoder_module, "Workers", Counted)
    run(shipped, file, tmp_path / "out.npy", batch_size=1, processes=2)  # three chunks
    assert started == [2, "ended"]
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), shipped.encode(TEXTS), atol=1e-4)
    mean = shipped.variant(pooling="mean").encode(TEXTS)
    with shipped.working(3):
        with shipped.working(2):
            shipped.encode(TEXTS, 1, processes=4)
        shipped.encode(TEXTS, 1, processes=2)
        np.testing.assert_allclose(shipped.variant(pooling="mean").encode(TEXTS), mean, atol=1e-4)
    assert started == [2, "ended", 3, "ended"]


def test_features_tell_which_texts_were_cut(shipped):
    texts = ["a", "Call me Ishmael.", "b"]
    tokens = len(shipped.read(texts)[1])
    exact, short = shipped.variant(max_length=tokens), shipped.variant(max_length=tokens - 1)
    assert exact.features(texts, progress=False).cut.tolist() == [False, False, False]
    assert short.features(texts, progress=False).cut.tolist() == [False, True, False]
    assert shipped.features([], progress=False).cut.tolist() == []


def test_a_router_of_ones_own_has_the_same_name_in_the_next_run(shipped):
    def chosen(logits: Any, valid: Any = None, **_: Any) -> usmoe.Routing:
        return usmoe.route(logits, usmoe.TokenChoice(k=2), valid)

    encoder = usmoe.Encoder(shipped.model, shipped.tokenizer, router=chosen)
    assert encoder.about()["router"] == f"{__name__}:{chosen.__qualname__}"  # and no address in memory


@pytest.fixture
def usmoe_embed(monkeypatch, capsys, quiet_transformers):
    """usmoe_embed("in.txt", "-o", "out.npy") -> (exit status, stdout, stderr), of the shipped model."""

    def run(*words: Any, model: str = "shipped") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["usmoe", "embed", model, *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return run


def test_the_command_says_what_it_wrote(usmoe_embed, file, tmp_path):
    output = tmp_path / "out.npy"
    words = (file, "-o", output, "--embedding", "moee", "--moee", "sum", "--w", "0.5", "--router", "usmoe(k=2.5)")
    words = (*words, "--layers", "0,-1", "--max-length", "3", "--prompt", "quoted", "--pooling", "mean")
    status, out, err = usmoe_embed(*words)
    assert status == 0, err
    assert f"{output}: 10 vectors of {256 + 2 * 16} numbers." in out
    assert "2 of 10 texts are empty" in err
    assert "texts are longer than 3 tokens; their ends were cut off" in err
    encoder = usmoe.Encoder(
        router=usmoe.USMoE(k=2.5), embedding="moee", prompt="quoted", pooling="mean", moee="sum", w=0.5, layers=[0, -1],
        max_length=3,
    )  # fmt: skip
    np.testing.assert_allclose(np.load(output), encoder.encode(TEXTS), atol=1e-4)
    status, out, err = usmoe_embed(*words)
    assert (status, out) == (1, "")
    assert "already there" in err
    status, out, err = usmoe_embed(*words, "--force", "--json")
    said = json.loads(out)
    assert (said["rows"], said["dimension"], said["empty"], said["kept"]) == (10, 288, 2, 0)
    assert said["output"] == str(output)
    assert said["rows_per_second"] == pytest.approx(10 / said["seconds"])
    assert said["settings"]["prompt"] == "quoted"
    assert said["cut"] > 0


def test_the_command_reads_a_saved_encoder(usmoe_embed, shipped, file, tmp_path):
    encoder = shipped.variant(embedding="router", prompt="quoted", standardize="novels")
    encoder.save(tmp_path / "saved")
    status, _, err = usmoe_embed(file, "-o", tmp_path / "out.npy", model=str(tmp_path / "saved"))
    assert status == 0, err
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), encoder.encode(TEXTS), atol=1e-4)
    words = (file, "-o", tmp_path / "new.npy", "--prompt", "none", "--max-length", "9")
    status, out, err = usmoe_embed(*words, model=str(tmp_path / "saved"))
    assert (status, out) == (1, "")
    assert "is a saved encoder, whose settings are its own. Leave out --prompt, --max-length." in err
    status, out, err = usmoe_embed(*words[:3], "--router", "usmoe(k=2)", "--json", model=str(tmp_path / "saved"))
    assert status == 0, err
    assert json.loads(out)["settings"]["router"] == "usmoe(k=2)"


def test_the_command_warns_where_batch_mates_matter(usmoe_embed, file, tmp_path):
    status, _, err = usmoe_embed(file, "-o", tmp_path / "a.npy", "--router", "usmoe(k=2, pool=batch)")
    assert status == 0, err
    assert "a vector depends on the other texts of its batch" in err


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [(KeyboardInterrupt(), 130, "stopped;"), (OSError("No space left"), 1, "No space left")],
)
def test_whatever_stops_it_the_command_says_what_is_kept(usmoe_embed, file, tmp_path, monkeypatch, error, status, said):
    real, calls = usmoe.Encoder.features, []

    def features(self: Any, texts: Any, *args: Any, **options: Any) -> Any:
        calls.append(len(texts))
        if calls[-1] and calls.count(4) == 2:
            raise error
        return real(self, texts, *args, **options)

    monkeypatch.setattr(usmoe.Encoder, "features", features)
    code, out, err = usmoe_embed(file, "-o", tmp_path / "out.npy", "--batch-size", "2")
    assert (code, out) == (status, "")
    assert err.splitlines()[-1] == f"usmoe: {said} 4 rows are kept: the same command goes on from there."


def test_ctrl_c_before_there_is_anything_to_keep(usmoe_embed, file, tmp_path, monkeypatch):
    def stopped(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(usmoe.Encoder, "__init__", stopped)
    status, out, err = usmoe_embed(file, "-o", tmp_path / "out.npy")
    assert (status, out, err) == (130, "", "usmoe: stopped; nothing was half-written.\n")


def test_no_model_is_loaded_for_a_wrong_name(usmoe_embed, file, tmp_path, monkeypatch):
    monkeypatch.setattr(usmoe.Encoder, "__init__", lambda *args, **options: pytest.fail("loaded"))
    for source, output in ((file, "out.csv"), (tmp_path / "none.txt", "out.npy"), (file, "no/out.npy")):
        assert usmoe_embed(source, "-o", tmp_path / output)[0] == 1


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("{file}",), 2, "Missing option '--output'"),
        (("{file}", "-o", "{folder}/out.csv"), 1, "does not end in one of .npy, .parquet, .jsonl"),
        (("{folder}/none.txt", "-o", "{folder}/out.npy"), 1, "There is no text file"),
        (("{file}", "-o", "{folder}/no/out.npy"), 1, "There is no folder"),
        (("{file}", "-o", "{folder}/out.npy", "--embedding", "router", "--layers", "9"), 1, "There is no MoE layer 9"),
        (("{file}", "-o", "{folder}/out.npy", "--pooling", "max"), 1, "pooling='max' is unknown. Choose one of: last"),
    ],
)
def test_bad_words_are_one_line(usmoe_embed, file, tmp_path, words, status, message):
    code, out, err = usmoe_embed(*(word.format(file=file, folder=tmp_path) for word in words))
    assert (code, out) == (status, "")
    assert message in err.strip().splitlines()[-1]
    assert names(tmp_path) == {"texts.txt"}
