"""Data from a folder in place of the hub: which set is meant, and which file is which split.

`--data DIR` is one data set, or a folder of them, in the hub's columns. Nothing here knows who reads the files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

ENDINGS = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
"""The files that are read as data."""

_NO_DATA = {"manifest.json", "dataset_infos.json", "dataset_info.json", "state.json"}
_KINDS = ("sts", "clustering", "pairclassification", "classification", "retrieval", "reranking", "summarization")
_SHARD = re.compile(r"-\d{5}-of-(\d{5})$")


@dataclass(frozen=True, kw_only=True)
class LocalData:
    """One data set in a folder."""

    folder: Path
    """Where it is."""
    manifest: Mapping[str, Any]
    """What its manifest.json says; empty where there is none."""
    files: Mapping[str, Path]
    """The file of each split; of a sub-folder, "corpus/test" for corpus/test.parquet."""

    @cached_property
    def revision(self) -> str:
        """ "local-" and 12 hexadecimal digits of a sha256 over the splits, their contents, and what the manifest says
        of the task: results on other data never bear the same one."""
        digest = hashlib.sha256(json.dumps(self.manifest.get("mteb"), sort_keys=True).encode())
        for split, path in sorted(self.files.items()):
            with path.open("rb") as file:
                digest.update(f"\0{split}\0{path.suffix}\0".encode() + hashlib.file_digest(file, "sha256").digest())
        return f"local-{digest.hexdigest()[:12]}"

    def file(self, split: str) -> Path:
        """The file of a split. Raises ValueError, with the splits that are there."""
        if split not in self.files:
            raise ValueError(f"{self.folder} has no file for {split!r}. {self.there}")
        return self.files[split]

    @property
    def there(self) -> str:
        """A sentence on the splits that there are."""
        known = ", ".join(f"{split} ({path.relative_to(self.folder)})" for split, path in self.files.items())
        kinds = ", ".join(f"<split>{ending}" for ending in ENDINGS)
        return f"It has {known}." if known else f"It has no file of data: {kinds}."


def find(data: Path, hub: str) -> LocalData:
    """The data set that stands in for one of the hub.

    data  a data set's folder, or a folder of such folders
    hub   as on the hub: mteb/emotion, or nyu-mll/glue:sst2 with a configuration

    A folder stands for the names in the "hub" of its manifest.json: the field may hold several, and prose around them.
    Where no folder has the name, one stands for the set that is called as it is: stsbenchmark-sts or stsbenchmark for
    mteb/stsbenchmark-sts. A name with a configuration is looked for as a whole first, then without it.

    A split is what the manifest calls a file, else the file's name: test.parquet, test-00000-of-00001.parquet,
    data/test.jsonl. A file clustering_test.parquet is the split "test" of a set whose name ends in -clustering, which
    then has no other files.

    Raises ValueError where no folder, or more than one, stands for the set, with the list of what is there.
    """
    folders = sets(data)
    for wanted, stands_for in product(dict.fromkeys((hub, hub.partition(":")[0])), (says, _is_called)):
        matches = [folder for folder in folders if stands_for(folder, wanted)]
        if len(matches) > 1:
            raise ValueError(
                f"{' and '.join(map(str, matches))} both stand for {hub}. Give the one that is meant, or correct the "
                "'hub' of a manifest.json."
            )
        if matches:
            return at(matches[0], hub)
    known = ", ".join(folder.name for folder in folders) or "no data set"
    raise ValueError(
        f"{data} has nothing that stands for {hub}. It has: {known}. Name the set as the 'hub' of a manifest.json "
        "beside its files, or call its folder so."
    )


def sets(data: Path) -> list[Path]:
    """The folders of data sets: `data` itself where it is one, else those in it. Stray files beside folders that have a
    manifest.json make no data set.

    Raises ValueError where there is no such folder."""
    if not data.is_dir():
        raise ValueError(f"There is no folder {data}. Give a data set's folder, or a folder of them.")
    inside = [folder for folder in sorted(data.iterdir()) if folder.is_dir() and _is_set(folder)]
    if _is_set(data) and (manifest(data) or not any(manifest(folder) for folder in inside)):
        return [data]
    return inside


def at(folder: Path, hub: str = "") -> LocalData:
    """The data set in a folder; the hub's name chooses among files of several sets in one folder."""
    said = manifest(folder)
    entries = said.get("files", ())
    entries = [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list) else []
    listed = {str(entry.get("file")): str(entry.get("split")) for entry in entries if entry.get("split")}
    prefix = hub.partition(":")[0].rpartition("-")[2] + "_"
    paths = _data_files(folder)
    own = {path: path.stem.removeprefix(prefix) for path in paths if path.stem.startswith(prefix)}
    files: dict[str, Path] = {}
    for path in own or paths:
        relative = path.relative_to(folder)
        split = own.get(path) or listed.get(relative.as_posix()) or _split(relative)
        if split in files:
            raise ValueError(
                f"{folder} has two files of the split {split!r}: {files[split].relative_to(folder)} and {relative}. "
                "Keep one, or join the shards to one file."
            )
        files[split] = path
    return LocalData(folder=folder, manifest=said, files=files)


def manifest(folder: Path) -> Mapping[str, Any]:
    """What manifest.json of a folder says; empty where there is none. Raises ValueError where it is no JSON object."""
    path = folder / "manifest.json"
    if not path.is_file():
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}. Correct it, or take it away.") from error
    return said if isinstance(said, dict) else {}  # a list is an index of the folders beside it


def _is_set(folder: Path) -> bool:
    return (
        bool(manifest(folder).keys() & {"hub", "mteb", "files"})
        or bool(_data_files(folder, deep=False))
        or _parts(folder)
    )


def _parts(folder: Path) -> bool:
    """A folder of parts as on the hub: corpus/test.parquet, queries/..., or data/test-00000-of-00001.parquet."""
    return any((folder / part).is_dir() and _data_files(folder / part, deep=False) for part in ("corpus", "data"))


def _data_files(folder: Path, *, deep: bool = True) -> list[Path]:
    paths = [*folder.glob("*"), *(folder.glob("*/*") if deep else ())]
    return sorted(p for p in paths if p.suffix.lower() in ENDINGS and p.name.lower() not in _NO_DATA and p.is_file())


def _split(relative: Path) -> str:
    """corpus/test-00000-of-00001.parquet -> corpus/test; data/test.jsonl -> test."""
    parent = "" if relative.parent.as_posix() in (".", "data") else f"{relative.parent.as_posix()}/"
    return parent + _SHARD.sub("", relative.stem)


def says(folder: Path, hub: str) -> bool:
    """Whether the "hub" of a folder's manifest.json holds the name."""
    said = manifest(folder).get("hub", "")
    names = " ".join(map(str, said)) if isinstance(said, list) else str(said)
    return hub.casefold() in re.split(r"[\s,;()=]+", names.casefold())


def _is_called(folder: Path, hub: str) -> bool:
    name = hub.partition(":")[0].rpartition("/")[2].casefold()
    stem, _, kind = name.rpartition("-")
    called = folder.resolve().name.casefold()
    return called in ({name, stem} if kind in _KINDS else {name}) and "mteb" not in manifest(folder)
