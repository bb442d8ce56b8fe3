"""Files are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to: it takes its place where the with block ends well, and is gone otherwise."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())  # else a power cut may leave the new name with nothing in it
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def whole_picture(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG."""
    with whole(path) as part:
        figure.savefig(part, dpi=150, format="png")


def whole_json(said: Any, path: Path, *, allow_nan: bool = True) -> None:
    """Write JSON, and make the folder where there is none. Raises ValueError for NaN and infinities where they are not
    allowed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        part.write_text(json.dumps(said, indent=1, allow_nan=allow_nan) + "\n", encoding="utf-8")


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into: it takes its place where the with block ends well, and is gone otherwise.
    Raises ValueError where there is something at `folder`."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} is already there. Give the name of a new folder.")
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        yield part
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
