"""Texts with a class each, to learn from, to select by, and to test on: never the same rows for two of these."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from usmoe.data.labelled import LabelledRows, labelled_rows

PARTS = ("train", "validation", "test")
"""What rows are for: to learn from, to select the epoch by, to report on."""


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A labelled data set as a classifier reads it: a value, saved beside every result."""

    source: str
    """sst2 | sst5 | imdb | banking77; the name of a folder in --data DIR; or the path of a .csv, .tsv, .parquet, .json
    or .jsonl file, or of a folder of them."""
    text_column: str | None = None
    """None: text, sentence, content, ... (usmoe.data.labelled.TEXT_COLUMNS)."""
    label_column: str | None = None
    """None: label, label_text, category, ... (usmoe.data.labelled.LABEL_COLUMNS)."""
    held_out: float = 0.1
    """Share of the training texts that is set aside, by class, for selection where the data have no validation split of
    their own to spare, and again for the test where they have nothing else for it."""
    split_seed: int = 0
    """Of what is set aside or drawn; another than that of training, so that all seeds and routers see the same rows."""
    train_rows: int | None = None
    """So many training rows, drawn by class; None: all."""
    validation_rows: int | None = None
    test_rows: int | None = None

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("The data have no name. Give sst2, sst5, imdb, banking77, or the path of a file.")
        if not 0 < self.held_out < 0.5:
            raise ValueError(f"held_out={self.held_out} is no share to set aside. Give one above 0, below 0.5.")
        for part in PARTS:
            rows = self.rows(part)
            if rows is not None and rows < 1:
                raise ValueError(f"{part}_rows={rows} is impossible. Give 1 or more, or leave it out.")

    def rows(self, part: str) -> int | None:
        """How many of a part are wanted at most."""
        return {"train": self.train_rows, "validation": self.validation_rows, "test": self.test_rows}[part]


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """Texts and their classes."""

    texts: tuple[str, ...]
    labels: Int[np.ndarray, " N"]
    """Places in the list of classes."""
    rows: str
    """Which rows these are, in words."""

    def __len__(self) -> int:
        return len(self.texts)

    def only(self, chosen: Bool[np.ndarray, " N"], rows: str) -> Examples:
        """Those rows, in their order."""
        places = np.flatnonzero(chosen)
        return Examples(texts=tuple(self.texts[place] for place in places), labels=self.labels[places], rows=rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class Classification:
    """A task: three sets of examples and what their classes are called."""

    source: str
    classes: tuple[str, ...]
    """By number where all labels are numbers, else by code points."""
    train: Examples
    validation: Examples
    """To select the epoch by."""
    test: Examples
    """To report on, once."""

    @functools.cached_property
    def digest(self) -> str:
        """12 hexadecimal digits of a sha256 over all texts and labels."""
        total = hashlib.sha256("\0".join(self.classes).encode())
        for part in PARTS:
            examples: Examples = getattr(self, part)
            for text, label in zip(examples.texts, examples.labels.tolist(), strict=True):
                total.update(f"\1{part}\0{label}\0{text}".encode(errors="surrogatepass"))
        return total.hexdigest()[:12]

    @property
    def known(self) -> int:
        """Test rows whose text is also one of training: what the data's own splits have in common."""
        seen = set(self.train.texts)
        return sum(text in seen for text in self.test.texts)

    @property
    def empty(self) -> int:
        """Rows without text; they are one token, a line end."""
        return sum(not text.strip() for part in PARTS for text in getattr(self, part).texts)


def classification(asked: Labelled, data: Path | None = None, *, offline: bool = False) -> Classification:
    """The task of a data set.

    Learnt from is train; selected by is validation, reported on is test, where the data have them. Where test has no
    labels (SST-2 on the hub) or is not there, validation is the test; what is missing then is set aside from train, by
    class and seed, so that equal texts stay together.

    Raises ValueError as `labelled_rows` does, and for rows without a label, a label that training never has or calls
    otherwise, fewer than two classes, and too few rows to set some aside or to learn every class from.
    """
    splits = labelled_rows(
        asked.source, data, offline=offline, text_column=asked.text_column, label_column=asked.label_column
    )
    if "train" not in splits or not splits["train"].labelled:
        there = ", ".join(rows.place for rows in splits.values())
        raise ValueError(f"{asked.source} has no labelled rows to train on, but {there}. Give a file called train.")
    withheld = {split: rows.place for split, rows in splits.items() if split != "train" and not rows.labelled}
    keys = _keys(splits["train"])
    if asked.train_rows is not None and asked.train_rows < len(keys):
        raise ValueError(
            f"train_rows={asked.train_rows} leaves some of the {len(keys)} classes without a text to learn from. Give "
            f"{len(keys)} or more, or leave it out."
        )
    names = splits["train"].names
    classes = tuple(names.get(key, key) for key in keys)
    found = {split: _examples(rows, keys, splits["train"]) for split, rows in splits.items() if split not in withheld}
    parts = _parts(found, asked, withheld)
    for number, part in enumerate(PARTS):
        parts[part] = _at_most(parts[part], asked.rows(part), (asked.split_seed, 2 + number))
    parts["train"] = _said_of_absent(parts["train"], classes)
    return Classification(source=asked.source, classes=classes, **parts)


def _keys(train: LabelledRows) -> list[str]:
    """The labels of training, in order."""
    keys = {key for key in train.keys if key is not None}
    if len(keys) < 2:
        raise ValueError(f"All rows of {train.place} have the label {min(keys)!r}. Give rows of two classes at least.")
    numbers = all(key.removeprefix("-").isdecimal() for key in keys)
    return sorted(keys, key=(lambda key: (int(key), key)) if numbers else None)


def _examples(rows: LabelledRows, keys: Sequence[str], train: LabelledRows) -> Examples:
    for key in keys:
        name, own = rows.names.get(key), train.names.get(key)
        if name is not None and own is not None and name != own:
            raise ValueError(
                f"{rows.place} calls the label {key} {name!r}, and {train.place} {own!r}. Number the classes of both "
                "alike."
            )
    places = {key: place for place, key in enumerate(keys)}
    for number, key in enumerate(rows.keys, 1):
        if key is None:
            missing = sum(one is None for one in rows.keys)
            raise ValueError(
                f"{missing:,} of {len(rows.keys):,} rows of {rows.place} have no label, the first is row {number:,}. "
                "Label them, or take them out."
            )
        if key not in places:
            raise ValueError(
                f"Row {number:,} of {rows.place} has the label {rows.names.get(key, key)!r}, which no row of "
                f"{train.place} "
                "has. Take it out, or give rows to learn it from."
            )
    labels = np.array([places[key] for key in rows.keys if key is not None], dtype=np.int64)
    return Examples(texts=rows.texts, labels=labels, rows=f"{rows.place}, {len(labels):,} rows")


def _parts(found: Mapping[str, Examples], asked: Labelled, withheld: Mapping[str, str]) -> dict[str, Examples]:
    """What each part is made of.

    withheld  {split: what to call it} of those without labels
    """
    why = {part: f"; {place} has no labels" for part, place in withheld.items()}
    train, validation, test = (found.get(part) for part in PARTS)
    assert train is not None
    if test is None and validation is not None:
        said = validation.rows + why.get("test", "; there is no test split")
        test, validation = dataclasses.replace(validation, rows=said), None
    if test is None:
        train, test = _set_aside(train, asked, "test", 0)
        test = dataclasses.replace(test, rows=test.rows + why.get("test", ""))
    if validation is None:
        train, validation = _set_aside(train, asked, "selection", 1)
        validation = dataclasses.replace(validation, rows=validation.rows + why.get("validation", ""))
    return {"train": train, "validation": validation, "test": test}


def _set_aside(train: Examples, asked: Labelled, what: str, number: int) -> tuple[Examples, Examples]:
    """What is left, and what is set aside: a share of the distinct texts, by the class of the first of each."""
    _, first, group = np.unique(np.array(train.texts, dtype=object), return_index=True, return_inverse=True)
    chosen = _drawn(train.labels[first], asked.held_out, (asked.split_seed, number))
    if not chosen.any() or chosen.all():
        distinct = f" ({len(first):,} distinct texts)" if len(first) < len(train) else ""
        raise ValueError(
            f"{train.rows}{distinct}, are too few to set a share of {asked.held_out} aside for {what}. Give more "
            f"{'distinct texts' if distinct else 'rows'}, or a file of {'validation' if number else 'test'}."
        )
    aside = chosen[group]
    said = f"{aside.sum():,} rows set aside from {train.rows.split(',')[0]}, by class (split seed {asked.split_seed})"
    return train.only(~aside, f"{train.rows}, without {aside.sum():,} set aside for {what}"), train.only(aside, said)


def _at_most(examples: Examples, most: int | None, seed: tuple[int, int]) -> Examples:
    """So many rows, drawn by class."""
    if most is None or len(examples) <= most:
        return examples
    chosen = _drawn(examples.labels, most / len(examples), seed, leave=False)
    return examples.only(chosen, f"{chosen.sum():,} rows drawn by class from: {examples.rows}")


def _said_of_absent(train: Examples, classes: Sequence[str]) -> Examples:
    """The same rows; in words, too, of which classes they have none."""
    absent = [name for place, name in enumerate(classes) if place not in train.labels]
    if not absent:
        return train
    named = ", ".join(absent[:5]) + (", ..." if absent[5:] else "")
    return dataclasses.replace(
        train, rows=f"{train.rows}; no row of {len(absent)} of the {len(classes)} classes ({named})"
    )


def _drawn(
    labels: Int[np.ndarray, " N"], share: float, seed: tuple[int, int], *, leave: bool = True
) -> Bool[np.ndarray, " N"]:
    """True for a share of the rows: of each class as near to it as whole rows allow, of all within half a row.

    The rows are put in order of their class, within a class at random, and every 1/share-th is taken.

    leave  of no class take the last row
    """
    order = np.lexsort((np.random.default_rng(seed).permutation(len(labels)), labels))
    upto = np.floor(np.arange(1, len(labels) + 1) * share + 0.5)
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[order[np.diff(upto, prepend=0) > 0]] = True
    for label in np.unique(labels[chosen]) if leave else ():
        own = labels == label
        if chosen[own].all():
            chosen[np.flatnonzero(own)[0]] = False
    return chosen
