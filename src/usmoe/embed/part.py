"""Work that can be gone on with: vectors in NAME.part, and in NAME.part.json what they are and how many."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from tqdm import tqdm

from usmoe.embed.writers import Writer, npy_header

_SCHEMA = 1
_BLOCK = 2**22
"""Numbers that are copied at once into a finished file: 16 MiB."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """The rows that are safe on the disk."""

    rows: int = 0
    empty: int = 0
    """Of them, texts without a visible character."""
    cut: int = 0
    """Of them, texts that were longer than the model reads."""
    digest: str = hashlib.sha256().hexdigest()
    """Of these texts: what comes in once more is the same input exactly where it begins with them."""


class Part:
    """A matrix (n, D) of float32 that grows by whole chunks, whatever interrupts the work: a context manager.

    A chunk is on the disk before it is counted, and the count is replaced whole. What was written but not counted is
    dropped when the work goes on.
    """

    def __init__(self, output: Path, settings: dict[str, Any], dimension: int, *, force: bool, anew: bool) -> None:
        """force: begin anew what cannot be gone on with; anew: in any case.

        Raises ValueError where part files are there and do not fit, or another process is writing them.
        """
        self.path = output.with_name(f"{output.name}.part")
        self._beside = output.with_name(f"{output.name}.part.json")
        self._output = output
        self._settings = json.loads(json.dumps(settings))
        self._dimension = dimension
        self.path.touch()
        self._file: BinaryIO = self.path.open("r+b")
        try:
            _lock(self._file, self.path)
            problem, self.done = self._found()
            if problem and not (force or anew):
                raise ValueError(f"{problem} Give --force to begin anew, or another --output.")
            if problem or anew or not self.done.rows:
                self.begin()
            self._file.truncate(self._place(self.done.rows))
            self._file.seek(0, os.SEEK_END)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Part:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        with contextlib.suppress(OSError):  # a full disk, once more: what is counted has been written before
            self._file.close()
        if kind is not None and not self.done.rows:
            self.path.unlink(missing_ok=True)
            self._beside.unlink(missing_ok=True)

    def _found(self) -> tuple[str | None, Done]:
        """Why the files that are there cannot be gone on with, if so; and what is done."""
        size = os.fstat(self._file.fileno()).st_size
        if size == 0:
            return None, Done()
        try:
            said = json.loads(self._beside.read_text(encoding="utf-8"))
            settings, done = said["settings"], Done(**said["done"])
        except (OSError, ValueError, KeyError, TypeError):
            return f"{self.path} is there, and {self._beside.name} does not say what it holds.", Done()
        if said.get("schema") != _SCHEMA:
            return f"{self.path} was begun by another version of usmoe.", Done()
        other = [
            f"{name}={settings.get(name)!r}, not {self._settings.get(name)!r}"
            for name in sorted({*settings, *self._settings})
            if settings.get(name) != self._settings.get(name)
        ]
        if other:
            return f"{self.path} was begun with {'; '.join(other)}.", Done()
        if size < self._place(done.rows):
            return f"{self.path} holds fewer than the {done.rows:,} rows that {self._beside.name} counts.", Done()
        return None, done

    def _place(self, row: int) -> int:
        """Where a row begins, in bytes."""
        return len(npy_header(0, self._dimension)) + 4 * self._dimension * row

    def begin(self) -> None:
        """Drop what there is."""
        self._count(Done())
        self._file.truncate(0)
        self._file.seek(0)
        self._file.write(npy_header(0, self._dimension))

    def append(self, vectors: np.ndarray, done: Done) -> None:
        """Add vectors (m, D); `done` is what is done then."""
        self._file.write(vectors.astype("<f4").tobytes())
        _sync(self._file)
        self._count(done)

    def _count(self, done: Done) -> None:
        new = self._beside.with_name(f"{self._beside.name}.new")
        with new.open("w", encoding="utf-8") as file:
            json.dump({"schema": _SCHEMA, "settings": self._settings, "done": asdict(done)}, file, indent=1)
            _sync(file)
        new.replace(self._beside)
        self.done = done

    def finish(self, write: Writer | None, progress: bool = False) -> None:
        """Make the output of it, whole or not at all, and remove the part files; None: it is the output as it is."""
        if write is None:
            self._file.seek(0)
            self._file.write(npy_header(self.done.rows, self._dimension))
            _sync(self._file)
            self._file.close()
            self.path.replace(self._output)
        else:
            whole = self.path.with_name(f"{self.path.name}.whole")
            try:
                write(whole, self._blocks(progress), self._dimension)
                with whole.open("r+b") as file:
                    _sync(file)
                whole.replace(self._output)
            finally:
                whole.unlink(missing_ok=True)
            self._file.close()
            self.path.unlink()
        self._beside.unlink()

    def _blocks(self, progress: bool) -> Iterator[np.ndarray]:
        """The rows (n, D), a block of them after the other."""
        rows = max(1, _BLOCK // self._dimension)
        self._file.seek(self._place(0))
        disable = None if progress else True
        with tqdm(total=self.done.rows, desc="writing", unit="row", disable=disable, leave=False) as bar:
            for first in range(0, self.done.rows, rows):
                count = min(rows, self.done.rows - first)
                yield np.frombuffer(self._file.read(4 * self._dimension * count), "<f4").reshape(count, -1)
                bar.update(count)


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _lock(file: BinaryIO, path: Path) -> None:
    """Raises ValueError where another process is at work on the same output, as far as the system can tell."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"Another process is writing {path}. Wait for it, or give another --output.") from error
    except (ModuleNotFoundError, OSError):  # not on Windows, nor on every file system
        return
