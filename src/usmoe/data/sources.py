"""Where the text of a corpus is: the files of its splits in a folder, one file, or what is published."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from usmoe.data.corpus import NAMED, SPLITS, Corpus
from usmoe.data.hub import PUBLISHED, hub_parts
from usmoe.data.local import ENDINGS, manifest, says
from usmoe.data.opened import COMPRESSED, plain_suffix
from usmoe.data.text import FilePart, Part, Text, cut

_NAMES = {
    "train": "train",
    "training": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_KINDS = (".raw", ".tokens", ".txt", ".text", "", *ENDINGS)
"""Endings of files of text, before that of a compression. Where a split has several, the first of these is read: enwik8
as its usual script leaves it has the bytes in train.txt.raw, and in train.txt their numbers."""
_SHARD = re.compile(r"-(\d{5})-of-\d{5}$")
_HELD_OUT = 50
"""Files of lm1b's held-out sentences. The first is the customary test set, the second our validation set."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Text that was found, not yet read."""

    name: str
    """Readable, without a path."""
    splits: Mapping[str, tuple[Part, ...]]
    """What each split is made of; {"whole": ...} for text without splits of its own."""
    identity: Mapping[str, Any]
    """Names, sizes and sha256 of the files, or the place on the hub: what makes it this text and no other."""
    sentence: str
    """What it is, for a result."""
    hub: bool = False
    """Whether reading downloads."""

    @property
    def all_splits(self) -> tuple[str, ...]:
        """The splits that `texts` has."""
        if "whole" in self.splits or (self.name == "lm1b" and set(self.splits) == {"train", "test"}):
            return SPLITS
        return tuple(split for split in SPLITS if split in self.splits)

    def texts(self, corpus: Corpus, wanted: Sequence[str]) -> dict[str, Text]:
        """The text of each split. One text is cut as `corpus.split` says.

        Of lm1b without a validation split (the hub has none), the first fiftieth of the held-out sentences is the test
        split, as is the custom, and the second fiftieth the validation split; Transformer-XL takes the first for both.

        Raises ValueError where a split is missing.
        """
        splits = {split: Text(parts=parts) for split, parts in self.splits.items()}
        if "whole" in splits:
            shares = (1 - sum(corpus.split), corpus.split[0])
            return _chosen(dict(zip(SPLITS, cut(splits["whole"], shares, corpus.reads), strict=True)), wanted)
        if "validation" in set(self.all_splits) - set(splits):
            test, validation, _ = cut(splits["test"], (1 / _HELD_OUT, 1 / _HELD_OUT), "word")  # whole lines
            splits |= {"test": test, "validation": validation}
        self.refuse_missing(wanted)
        return _chosen(splits, wanted)

    def refuse_missing(self, wanted: Sequence[str]) -> None:
        """Raise ValueError where it lacks one of the splits."""
        missing = [split for split in wanted if split not in self.all_splits]
        if missing:
            raise ValueError(
                f"{self.name} has no text for {' and '.join(missing)}: it has {', '.join(self.all_splits)}. Add a file "
                f"{missing[0]}.txt beside the others."
            )


def find_source(corpus: Corpus, data: Path | None = None) -> Source:
    """Where the text of a corpus is.

    data  a folder in place of the hub: a set's, or one that holds several, matched by the "hub" of a manifest.json,
          then by the folder's name; or the file of a named corpus

    A named corpus is looked for in `data`, or taken from where it is published if that is None. Any other source is a
    folder or a file in `data`, or a path.

    Raises ValueError where there is nothing, with the nearest names; for two files of one split; for an empty folder.
    """
    if corpus.name and data is None:
        return _published(corpus)
    if corpus.name and data is not None:
        return _local(_named(corpus, data), corpus)
    for place in ([] if data is None else [data / corpus.source]) + [Path(corpus.source)]:
        if place.exists():
            return _local(place, corpus)
    known = list(dict.fromkeys([*NAMED, *(sorted(_folders(data)) if data is not None else ())]))
    near = difflib.get_close_matches(corpus.source, known, 2) or known
    raise ValueError(
        f"There is no file, folder or corpus {corpus.source!r}. Did you mean {' or '.join(near)}? Give one of these or "
        "the path of a text."
    )


def _published(corpus: Corpus) -> Source:
    if corpus.source != corpus.name:
        raise ValueError(
            f"{corpus.source} is a folder in a copy of {corpus.name}, and no copy is given. Give the folder that holds "
            "it (--data DIR)."
        )
    there = PUBLISHED[corpus.name]
    return Source(
        name=corpus.name,
        splits=hub_parts(corpus.name),
        identity={"place": there.names[0], "revision": there.revision},
        sentence=f"{corpus.name}, from {there.names[0]}",
        hub=True,
    )


