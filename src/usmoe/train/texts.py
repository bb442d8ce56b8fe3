"""Texts as batches of tokens: texts of a length together, in an order that the seed and the epoch decide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from usmoe.data.vocabulary import Vocabulary, share_unknown

WINDOW = 50
"""Batches within which texts are sorted by length: enough that little is padding, few enough that the order stays
random."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TextBatch:
    """Texts side by side, each from the left."""

    rows: Int[np.ndarray, " B"]
    """Their places in the data."""
    tokens: Int[Tensor, "B L"]
    """0 where there is no text."""
    valid: Bool[Tensor, "B L"]
    """Where there is."""


class Texts:
    """Encoded texts, and their batches.

    Each text is cut to its first `length` tokens, as the released code of arXiv 2503.22996 does. A text without a token
    is one line end (a space in an alphabet that has none).
    """

    def __init__(self, vocabulary: Vocabulary, texts: Sequence[str], length: int) -> None:
        """Raises ValueError, with its beginning, for a text that the vocabulary cannot encode."""
        nothing = vocabulary.encode("\n" if "\n" in getattr(vocabulary, "alphabet", "\n") else " ")[:1]
        self.tokens: list[Int[np.ndarray, "tokens"]] = []
        self.cut = 0
        """How many were longer."""
        for text in texts:
            try:
                found = vocabulary.encode(text)
            except ValueError as error:
                raise ValueError(f"{text[:40]!r}: {error}") from error
            self.cut += len(found) > length
            self.tokens.append(found[:length] if len(found) else nothing)
        self.lengths = np.array([len(one) for one in self.tokens])
        self.unknown = share_unknown(vocabulary, *self.tokens)
        """Share of the tokens that stand for what the vocabulary does not know; None where it has no such token."""

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, rows: Int[np.ndarray, " B"]) -> TextBatch:
        """Those texts."""
        lengths = torch.from_numpy(self.lengths[rows])
        tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
        for line, row in zip(tokens, rows, strict=True):
            found = self.tokens[row]
            line[: len(found)] = torch.from_numpy(found.astype(np.int64))
        return TextBatch(rows=rows, tokens=tokens, valid=torch.arange(tokens.shape[1]) < lengths[:, None])

    def by_length(self, size: int) -> Iterator[TextBatch]:
        """Every text once, short ones first."""
        order = np.argsort(self.lengths, kind="stable")
        for start in range(0, len(order), size):
            yield self.batch(order[start : start + size])


class Epochs:
    """Batches of training: each epoch every text once. `at(step)` is a pure function of step and seed, so that a run
    that goes on reads on exactly where it stopped."""

    def __init__(self, texts: Texts, size: int, seed: int) -> None:
        self.texts, self.size, self.seed = texts, size, seed
        self._epoch, self._order = -1, []  # of the epoch that is read

    @property
    def steps(self) -> int:
        """In an epoch; the last batch of the shuffled texts may be smaller."""
        return -(-len(self.texts) // self.size)

    def at(self, step: int) -> TextBatch:
        """The batch of a step, counted from 0 through all epochs."""
        epoch, place = divmod(step, self.steps)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return self.texts.batch(self._order[place])

    def _shuffled(self, epoch: int) -> list[Int[np.ndarray, " B"]]:
        """Texts at random, sorted by length within a window, cut into batches, the batches at random."""
        draws = np.random.default_rng([self.seed, epoch])
        order, window = draws.permutation(len(self.texts)), WINDOW * self.size
        batches: list[Int[np.ndarray, " B"]] = []
        for start in range(0, len(order), window):
            rows = order[start : start + window]
            rows = rows[np.argsort(self.texts.lengths[rows], kind="stable")]
            batches += [rows[first : first + self.size] for first in range(0, len(rows), self.size)]
        return [batches[place] for place in draws.permutation(len(batches))]
