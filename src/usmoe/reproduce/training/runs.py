"""The experiments on training from scratch (Tables 2, 12, 13 and 14, Figures 6 and 12b): which runs they are made of.

Runs are values: a corpus, a row, a seed, and the configuration that these give. Tables that need the same run share its
folder, since its name holds a digest of the configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from usmoe.data.corpus import Corpus
from usmoe.models.config import MODELS
from usmoe.reproduce.given import digest_of, given
from usmoe.train.config import Evaluation, TrainConfig
from usmoe.train.methods import METHODS

CORPORA: dict[str, Corpus] = {"novels": Corpus(source="novels"), "wiki2016": Corpus(source="enwik8/wiki2016")}
"""The texts of the small scale, each trained and tested on its own splits, byte by byte."""
SEEDS = (0, 1)

SMALL = TrainConfig(
    corpus=CORPORA["novels"],
    model=MODELS["transformer-xl-small"],
    batch=8,
    segment=128,
    memory=128,
    steps=3000,
    optimizer="adam",
    lr=2e-3,
    schedule="cosine",
    warmup=100,
    clip=0.25,
    evaluate_every=1500,
    evaluation=Evaluation(batch=10, segment=128, memory=128, tokens=100_000),
)
"""What all rows of the small scale share: 3.07 million bytes, the same for every row."""
SWEEP_STEPS = 1000
"""Optimizer steps of the sweep over k (Table 12)."""

_UNREAD = ("checkpoint_every", "log_every")
"""Fields that decide what is written and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One model to be trained."""

    corpus: str
    """A short name: novels, wiki2016, enwik8."""
    row: str
    """A method, and its k where that is not the method's own: token_choice, usmoe-k4."""
    config: TrainConfig

    @property
    def name(self) -> str:
        """Of its folder: corpus, row, seed, and a digest of the configuration."""
        return f"{self.corpus}-{self.row}-{self.config.seed}-{digest(self.config)}"


def small_run(corpus: str, method: str, seed: int, *, k: float | None = None, steps: int | None = None) -> Run:
    """A run of the small scale.

    k      experts a token in place of the method's own
    steps  in place of those of SMALL
    """
    config = METHODS[method].apply(SMALL, k).replace(corpus=CORPORA[corpus], seed=seed, steps=steps or SMALL.steps)
    return Run(corpus=corpus, row=method if k is None else f"{method}-k{k:g}", config=config)


def digest(config: Any) -> str:
    """Eight hexadecimal digits of a sha256 over the fields of a configuration that are not at their default: a field
    that is added later changes no digest."""
    return digest_of(given(config, _UNREAD))
