"""Labelled texts where they are: a set of the paper's on the hub or in a local copy, a file, or a folder of files."""

from __future__ import annotations

import contextlib
import difflib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usmoe.data import local
from usmoe.data.hub import not_to_be_had

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, kw_only=True)
class OnHub:
    """Where a labelled set is to be had."""

    names: tuple[str, ...]
    """On the hub, with a configuration behind a colon; the first is downloaded, a manifest.json may say any."""
    size: str
    """What is downloaded, about."""


NAMED: Mapping[str, OnHub] = {
    "sst2": OnHub(names=("stanfordnlp/sst2", "nyu-mll/glue:sst2"), size="5 MB"),
    "sst5": OnHub(names=("SetFit/sst5",), size="3 MB"),
    "imdb": OnHub(names=("stanfordnlp/imdb",), size="84 MB"),
    "banking77": OnHub(names=("mteb/banking77", "PolyAI/banking77"), size="1 MB"),
}
"""The sets of the paper's Table 13."""

TEXT_COLUMNS = ("text", "sentence", "content", "review", "utterance", "body", "message")
"""Names of the column of text, the first that is there."""

LABEL_COLUMNS = ("label", "labels", "label_text", "category", "class", "target", "sentiment", "intent", "topic")
"""Names of the column of labels, the first that is there."""

_NAME_COLUMNS = ("label_text", "label_name")
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"}
_SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledRows:
    """The rows of a split."""

    texts: tuple[str, ...]
    keys: tuple[str | None, ...]
    """The label of each as text, so that 1 and "1" are one; None where there is none."""
    names: Mapping[str, str]
    """What a label is called, where the data say it."""
    place: str
    """As errors and results call it: train.csv, or stanfordnlp/sst2 (train)."""

    @property
    def labelled(self) -> bool:
        """Whether any row has a label; a split of which all are -1 is the hub's way to withhold them."""
        return any(key is not None for key in self.keys) and set(self.keys) != {"-1"}


def labelled_rows(
    source: str,
    data: Path | None = None,
    *,
    offline: bool = False,
    text_column: str | None = None,
    label_column: str | None = None,
) -> dict[str, LabelledRows]:
    """{"train": ..., "validation": ..., "test": ...} of a source, as many as it has; one file without the name of a
    split is "train".

    source   sst2 | sst5 | imdb | banking77; the name of a folder in `data`; or a .csv, .tsv, .parquet, .json or .jsonl
             file, or a folder of such files called by their splits
    data     a folder in place of the hub: a set's, or one of several (usmoe.data.local)
    columns  where text and label stand; None: the first of TEXT_COLUMNS and LABEL_COLUMNS that is there

    A validation or test split with no column of labels has rows without labels, as one that withholds them.

    Raises ValueError for what is not there or cannot be read, columns that are not there, texts that are no text, and
    labels that are no classes.
    """
    found: dict[str, LabelledRows] = {}
    for split, (place, rows) in _found(source, data, offline).items():
        part = _SPLITS.get(split.lower())
        if part is None:  # IMDB's third split, of unlabelled reviews
            continue
        if part in found:
            raise ValueError(f"{source} has two splits for {part}, {place} among them. Keep one.")
        texts = _texts(rows, _column(rows, text_column, TEXT_COLUMNS, "text", place), place)
        if part != "train" and not _has_labels(rows, label_column):
            found[part] = LabelledRows(texts=texts, keys=(None,) * len(texts), names={}, place=place)
            continue
        label = _column(rows, label_column, LABEL_COLUMNS, "label", place)
        keys = _keys(rows, label, place)
        found[part] = LabelledRows(texts=texts, keys=keys, names=_names(rows, label, keys), place=place)
    return found


def _found(source: str, data: Path | None, offline: bool) -> dict[str, tuple[str, Dataset]]:
    """{split: (what to call it, its rows)}."""
    if source in NAMED and data is None:
        return _from_hub(source, offline)
    if data is not None:
        if source in NAMED or (data.is_dir() and not (data / source).exists() and not Path(source).exists()):
            return _in_folder(_local(data, source))
        if (data / source).exists():
            return _at(data / source)
    if Path(source).exists():
        return _at(Path(source))
    near = difflib.get_close_matches(source, NAMED, 1)
    raise ValueError(
        f"There is no file, folder or data set {source!r}.{f' Did you mean {near[0]}?' if near else ''} Give "
        f"{', '.join(NAMED)}, or the path of a .csv, .parquet or .jsonl file with a text and a label a row."
    )


