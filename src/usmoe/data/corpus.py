"""Which text a language model is trained or measured on, and how it is read: a value, saved beside every result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from usmoe.checked import refuse_wrong_types
from usmoe.data.corrupt import Mode, check

Level = Literal["byte", "char", "word", "bpe"]
"""What a token is."""

SPLITS = ("train", "validation", "test")
"""The splits of every corpus, by these names."""

NAMED: Mapping[str, Level] = {"enwik8": "byte", "text8": "char", "wikitext103": "word", "lm1b": "word"}
"""The corpora of the paper's Table 2, and what a token of each is there."""

_SMALLEST_BPE = 258
"""256 bytes and two special tokens."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A text corpus as a model reads it."""

    source: str
    """enwik8 | text8 | wikitext103 | lm1b, or with a folder in it: enwik8/wiki2016; the name of a folder in --data DIR;
    or the path of a text file, or of a folder with the files of train, valid (or validation) and test. Files are plain
    text, or rows with the column text (.parquet, .jsonl, .json, .csv, .tsv), as they are or compressed (.gz, .bz2, .xz,
    .zip of one file)."""
    level: Level | None = None
    """What a token is: byte | char | word | bpe. None: what it is of the named corpus; of any other text, a byte."""
    vocabulary_size: int | None = None
    """Words or BPE tokens, special ones included. The most frequent words are kept, of equal ones those of lower code
    points. None: all words of the training split, as WikiText-103 has it. BPE needs a number."""
    split: tuple[float, float] = (0.05, 0.05)
    """Shares of validation and test, cut from the end of one file without splits of its own. Of enwik8 and text8 whole,
    this is the customary 90, 5 and 5 million; of a shorter copy, the same in proportion."""
    corrupt_mode: Mode | None = None
    """replace | insert: AAA in the place of a word, or before it (usmoe.data.corrupt). None: the text as it is."""
    corrupt_rate: float = 0.04
    """Probability of a word to be corrupted. The paper states none; related work has 0.025 to 0.04."""
    corrupt_splits: tuple[str, ...] = ("test",)
    """The splits that are corrupted."""
    corrupt_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("split", "corrupt_splits"):
            if isinstance(getattr(self, name), list):  # from JSON
                object.__setattr__(self, name, tuple(getattr(self, name)))
        refuse_wrong_types(self)
        if not self.source:
            raise ValueError(f"The source is empty. Give {', '.join(NAMED)}, or the path of a text.")
        if min(self.split) <= 0 or sum(self.split) >= 1:
            raise ValueError(
                f"split={self.split} leaves a split empty. Give the shares of validation and test, both above 0 and "
                "below 1 together."
            )
        self._check_size()
        check(self.corrupt_mode or "replace", self.corrupt_rate)
        unknown = [split for split in self.corrupt_splits if split not in SPLITS]
        if unknown or (self.corrupt_mode is not None and not self.corrupt_splits):
            raise ValueError(
                f"corrupt_splits={self.corrupt_splits} names {unknown[0] if unknown else 'no split'}. Choose from "
                f"{', '.join(SPLITS)}."
            )

    def _check_size(self) -> None:
        size, level = self.vocabulary_size, self.reads
        if level == "bpe" and (size is None or size < _SMALLEST_BPE):
            raise ValueError(
                f"vocabulary_size={size} makes no BPE: it needs {_SMALLEST_BPE} tokens at least, 256 bytes and two "
                "special ones. Give a number, such as 4096."
            )
        if level in ("byte", "char") and size is not None:
            raise ValueError(
                f"vocabulary_size={size} means nothing at the level {level!r}, whose tokens are those of the text. "
                "Leave it out, or choose word or bpe."
            )
        if size is not None and size < 4:
            raise ValueError(f"vocabulary_size={size} leaves room for no word: <eos>, <unk> and AAA are three.")

    @property
    def name(self) -> str:
        """The named corpus that this is, or is a folder of; empty for other texts."""
        return self.source.partition("/")[0] if self.source.partition("/")[0] in NAMED else ""

    @property
    def reads(self) -> Level:
        """What a token is, with the source's own level filled in."""
        return self.level or NAMED.get(self.name, "byte")
