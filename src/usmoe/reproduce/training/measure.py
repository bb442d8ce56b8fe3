"""The figures of one trained model on one text, kept beside the model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usmoe.data.units import Unit
from usmoe.report.whole import whole_json
from usmoe.reproduce.training.runs import Run

if TYPE_CHECKING:
    from usmoe.reproduce.training.plan import Measurement
    from usmoe.reproduce.training.study import Text


@dataclass(frozen=True, kw_only=True)
class Served:
    """A trained model under another router."""

    nats: float
    """A token, teacher-forced: the router is causal."""
    experts: float
    """A token."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One row of a result: a model on a text. Likelihoods are in nats a token; `usmoe.data.units.stated` makes bits a
    character or perplexity a word of them."""

    corpus: str
    row: str
    seed: int
    text: Text
    unit: Unit
    """character | byte | word."""
    tokens_per_unit: float
    """Of the split."""
    tokens: int
    """That were predicted."""
    corrupted: int
    """Words of the whole split that were."""
    teacher_forced: float
    honest: float
    honest_half: float
    """Half-width of its 95 % interval, for the sample of positions; 0 where the teacher-forced figure is honest."""
    reset: float
    """Teacher-forced, without memory."""
    alone: float | None
    """Teacher-forced, a batch of one; None where no sequence knows another."""
    served: Mapping[str, Served] = field(default_factory=dict)
    """Under other routers, by the names of `usmoe.reproduce.training.measuring.served`."""
    experts: float
    """A token, mean over layers."""
    dropped: float
    """Share of tokens without an expert."""
    load_cv: float
    flops: float
    """A token, counted pairs, without the output layer."""
    flops_at_2: float
    """The same model with two experts a token."""
    sums: tuple[float, ...]
    """Teacher-forced nats of blocks of neighbouring tokens, for paired bands."""
    counts: tuple[int, ...]
    """Tokens of each block."""
    steps: int
    """That the model was trained."""
    best_step: int
    """At which its validation figure was best: this model is measured."""
    training_seconds: float
    seconds: float
    """That measuring took."""

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Measured:
        """What `dataclasses.asdict` made, through JSON."""
        fields: dict[str, Any] = dict(data)
        fields["served"] = {name: Served(**one) for name, one in data["served"].items()}
        fields |= {name: tuple(data[name]) for name in ("sums", "counts")}
        return Measured(**fields)


def measured(
    one: Run,
    text: Text,
    folder: Path,
    cache: Path,
    measurement: Measurement,
    *,
    data: Path | None = None,
    offline: bool = False,
    device: str = "cpu",
    anew: bool = False,
) -> Measured:
    """The figures of the best model of a run on the test split, clean or corrupted; those that lie beside the model
    (evaluation-<text>-<digest>.json) unless `anew`.

    folder  of the run
    cache   where prepared texts are
    """
    asked = json.dumps(dataclasses.asdict(measurement), sort_keys=True)
    path = folder / f"evaluation-{text}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}.json"
    if path.is_file() and not anew:
        return Measured.from_dict(json.loads(path.read_text(encoding="utf-8")))
    from usmoe.reproduce.training.measuring import measure

    found = measure(one, text, folder, cache, measurement, data=data, offline=offline, device=device)
    whole_json(dataclasses.asdict(found), path, allow_nan=False)
    return found
