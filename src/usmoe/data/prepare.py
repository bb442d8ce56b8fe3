"""A corpus as arrays of tokens on disk, made once."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from usmoe.data import vocabulary as vocabularies
from usmoe.data.array import Tokens, reading
from usmoe.data.corpus import SPLITS, Corpus
from usmoe.data.encode import write_split
from usmoe.data.hub import announce
from usmoe.data.sources import Source, find_source
from usmoe.data.text import Text, decoded
from usmoe.data.units import UNITS, Unit
from usmoe.data.vocabulary import Vocabulary
from usmoe.report.whole import whole_json

_FORM = 1
"""Raised when the same corpus would make other arrays than before: what was prepared is then prepared anew."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """Tokens of a corpus, memory-mapped, and what is needed to state figures on them."""

    corpus: Corpus
    """What was asked for."""
    vocabulary: Vocabulary
    """What the tokens are."""
    tokens: Mapping[str, Tokens]
    """The splits: train, validation, test. With a vocabulary that was given, those that there are."""
    units: Mapping[str, int]
    """How many of `unit` each split has, the last line end included: the sum of nats over a split, divided by them and
    by ln 2, is bits a character or bits a byte; e to the sum divided by them is the perplexity a word."""
    corrupted: Mapping[str, int]
    """Words of each split that were replaced, or before which one was inserted."""
    digest: str
    """12 hexadecimal digits, other ones for another text or another way to read it."""
    source: str
    """What the text is, for a result; without paths."""
    folder: Path
    """Where it lies."""

    @property
    def unit(self) -> Unit:
        """What figures are stated by: a character at the level of bytes (as is the custom with enwik8) and characters,
        a byte of BPE, a word (line ends are words)."""
        return UNITS[self.vocabulary.level]

    @property
    def train(self) -> Tokens:
        """The training split. Raises ValueError where it is not there, as the other two do."""
        return self._split("train")

    @property
    def validation(self) -> Tokens:
        """The validation split."""
        return self._split("validation")

    @property
    def test(self) -> Tokens:
        """The test split."""
        return self._split("test")

    def _split(self, name: str) -> Tokens:
        if name not in self.tokens:
            raise ValueError(
                f"{self.corpus.source} was prepared without {name}: it has {', '.join(self.tokens)}. Add its text, or "
                "ask for one of these."
            )
        return self.tokens[name]


def prepare(
    corpus: Corpus,
    cache: Path,
    *,
    data: Path | None = None,
    offline: bool = False,
    vocabulary: Vocabulary | None = None,
    splits: Sequence[str] | None = None,
) -> Prepared:
    """The tokens of a corpus, from `cache` if they lie there, else made and put there.

    data        a folder in place of the hub (usmoe.data.sources.find_source)
    offline     refuse to download
    vocabulary  of a checkpoint, to encode this text by; None: learned from the training split, uncorrupted
    splits      those that are wanted; None: all three, with a vocabulary those that there are

    They lie in cache/<name>-<digest>/ as {vocabulary.json, train.npy, ..., manifest.json}. The digest is of the corpus,
    of the contents of its files and of the vocabulary: a file that has changed is prepared anew. (What is published is
    known by its place, and not asked for again.) The folder appears when all is written, so that a preparation that was
    killed, or ran out of disk, leaves nothing that could be taken for whole; what it leaves is removed by the next one.
    Of several processes one prepares, and the others wait.

    Raises ValueError for a text that is missing, empty, not UTF-8 (with its line) or unknown to the vocabulary, for a
    missing split, and for a vocabulary of another level than the corpus asks for; OSError where the disk is full.
    """
    corpus = _of_vocabulary(corpus, vocabulary)
    source = find_source(corpus, data)
    wanted = _wanted(source, splits, vocabulary)
    digest = _digest(corpus, source, vocabulary, wanted)
    name = re.sub(r"[^\w.]+", "-", source.name).strip("-.") or "text"
    folder = cache / f"{name}-{digest}"
    if not folder.is_dir():
        if source.hub and offline:
            raise ValueError(
                f"{corpus.source} is not prepared in {cache}, and offline there is no download. Give a folder that "
                "holds it (--data DIR), or prepare it once with a connection."
            )
        with _alone(folder) as part:
            if not folder.is_dir():  # another process may have made it meanwhile
                if source.hub:
                    announce(corpus.name)
                _write(part, corpus, source, vocabulary, wanted)
                _place(part, folder)
    return _read(folder, corpus, digest)


def prepared_before(corpus: Corpus, cache: Path, digest: str) -> Prepared | None:
    """What was prepared of a corpus and has that `Prepared.digest`, wherever its text was and is; None where it does
    not lie in `cache`. Nothing is downloaded, and no file of the text is read.

    Raises ValueError where what lies there is damaged.
    """
    for folder in sorted(cache.glob("[!.]*")):
        if folder.is_dir() and folder.name.rpartition("-")[2] == digest:
            return _read(folder, corpus, digest)
    return None


def _of_vocabulary(corpus: Corpus, vocabulary: Vocabulary | None) -> Corpus:
    """The corpus at the level of the vocabulary."""
    if vocabulary is None:
        return corpus
    if corpus.level not in (None, vocabulary.level) or (corpus.vocabulary_size or vocabulary.size) < vocabulary.size:
        raise ValueError(
            f"The corpus asks for level={corpus.reads} and vocabulary_size={corpus.vocabulary_size}, and the given "
            f"vocabulary has level={vocabulary.level} and {vocabulary.size} tokens. Leave both out of the corpus."
        )
    size = vocabulary.size if vocabulary.level in ("word", "bpe") else None
    return dataclasses.replace(corpus, level=vocabulary.level, vocabulary_size=size)


def _wanted(source: Source, splits: Sequence[str] | None, vocabulary: Vocabulary | None) -> tuple[str, ...]:
    if splits is not None:
        unknown = [split for split in splits if split not in SPLITS]
        if unknown or not splits:
            raise ValueError(f"splits={tuple(splits)} are not splits. Choose from {', '.join(SPLITS)}.")
        return tuple(split for split in SPLITS if split in splits)
    return SPLITS if vocabulary is None else tuple(split for split in SPLITS if split in source.all_splits)


def _digest(corpus: Corpus, source: Source, vocabulary: Vocabulary | None, wanted: Sequence[str]) -> str:
    said = {
        "form": _FORM,
        "corpus": {**dataclasses.asdict(corpus), "level": corpus.reads, "source": source.name},
        "text": source.identity,
        "vocabulary": None if vocabulary is None else vocabularies.digest(vocabulary),
        "splits": wanted,
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[Path]:
    """A place beside `folder` to write at, which no other process has. The lock is gone with the process that held it:
    what lies there is of one that was killed, and is removed. Where a file system has no locks, every process writes at
    a place of its own."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        own = "" if _locked(lock) else f".{os.getpid()}"
        part = folder.with_name(f".{folder.name}{own}.part")
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _place(part: Path, folder: Path) -> None:
    """Rename, unless another process, which could not be waited for, has put the same there."""
    try:
        part.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _locked(file: IO[Any]) -> bool:
    """Wait for the lock; False where there are none: on Windows, and some file systems."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
    except (ModuleNotFoundError, OSError):
        return False
    return True


def _not_empty(text: Text) -> Iterator[str]:
    """The text to learn a vocabulary from. Raises ValueError, naming it, where there is none."""
    found = False
    for piece in decoded(text):
        found = found or bool(piece)
        yield piece
    if not found:
        raise ValueError(f"The train split of {text.name} is empty. Give a text, or a longer one.")


def _write(folder: Path, corpus: Corpus, source: Source, vocabulary: Vocabulary | None, wanted: Sequence[str]) -> None:
    learned = vocabulary is None and corpus.reads != "byte"
    texts = source.texts(corpus, [split for split in SPLITS if split in wanted or (learned and split == "train")])
    if vocabulary is None:
        pieces = _not_empty(texts["train"]) if learned else ()
        alphabet = f" {string.ascii_lowercase}" if corpus.name == "text8" else None
        vocabulary = vocabularies.learn(corpus.reads, pieces, size=corpus.vocabulary_size, alphabet=alphabet)
    vocabularies.save(vocabulary, folder / "vocabulary.json")
    said: dict[str, Any] = {"source": source.sentence, "text": source.identity, "splits": {}}
    for split in wanted:
        said["splits"][split] = write_split(folder / f"{split}.npy", split, corpus, texts[split], vocabulary)
    whole_json({"corpus": dataclasses.asdict(corpus), **said}, folder / "manifest.json")


def _read(folder: Path, corpus: Corpus, digest: str) -> Prepared:
    try:
        said = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        counts: Mapping[str, Mapping[str, int]] = said["splits"]
        tokens = {split: reading(folder / f"{split}.npy", counts[split]["tokens"]) for split in counts}
        vocabulary = vocabularies.load(folder / "vocabulary.json")
    except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
        raise ValueError(f"{folder} is damaged: {error}. Delete it, and it is prepared anew.") from error
    return Prepared(
        corpus=corpus,
        vocabulary=vocabulary,
        tokens=tokens,
        units={split: counts[split]["units"] for split in counts},
        corrupted={split: counts[split]["corrupted"] for split in counts},
        digest=digest,
        source=said["source"],
        folder=folder,
    )