def _named(corpus: Corpus, data: Path) -> Path:
    """The folder or file in `data` that is a named corpus, or the folder in it that is asked for."""
    if data.is_file():
        return data
    if not data.is_dir():
        raise ValueError(f"There is no folder {data}. Give a corpus's folder, or a folder of them.")
    there, inside = PUBLISHED[corpus.name], corpus.source.partition("/")[2]
    called = {corpus.name, *there.also}
    inner = sorted(folder for folder in data.iterdir() if folder.is_dir())
    tests = [lambda folder, name=name: says(folder, name) for name in there.names]
    for stands_for in [*tests, lambda folder: folder.resolve().name.casefold() in called]:
        found = [data] if stands_for(data) else [folder for folder in inner if stands_for(folder)]
        if len(found) > 1:
            raise ValueError(
                f"{' and '.join(map(str, found))} both stand for {corpus.name}. Give the one that is meant."
            )
        if found:
            return _within(found[0], corpus.name, inside)
    raise ValueError(
        f"{data} has nothing that stands for {corpus.name}. It has: {', '.join(f.name for f in inner) or 'no folder'}. "
        f"Name it as the 'hub' of a manifest.json ({there.names[0]}), or call its folder {corpus.name}."
    )


def _within(folder: Path, name: str, inside: str) -> Path:
    if inside:
        if not (folder / inside).is_dir():
            known = ", ".join(sorted(_folders(folder))) or "none"
            raise ValueError(f"{folder} has no folder {inside!r}. Its folders are: {known}. Choose one of these.")
        return folder / inside
    for place in (folder, folder / name, folder / PUBLISHED[name].configuration, folder / "data"):
        if place.is_dir() and _splits(place):
            return place
    archives = [folder / f"{name}{ending}" for ending in ("", ".zip", ".gz", ".txt")]
    return next((path for path in archives if path.is_file()), folder)


def _local(place: Path, corpus: Corpus) -> Source:
    splits = {"whole": [place]} if place.is_file() else _splits(place)
    if not splits:
        raise ValueError(
            f"{place} holds no text by the names of splits. Give a file, or a folder with train.txt, valid.txt and "
            "test.txt (or .raw, .tokens, .parquet, .jsonl, .csv; .gz, .bz2, .xz or .zip of these)."
        )
    files = [path for paths in splits.values() for path in paths]
    said = next((said for folder in (place, place.parent) if (said := manifest(folder))), {})
    name = corpus.source if corpus.name else place.resolve().name.split(".")[0]
    note = f" (its manifest: {said['cut']})" if corpus.name and "cut" in said else ""
    return Source(
        name=name,
        splits={split: tuple(FilePart(path) for path in paths) for split, paths in splits.items()},
        identity={
            "files": [{"file": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files]
        },
        sentence=f"{name}, from {', '.join(path.name for path in files[:3])}"
        + (f" and {len(files) - 3} more" if len(files) > 3 else "")
        + note,
    )


def _splits(folder: Path) -> dict[str, list[Path]]:
    """The files of each split in a folder. Raises ValueError where a split has two that are no shards of one."""
    shards = _billion_words(folder)
    if shards:
        return shards
    found: dict[str, dict[str, list[Path]]] = {}
    for path in sorted(folder.iterdir()):
        kind = plain_suffix(path)
        words = [word for word in path.name.casefold().split(".") if f".{word}" not in (kind, *COMPRESSED)]
        named = [_NAMES[word] for word in (_SHARD.sub("", word) for word in words) if word in _NAMES]
        if path.is_file() and named and kind in _KINDS:
            found.setdefault(named[-1], {}).setdefault(kind, []).append(path)
    best = {split: kinds[min(kinds, key=_KINDS.index)] for split, kinds in found.items()}
    for split, paths in best.items():
        if len(paths) > 1 and not all(_SHARD.search(path.name.split(".")[0]) for path in paths):
            raise ValueError(f"{folder} has two files of {split}: {paths[0].name} and {paths[1].name}. Keep one.")
    return {split: best[split] for split in SPLITS if split in best}


def _billion_words(folder: Path) -> dict[str, list[Path]]:
    """lm1b as it is published: 99 files to train on and 50 held out, of which the first is for the test."""
    held_out = sorted(folder.glob("heldout-monolingual.tokenized.shuffled/news.en.heldout-*-of-*"))
    train = sorted(folder.glob("training-monolingual.tokenized.shuffled/news.en-*-of-*"))
    return {"train": train, "validation": held_out[1:2], "test": held_out[:1]} if train and held_out[1:] else {}


def _folders(data: Path) -> set[str]:
    return {folder.name for folder in data.iterdir() if folder.is_dir()} if data.is_dir() else set()


def _chosen(texts: Mapping[str, Text], wanted: Sequence[str]) -> dict[str, Text]:
    return {split: texts[split] for split in wanted}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
