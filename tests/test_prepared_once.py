"""A corpus is prepared once: by one process, whole or not at all, and anew where its text changed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from small_corpora import at, folder
from usmoe.data import array
from usmoe.data import prepare as prepare_module
from usmoe.data.prepare import prepare


def test_a_corpus_is_prepared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = folder(tmp_path / "mine")
    first = prepare(at(place), tmp_path / "cache")
    monkeypatch.setattr("usmoe.data.prepare._write", None)
    assert prepare(at(place), tmp_path / "cache").digest == first.digest
    (tmp_path / "moved").mkdir()
    place.rename(tmp_path / "moved" / "mine")
    assert prepare(at(tmp_path / "moved" / "mine"), tmp_path / "cache").digest == first.digest


def test_a_changed_text_is_prepared_anew(tmp_path: Path):
    place = folder(tmp_path / "mine")
    first = prepare(at(place), tmp_path / "cache")
    stamp = (place / "test.txt").stat()
    (place / "test.txt").write_text("a cat sat\n")  # as long
    os.utime(place / "test.txt", (stamp.st_atime, stamp.st_mtime))
    again = prepare(at(place), tmp_path / "cache")
    assert again.digest != first.digest
    assert again.test.tobytes() == b"a cat sat\n"
    assert first.test.tobytes() == b"a dog sat\n"


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = folder(tmp_path / "mine")

    def full(_: np.dtype, length: int) -> bytes:
        raise OSError(28, f"No space left on device, after {length} tokens")

    with monkeypatch.context() as patched:
        patched.setattr(array, "_header", full)
        with pytest.raises(OSError, match="No space left on device, after 24 tokens"):
            prepare(at(place), tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    assert prepare(at(place), tmp_path / "cache").test.tobytes() == b"a dog sat\n"


def test_a_killed_preparation_leaves_nothing_that_is_taken_for_whole(tmp_path: Path):
    """Killed after the training split is written; the next call removes what lies there, and prepares."""
    place = folder(tmp_path / "mine")
    code = f"""
import os, signal
from pathlib import Path
from usmoe.data import prepare as module
from usmoe.data.corpus import Corpus
write = module.write_split
def killed(path, split, *rest):
    if split == "validation":
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, split, *rest)
module.write_split = killed
module.prepare(Corpus(source={str(place)!r}), Path({str(tmp_path / "cache")!r}))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    (left,) = (tmp_path / "cache").glob("*.part")
    assert (left / "train.npy").exists()
    made = prepare(at(place), tmp_path / "cache")
    assert made.train.tobytes() == b"the cat sat\nthe dog sat\n"
    assert not list((tmp_path / "cache").glob("*.part"))


def test_of_two_processes_one_prepares_and_the_other_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = folder(tmp_path / "mine")
    code = f"""
import time
from pathlib import Path
from usmoe.data import prepare as module
from usmoe.data.corpus import Corpus
write = module.write_split
def slow(*given):
    time.sleep(0.3)
    return write(*given)
module.write_split = slow
print(module.prepare(Corpus(source={str(place)!r}), Path({str(tmp_path / "cache")!r})).digest)
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    while not list((tmp_path / "cache").glob(".*.part/vocabulary.json")):
        assert other.poll() is None
        time.sleep(0.01)
    monkeypatch.setattr("usmoe.data.prepare._write", None)  # not this one
    made = prepare(at(place), tmp_path / "cache")
    assert other.communicate()[0].strip() == made.digest
    assert made.test.tobytes() == b"a dog sat\n"


def test_without_locks_processes_do_not_disturb_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """While one writes, another one has prepared the same."""
    place, write = folder(tmp_path / "mine"), prepare_module._write

    def no_lock(*_) -> None:
        raise OSError(37, "No locks available")

    def slow(part: Path, *given) -> None:
        assert part.name.endswith(f".{os.getpid()}.part")
        monkeypatch.setattr(prepare_module, "_write", write)
        monkeypatch.setattr(os, "getpid", lambda: 0)
        other = prepare(at(place), tmp_path / "cache")
        write(part, *given)
        (other.folder / "mark").touch()

    monkeypatch.setattr("fcntl.flock", no_lock)
    monkeypatch.setattr(prepare_module, "_write", slow)
    made = prepare(at(place), tmp_path / "cache")
    assert made.test.tobytes() == b"a dog sat\n"
    assert (made.folder / "mark").exists()
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_cache_that_cannot_be_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = folder(tmp_path / "mine")
    made = prepare(at(place), tmp_path / "cache")
    monkeypatch.setattr("usmoe.data.prepare._alone", None)  # which writes a lock
    assert prepare(at(place), tmp_path / "cache").digest == made.digest


def test_a_damaged_preparation_is_refused(tmp_path: Path):
    place = folder(tmp_path / "mine")
    made = prepare(at(place), tmp_path / "cache")
    whole = (made.folder / "test.npy").read_bytes()
    for damaged in (whole[:-3], whole[:50], b""):
        (made.folder / "test.npy").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is damaged: .*\. Delete it, and it is prepared anew"):
            prepare(at(place), tmp_path / "cache")
    np.save(made.folder / "test.npy", np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match=r"is damaged: test\.npy holds 3 tokens, and 10 were written"):
        prepare(at(place), tmp_path / "cache")