def _at(path: Path) -> dict[str, tuple[str, Dataset]]:
    if path.is_dir():
        return _in_folder(local.at(path))
    if path.suffix.lower() not in local.ENDINGS:
        raise ValueError(f"{path} is no file of rows. Give one of {', '.join(local.ENDINGS)}.")
    from usmoe.data.rows import read

    return {"train": (path.name, read(path))}


def _local(data: Path, source: str) -> local.LocalData:
    names = NAMED[source].names if source in NAMED else (source,)
    for name in names[:-1]:
        with contextlib.suppress(ValueError):
            return local.find(data, name)
    return local.find(data, names[-1])


def _in_folder(there: local.LocalData) -> dict[str, tuple[str, Dataset]]:
    from usmoe.data.rows import read

    files = {split: path for split, path in there.files.items() if split.lower() in _SPLITS}
    if not files and len(there.files) == 1:  # one file, whatever it is called
        files = {"train": next(iter(there.files.values()))}
    if not files:
        raise ValueError(f"{there.folder} has no file called train. {there.there}")
    return {split: (path.name, read(path)) for split, path in files.items()}


def _from_hub(source: str, offline: bool) -> dict[str, tuple[str, Dataset]]:
    """Every split of a named set, downloaded at first. Raises ValueError where it is not to be had."""
    import datasets

    name, _, configuration = NAMED[source].names[0].partition(":")
    try:
        with _from_cache(offline):
            if not offline:
                print(f"{source}: {name} from the hub, about {NAMED[source].size} at first.", file=sys.stderr)  # noqa: T201
            whole: Any = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # a network, a hub and a format of files have too many kinds of failure to name
        raise not_to_be_had(source, name, error) from error
    return {split: (f"{name} ({split})", rows) for split, rows in whole.items()}


@contextlib.contextmanager
def _from_cache(offline: bool) -> Iterator[None]:
    """With `offline`, datasets and the hub's client take what they have; they read this from the environment when they
    are imported, which may be long past."""
    from datasets import config
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    try:
        if offline:
            config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _column(rows: Dataset, given: str | None, usual: Sequence[str], what: str, place: str) -> str:
    there = ", ".join(rows.column_names)
    if given is not None:
        if given not in rows.column_names:
            raise ValueError(f"{place} has no column {given!r}: it has {there}. Give --{what}-column one of these.")
        return given
    by_name = {name.strip().casefold(): name for name in reversed(rows.column_names)}
    for name in usual:
        if name in by_name:
            return by_name[name]
    raise ValueError(f"Which column of {place} is the {what}? It has {there}. Say it: --{what}-column NAME.")


def _has_labels(rows: Dataset, given: str | None) -> bool:
    there = {name.strip().casefold() for name in rows.column_names}
    return given in rows.column_names or not there.isdisjoint(LABEL_COLUMNS)


def _texts(rows: Dataset, column: str, place: str) -> tuple[str, ...]:
    texts = list(rows[column])
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            what = "no text" if text is None else f"{type(text).__name__} {str(text)[:40]!r}, which is no text"
            raise ValueError(
                f"Row {number:,} of {place} has {what} in {column!r}. Correct it, or choose another --text-column."
            )
    if not any(text.strip() for text in texts):
        raise ValueError(f"{place} has no text in {column!r} in any row. Choose another --text-column.")
    return tuple(texts)


def _keys(rows: Dataset, column: str, place: str) -> tuple[str | None, ...]:
    from datasets import ClassLabel

    classes = isinstance(rows.features[column], ClassLabel)
    return tuple(_key(value, classes, number, column, place) for number, value in enumerate(rows[column], 1))


def _key(value: Any, classes: bool, number: int, column: str, place: str) -> str | None:
    if isinstance(value, str):
        return value.strip() or None
    if value is None or (isinstance(value, float) and math.isnan(value)) or (classes and value == -1):
        return None
    if isinstance(value, bool | int):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    raise ValueError(
        f"Row {number:,} of {place} has {str(value)[:40]!r} in {column!r}, which is no class. Give one whole number or "
        "one text a row, or choose another --label-column."
    )


def _names(rows: Dataset, column: str, keys: Sequence[str | None]) -> dict[str, str]:
    """{label: what it is called}, by the column's own type or by a column beside it that agrees with it."""
    from datasets import ClassLabel

    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return {str(number): name for number, name in enumerate(feature.names)}
    for beside in _NAME_COLUMNS:
        if beside in rows.column_names and beside != column:
            pairs = {(key, str(name)) for key, name in zip(keys, rows[beside], strict=True) if key is not None}
            names = dict(pairs)  # pyright: ignore[reportArgumentType]
            if None not in list(rows[beside]) and len(names) == len(pairs) == len(set(names.values())):
                return names
    return {}
