"""The result of a fine-tuning run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from usmoe.report.whole import whole_json
from usmoe.train.finetune_config import FinetuneConfig


@dataclass(frozen=True, kw_only=True)
class Selected:
    """A model during the run, on the rows that are for selection."""

    epoch: float
    """How often every training text had been read; a fraction where the steps ended within an epoch."""
    step: int
    """Optimizer steps so far."""
    loss: float
    """Cross-entropy a text, nats."""
    accuracy: float
    macro_f1: float


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The best epoch's model on the test rows, and how it came to be."""

    accuracy: float
    """On the test rows, 0 to 1; measured once, at the end."""
    accuracy_band: tuple[float, float]
    """95 % of 2,000 bootstrap resamples of the test rows; the model is held."""
    macro_f1: float
    macro_f1_band: tuple[float, float]
    rows: Mapping[str, str]
    """Which rows train, validation (selection) and test were, in words."""
    counts: Mapping[str, int]
    """How many."""
    classes: int
    known: int
    """Test rows whose text stands among the training texts, too."""
    cut: int
    """Test texts that were longer than `length` tokens."""
    tokens: float
    """Of a test text, mean."""
    history: tuple[Selected, ...]
    """After each epoch."""
    best: Selected
    """The one that was tested: the first of those with the highest accuracy."""
    router: str | None
    """None for a dense model, as the next three."""
    experts: float | None
    """Pairs a real token, in the test: mean over the layers."""
    dropped: float | None
    """Share of real tokens without an expert."""
    load_cv: float | None
    """Coefficient of variation of the experts' loads over the whole test: mean over the layers."""
    alone: bool
    """Whether no figure depends on which texts share a batch: so the router promises."""
    flops: float
    """Of the body for a token of the test, by the pairs that were routed, without an output layer: two for a
    multiply-add."""
    seconds: float
    """Wall time of training and selection."""
    test_seconds: float
    start: Mapping[str, Any]
    """The checkpoint: its folder's name, which of its models, after which step, and digests."""
    config: FinetuneConfig
    """As it was resolved."""
    names: tuple[str, ...] = ()
    """What the classes are called, in the order of their places in predictions.npy. Older results lack this and the
    next two."""
    empty: int = 0
    """Rows without text, of all parts: to the model a line end."""
    unknown: float | None = None
    """Share of the test's tokens that the checkpoint's vocabulary does not know, 0 to 1; None where it has no token for
    what is unknown."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON; `from_dict` reads it back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @staticmethod
    def from_dict(said: Mapping[str, Any]) -> Scored:
        """The result that `to_dict` wrote."""
        fields: dict[str, Any] = {
            "accuracy_band": tuple(said["accuracy_band"]),
            "macro_f1_band": tuple(said["macro_f1_band"]),
            "names": tuple(said.get("names", ())),
            "history": tuple(Selected(**one) for one in said["history"]),
            "best": Selected(**said["best"]),
            "config": FinetuneConfig.from_dict(said["config"]),
        }
        return Scored(**{**said, **fields})

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        whole_json(self.to_dict(), path)

    @staticmethod
    def load(path: Path) -> Scored:
        """Raises ValueError, naming the file, for what is no result."""
        try:
            return Scored.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} holds no result of usmoe finetune: {error}. Remove it, and --resume.") from error
