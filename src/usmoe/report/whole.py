"""Files are written whole or not at all, and whether they can be is known before the work that fills them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PICTURES = (".png", ".svg", ".pdf")
"""How the name of a picture may end; the end decides what is written."""

_PROBE = bytes(1 << 16)
"""What a place is tried with: more than a folder that is full to the last block has left."""

_CAUSES = {
    errno.ENOSPC: "the disk is full. Make room",
    errno.EDQUOT: "your quota is used up. Make room",
    errno.EFBIG: "the file would be larger than may be. Raise that limit",
    errno.EROFS: "the disk is read-only. Make it writable",
    errno.EACCES: "you may not write there. Change its permissions",
    errno.EPERM: "you may not write there. Change its permissions",
    errno.ENOENT: "there is no folder that takes it. Make one",
    errno.ENOTDIR: "a part of that path is a file. Move that file",
    errno.EISDIR: "it is a folder. Move it",
    errno.ENAMETOOLONG: "the name is too long. Shorten it",
    errno.EIO: "the disk answers with errors. Look after it",
}
"""Why nothing can be written, and what to do."""


@contextlib.contextmanager
def said_plainly(path: Path) -> Iterator[None]:
    """Within the with block, an OSError that says that `path` cannot be written becomes a sentence with what to do; its
    `errno` stays. Errors of other files, which are read to write this one, are left as they are."""
    try:
        yield
    except OSError as error:
        ours = error.filename is None or _related(Path(str(error.filename)), path.parent)
        if ours and (plain := _plain(error, path, "another place")):
            raise plain from error
        raise


def refuse_unwritable(path: Path, other: str = "another place") -> None:
    """Raise OSError, in a sentence, where a file (or a folder, with those that it lies in) could not be made at `path`:
    a probe is written beside it (within it, of a folder that is there; else in the nearest one above), and taken away.

    Permission bits say little of what may be written: they do not bind the superuser, and know neither read-only nor
    full disks.

    other  what else may be given: "another --output"
    """
    try:
        place = path if path.is_dir() else path.parent
        while not place.exists():
            place = place.parent  # which may be a file, and then refuses the probe
        probe = place / f".{path.name}.{os.getpid()}.probe"
        try:
            with probe.open("wb") as file:
                file.write(_PROBE)
                file.flush()
                os.fsync(file.fileno())
        finally:
            with contextlib.suppress(OSError):  # where it could not be made, there is nothing to take away
                probe.unlink()
    except OSError as error:
        if plain := _plain(error, path, other):
            raise plain from error
        raise


def why_not(error: OSError) -> str | None:
    """Why nothing can be written, and what to do, in the middle of a sentence; None where nothing is known of it."""
    return _CAUSES.get(error.errno) if error.errno and error.strerror else None


def _plain(error: OSError, path: Path, other: str) -> OSError | None:
    """The error as a sentence with what to do; None where nothing is known of its cause, or it is a sentence."""
    why = why_not(error)
    if why is None:
        return None
    plain = OSError(f"{path} cannot be written: {why}, or give {other}.")
    plain.errno = error.errno
    return plain


def _related(one: Path, folder: Path) -> bool:
    """Whether a path lies below a folder, or the other way round: what is above has to be there, too."""
    one, folder = Path(os.path.abspath(one)), Path(os.path.abspath(folder))  # noqa: PTH100 - links stay links
    return one.is_relative_to(folder) or folder.is_relative_to(one)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to: it takes its place where the with block ends well, and is gone otherwise.
    OSErrors of a place that cannot be written are one sentence."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with said_plainly(path):
            yield part
            with part.open("rb") as file:
                os.fsync(file.fileno())  # else a power cut may leave the new name with nothing in it
            part.replace(path)
    finally:
        with contextlib.suppress(OSError):  # a path through a file, say: nothing was written
            part.unlink(missing_ok=True)


def refuse_format(path: Path) -> None:
    """Raise ValueError for a picture whose name does not end in .png, .svg or .pdf."""
    if path.suffix.lower() not in PICTURES:
        raise ValueError(
            f"{path.name} does not say what kind of picture it is to be. Give a name that ends in "
            f"{', '.join(PICTURES[:-1])} or {PICTURES[-1]}."
        )


def whole_picture(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as what its name ends in: .png, .svg or .pdf. Raises ValueError for other names."""
    refuse_format(path)
    with whole(path) as part:
        figure.savefig(part, dpi=150, format=path.suffix.lower().removeprefix("."))


def whole_text(said: str, path: Path) -> None:
    """Write a text in UTF-8."""
    with whole(path) as part:
        part.write_text(said, encoding="utf-8")


def whole_json(said: Any, path: Path, *, allow_nan: bool = True) -> None:
    """Write JSON, and make the folder where there is none. Raises ValueError for NaN and infinities where they are not
    allowed."""
    with said_plainly(path):
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
    with said_plainly(folder):
        part.mkdir(parents=True)
        try:
            yield part
            part.replace(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
