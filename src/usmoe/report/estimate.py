"""Figures with their uncertainty, from recorded likelihoods: a mean known everywhere and corrected on a sample, and the
band within which another text of the kind would move a mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Honest:
    """The mean honest negative log-likelihood, from a sample of positions.

    The sample estimates the mean difference to the teacher-forced figure, which is known at every position; so the
    interval is that of the difference (a difference estimator, Cochran 1977, section 7.2), not of the text.
    """

    nats: float
    """Per token."""
    interval: float
    """Half-width of the 95 % confidence interval, nats per token."""
    positions: int
    """Sampled; 0 where none had to be, because the teacher-forced figure is honest as it is."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)


def drawn(total: int, positions: int, seed: int) -> Int[Tensor, " P"]:
    """Seeded positions of `total`, without replacement, in the order of the draw; all of them where there are fewer."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(total, generator=generator)[:positions]


def corrected(forced: Float[Tensor, " T"], places: Int[Tensor, " P"], alone: Float[Tensor, " P"]) -> Honest:
    """The mean of `forced`, corrected by how much `alone`, the honest likelihood at the drawn places, differs from it.

    The interval is NaN from a single position, and 0 from all of them.
    """
    total, positions = len(forced), len(places)
    gap = alone.double() - forced[places].double()
    spread = gap.std().item() if positions > 1 else math.nan
    unseen = math.sqrt(1 - positions / total)
    return Honest(
        nats=forced.double().mean().item() + gap.mean().item(),
        interval=1.96 * spread / math.sqrt(positions) * unseen,
        positions=positions,
    )


def in_blocks(values: Float[Tensor, " T"], size: int) -> tuple[list[float], list[int]]:
    """Sums of runs of `size` neighbours, and how many each has: the last may be shorter."""
    parts = values.double().split(size)
    return [part.sum().item() for part in parts], [len(part) for part in parts]


def band(
    sums: Sequence[float], counts: Sequence[int], *, tail: float = 0.025, resamples: int | None = None, seed: int = 0
) -> tuple[float, float] | None:
    """Where 95 % of the resampled means lie, when blocks are drawn with replacement, as many as there are.

    tail       share of the means on each side of the band; 0.025 leaves 95 % within
    resamples  None: so many that 25 lie on each side

    Neighbouring tokens of a text are alike, and neighbouring blocks hardly: so blocks are drawn, which do not overlap
    (Carlstein 1986). Sums of differences between two models on the same text give the paired band of the difference.
    None where there is one block alone.
    """
    if len(sums) < 2:
        return None
    resamples = math.ceil(25 / tail) if resamples is None else resamples
    chosen = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    means = np.asarray(sums)[chosen].sum(1) / np.asarray(counts)[chosen].sum(1)
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
