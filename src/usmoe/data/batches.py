"""Batches of a corpus: long streams one after another, windows in a seeded order, and each token of a split once.

Where training stands in the data is the step alone: `at(step)` is a pure function of it (and of the seed), so that a
run that goes on from a checkpoint reads on exactly where it stopped.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from usmoe.data.array import Tokens

IGNORED = -100
"""A target that is not to be predicted; torch's cross-entropy ignores it by default."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """What a language model reads at a step, and what it is to predict."""

    inputs: Int[Tensor, "B L"]
    """Tokens."""
    targets: Int[Tensor, "B L"]
    """The token after each; IGNORED where there is none, which only `evaluation` needs."""
    first: bool
    """Whether the text before is not that of the step before: memory must be emptied."""

    @property
    def valid(self) -> Bool[Tensor, "B L"]:
        """Which places hold text: the others are padding, which must not compete for experts."""
        return self.targets != IGNORED

    @property
    def count(self) -> int:
        """How many tokens are predicted: the weight of this batch's mean loss in that of a split."""
        return int(self.valid.sum())


@dataclass(frozen=True, eq=False)
class Streams:
    """A corpus cut into B streams that are read side by side, L tokens a step: each step goes on where the one before
    stopped, as segment memory needs it (Dai et al. 2019, arXiv 1901.02860).

    Streams are of len(tokens) // B tokens, so that up to B - 1 tokens at the end of the corpus are never read. In an
    epoch every token of a stream but its first is predicted once; the last step of an epoch is shorter than L where L
    does not divide that. `first` is set at the start of each epoch.

    Raises ValueError where the corpus is shorter than one step, B * L + 1 tokens.
    """

    tokens: Tokens
    batch: int
    """B, streams."""
    length: int
    """L, tokens of a stream a step."""

    def __post_init__(self) -> None:
        _require(self.tokens, self.batch, self.length)

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every stream is read."""
        return -(-(len(self.tokens) // self.batch - 1) // self.length)

    def at(self, step: int) -> Batch:
        """The batch of a step, counted from 0 through all epochs."""
        place = step % self.steps_per_epoch
        long = len(self.tokens) // self.batch
        start = place * self.length
        streams = self.tokens[: long * self.batch].reshape(self.batch, long)
        return _batch(streams[:, start : start + self.length + 1].astype(np.int64), first=place == 0)


@dataclass(frozen=True, eq=False)
class Windows:
    """Sequences of L tokens, side by side in the corpus, in the order of a seeded permutation; each epoch has a new one
    and a new offset below L at which the first begins. No step knows another: `first` is always set.

    Raises ValueError where the corpus is shorter than one step, B * L + 1 tokens, or than three windows.
    """

    tokens: Tokens
    batch: int
    """B, windows a step."""
    length: int
    """L, tokens of a window."""
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.tokens, self.batch, self.length, windows=3)

    @property
    def windows(self) -> int:
        """Windows in an epoch. Two are left out, so that every offset leaves room for all and for the last target."""
        return len(self.tokens) // self.length - 2

    @property
    def steps_per_epoch(self) -> int:
        """Steps that begin in an epoch, at least; a step may take windows of two epochs."""
        return max(1, self.windows // self.batch)

    def at(self, step: int) -> Batch:
        """The batch of a step, counted from 0 through all epochs."""
        rows = []
        for number in range(step * self.batch, (step + 1) * self.batch):
            epoch, place = divmod(number, self.windows)
            offset, order = _order(self.seed, epoch, self.windows, self.length)
            start = offset + int(order[place]) * self.length
            rows.append(self.tokens[start : start + self.length + 1].astype(np.int64))
        return _batch(np.stack(rows), first=True)


def evaluation(tokens: Tokens, batch: int, length: int) -> Iterator[Batch]:
    """A whole split, in B streams side by side: every token but the split's first is predicted exactly once.

    A stream's last target is the first token of the next stream. Streams differ in length by one at most; those that
    end before the others are padded in the last batch, with token 0 and the target IGNORED. `first` is set on the first
    batch alone, so that memory may be carried through; who evaluates without memory takes no notice of it.

    The mean over batches, each weighted by its `count`, is the mean over the split.

    Raises ValueError at the first batch where a stream would be empty.
    """
    targets = len(tokens) - 1
    if batch < 1 or length < 1 or targets < batch:
        raise ValueError(
            f"{len(tokens)} tokens cannot be evaluated in {batch} streams of {length} tokens a step: {batch + 1} "
            "tokens are needed. Give a longer text or fewer streams."
        )
    bounds = [number * targets // batch for number in range(batch + 1)]
    longest = -(-targets // batch)
    for start in range(0, longest, length):
        width = min(length, longest - start)
        inputs = np.zeros((batch, width), dtype=np.int64)
        wanted = np.full((batch, width), IGNORED, dtype=np.int64)
        for row, (begin, end) in enumerate(itertools.pairwise(bounds)):
            piece = tokens[begin + start : min(begin + start + width, end) + 1].astype(np.int64)
            inputs[row, : len(piece) - 1], wanted[row, : len(piece) - 1] = piece[:-1], piece[1:]
        yield Batch(inputs=torch.from_numpy(inputs), targets=torch.from_numpy(wanted), first=start == 0)


def _batch(rows: Int[np.ndarray, "B L+1"], *, first: bool) -> Batch:
    return Batch(
        inputs=torch.from_numpy(rows[:, :-1].copy()), targets=torch.from_numpy(rows[:, 1:].copy()), first=first
    )


def _require(tokens: Tokens, batch: int, length: int, windows: int = 0) -> None:
    if batch < 1 or length < 1:
        raise ValueError(f"batch={batch} and length={length} make no batch. Give both as 1 or more.")
    needed = max(batch * length + 1, windows * length)
    if len(tokens) < needed:
        raise ValueError(
            f"A corpus of {len(tokens):,} tokens is too short for {batch} sequences of {length} tokens a step, which "
            f"need {needed:,}. Give a longer text, or a smaller batch or length."
        )


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, windows: int, length: int) -> tuple[int, Int[np.ndarray, "windows"]]:
    """The offset and the permutation of an epoch."""
    offset = int(np.random.default_rng([seed, epoch]).integers(length))
    return offset, np.random.default_rng([seed, epoch, 1]).permutation(windows)
