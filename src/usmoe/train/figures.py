"""What a trained language model does on a text, as one frozen value: a row of a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from usmoe.data.units import Unit, stated
from usmoe.layers.budget import off_budget
from usmoe.report.estimate import Honest, band
from usmoe.train.config import Evaluation
from usmoe.train.served import How


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One teacher-forced reading of a text."""

    nats: float
    """A token."""
    experts: float | None
    """Pairs a token: mean over tokens and layers. None for a dense model, as the two below."""
    dropped: float | None
    """Share of tokens without an expert, 0 to 1: mean over the layers."""
    load_cv: float | None
    """Coefficient of variation of the loads of the whole text: mean over the layers."""
    flops: float
    """A token, counted pairs, two for a multiply-add, without the output layer (`usmoe.models.flops`); of memory, what
    was there to be seen."""
    relative: float | None
    """The same over that of this model with two experts a token; None for a dense model."""
    seconds: float
    """Wall time."""
    sums: tuple[float, ...]
    """Nats of blocks of neighbouring tokens, in the order of the text."""
    counts: tuple[int, ...]
    """Tokens of each block."""
    asked: float | None = None
    """Experts a token that the routers are asked for: mean over the layers. None where they say no number; in saved
    figures it may be missing."""

    @property
    def off_budget(self) -> bool:
        """Whether the experts a token differ from those asked for by more than a tenth."""
        return off_budget(self.experts, self.asked)

    @property
    def band(self) -> tuple[float, float] | None:
        """Where 95 % of the figure lies when blocks are drawn again, nats a token; None for a text of one block."""
        return band(self.sums, self.counts)

    def beside(self, other: Measured) -> tuple[float, float] | None:
        """The paired band of this figure less the other's, nats a token: readings of the same tokens.

        Raises ValueError where they were not."""
        if self.counts != other.counts:
            raise ValueError(
                "The two figures are of texts of other lengths, and cannot be paired. Take those of one text and "
                "setting."
            )
        return band([one - two for one, two in zip(self.sums, other.sums, strict=True)], self.counts)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A text read under another router than the model's own."""

    forced: Measured
    """Teacher-forced, memory carried as the setting says."""
    honest: Honest
    """Of the same tokens, each from those before it alone."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A causal way to serve a model (`usmoe.train.served`)."""

    how: How
    k: float | None = None
    """Experts a token; None: those it was trained with."""
    calibrated: bool = False
    """Whether thresholds are found on calibration tokens, in place of the cuts that training tracked."""

    def __post_init__(self) -> None:
        if self.calibrated and self.how != "threshold":
            raise ValueError(f"calibrated belongs to how=threshold, and how={self.how}. Leave it out.")

    @property
    def name(self) -> str:
        """As a column: threshold, threshold k=1.5 calibrated, prefix."""
        k = "" if self.k is None else f" k={self.k:g}"
        return f"{self.how}{k}{' calibrated' if self.calibrated else ''}"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """A trained model on a text, every way it is read side by side. Likelihoods are in nats a token; `stated` makes
    bits or a perplexity of them."""

    routers: tuple[str, ...]
    """As text, one a layer that differs from the one before it."""
    step: int
    """After how many optimizer steps."""
    setting: Evaluation
    positions: int
    """Asked for, of the honest figure."""
    seed: int
    """Of the sample of positions."""
    tokens: int
    """That were predicted."""
    unit: Unit
    """character (bits; bytes are called so, as is the custom with enwik8) | byte (bits) | word (perplexity)."""
    tokens_per_unit: float
    """In the text that was read."""
    forced: Measured
    """Teacher-forced, memory carried as setting says."""
    honest: Honest
    """Of token t+1 given 1 ... t alone; for routers that look across the batch, of a sequence by itself."""
    reset: Measured | None
    """Teacher-forced, memory emptied at each segment; None where it is in `forced` too."""
    alone: Measured | None
    """Teacher-forced, each stream in a batch of one; None where no router looks across the batch."""
    served: Mapping[str, Measured] = field(default_factory=dict)
    """Under causal routers, teacher-forced and honest at once, by `Serving.name`."""
    unserved: Mapping[str, str] = field(default_factory=dict)
    """Why there is no such figure, by the same names."""
    under: Mapping[str, Reading] = field(default_factory=dict)
    """Under other routers, by their names. In saved figures this and the next two may be missing."""
    text: str = ""
    """What was read: a file, or a split of a corpus, and how it was corrupted."""
    unknown: float | None = None
    """Share of its tokens that stand for what the vocabulary does not know, 0 to 1; None where it has no such token."""

    def stated(self, nats: float) -> float:
        """Bits a character or byte, or perplexity a word, of nats a token."""
        return next(iter(stated(nats, self.unit, self.tokens_per_unit).values()))

    @property
    def bits(self) -> bool:
        """Whether `stated` gives bits, of which differences mean something; else a perplexity."""
        return self.unit != "word"

    @property
    def honest_interval(self) -> tuple[float, float]:
        """The ends of the 95 % interval of the honest figure, stated."""
        return self.stated(self.honest.nats - self.honest.interval), self.stated(
            self.honest.nats + self.honest.interval
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON; `from_dict` reads it back. A number that is none becomes null."""
        return _as_json(dataclasses.asdict(self))

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Figures:
        """What `to_dict` made. Raises ValueError for other fields."""
        known = {one.name for one in dataclasses.fields(Figures)}
        wrong = sorted((set(data) | {"under", "text", "unknown"}) ^ known)
        if wrong:
            raise ValueError(
                f"These are no figures of this version: {', '.join(wrong)} is too much or missing. Measure the model "
                "again."
            )
        fields: dict[str, Any] = dict(data)
        fields["routers"] = tuple(data["routers"])
        fields["setting"] = Evaluation(**data["setting"])
        fields["honest"] = _honest_from(data["honest"])
        for name in ("forced", "reset", "alone"):
            fields[name] = None if data[name] is None else _measured_from(data[name])
        fields["served"] = {name: _measured_from(one) for name, one in data["served"].items()}
        fields["under"] = {
            name: Reading(forced=_measured_from(one["forced"]), honest=_honest_from(one["honest"]))
            for name, one in data.get("under", {}).items()
        }
        return Figures(**fields)


def _measured_from(data: Mapping[str, Any]) -> Measured:
    fields = dict(data) if data["experts"] is None else _numbers(data, "load_cv")
    fields["sums"], fields["counts"] = tuple(data["sums"]), tuple(data["counts"])
    return Measured(**fields)


def _honest_from(data: Mapping[str, Any]) -> Honest:
    return Honest(**_numbers(data, "nats", "interval"))


def _as_json(value: Any) -> Any:
    """Lists for tuples, null for what is no finite number."""
    if isinstance(value, Mapping):
        return {name: _as_json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(data: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The fields, with NaN for null in those that are numbers always."""
    return dict(data) | {name: math.nan if data[name] is None else data[name] for name in names}
