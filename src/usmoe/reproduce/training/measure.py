"""The figures of one trained model on one text, kept beside the model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usmoe.report.whole import whole_json
from usmoe.reproduce.training.runs import Run
from usmoe.routing.text import parse_router
from usmoe.train.figures import Figures, Serving
from usmoe.train.figures import Measured as Reading

if TYPE_CHECKING:
    from usmoe.data.corpus import Corpus
    from usmoe.reproduce.training.plan import Measurement
    from usmoe.reproduce.training.study import Text
    from usmoe.train.config import TrainConfig

CALIBRATION = 20_000
"""Tokens of the validation split by which thresholds of another budget are found."""

_THRESHOLD, _PREFIX = Serving(how="threshold"), Serving(how="prefix")
_FEWER = Serving(how="threshold", k=1.5, calibrated=True)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One row of a result: a model on a text."""

    corpus: str
    row: str
    seed: int
    text: Text
    figures: Figures
    """Of the model with the best validation figure."""
    at_two: Figures | None
    """The same with two experts a token, where a method grows its k beyond (SMoE-Dropout)."""
    corrupted: int
    """Words of the whole split that are."""
    steps: int
    """That the model was trained."""
    training_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        fields = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        two = None if self.at_two is None else self.at_two.to_dict()
        return fields | {"figures": self.figures.to_dict(), "at_two": two}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Measured:
        """What `to_dict` made."""
        fields: dict[str, Any] = dict(data)
        fields["figures"] = Figures.from_dict(data["figures"])
        fields["at_two"] = None if data["at_two"] is None else Figures.from_dict(data["at_two"])
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
    found = _measured(one, text, folder, cache, measurement, data=data, offline=offline, device=device)
    whole_json(found.to_dict(), path, allow_nan=False)
    return found


def lean(one: Measured) -> Measured:
    """The same as it stands in a result: blocks of the teacher-forced reading alone, which pair rows, to a tenth of a
    thousandth of a nat. The file beside the model has those of all readings."""
    figures = one.figures
    kept = dataclasses.replace(figures.forced, sums=tuple(round(value, 4) for value in figures.forced.sums))
    return dataclasses.replace(
        one,
        figures=dataclasses.replace(_without_blocks(figures), forced=kept),
        at_two=None if one.at_two is None else _without_blocks(one.at_two),
    )


def _without_blocks(figures: Figures) -> Figures:
    def bare(reading: Reading) -> Reading:
        return dataclasses.replace(reading, sums=(), counts=())

    return dataclasses.replace(
        figures,
        forced=bare(figures.forced),
        reset=None if figures.reset is None else bare(figures.reset),
        alone=None if figures.alone is None else bare(figures.alone),
        served={name: bare(reading) for name, reading in figures.served.items()},
    )


def _measured(
    one: Run, text: Text, folder: Path, cache: Path, measurement: Measurement, *, device: str, **where: Any
) -> Measured:
    from usmoe.data.prepare import prepare
    from usmoe.train.evaluation import evaluate_model
    from usmoe.train.folder import RunFolder, load_run

    grown = one.config.grow_k
    trained = load_run(folder, "best", device=device, router=None if grown is None else _at(one.config, grown[1]))
    clean = prepare(one.config.corpus, cache, **where, vocabulary=trained.vocabulary, splits=("validation", "test"))
    read = clean
    if text == "corrupt":
        changed = corrupted(one.config.corpus, measurement)
        read = prepare(changed, cache, **where, vocabulary=trained.vocabulary, splits=("test",))
    given: dict[str, Any] = {"positions": measurement.positions, "seed": measurement.seed}
    figures = evaluate_model(
        trained,
        read.test,
        measurement.evaluation,
        served=servings(one.config),
        calibration=clean.validation[:CALIBRATION],
        **given,
    )
    at_two = None
    if grown is not None:
        two = load_run(folder, "best", device=device, router=_at(one.config, 2))
        at_two = evaluate_model(two, read.test, measurement.evaluation, served=(), **given)
    lines = RunFolder(folder).rows()
    return Measured(
        corpus=one.corpus,
        row=one.row,
        seed=one.config.seed,
        text=text,
        figures=figures,
        at_two=at_two,
        corrupted=read.corrupted["test"],
        steps=one.config.steps,
        training_seconds=max((line["elapsed"] for line in lines if "elapsed" in line), default=0.0),
    )


def servings(config: TrainConfig) -> tuple[Serving, ...]:
    """Under which causal routers a model is measured: by the thresholds that training tracked, by prefix, and USMoE
    that was trained with two experts also by thresholds of 1.5. Methods that cannot be served so have a reason in the
    figure's place."""
    router: Any = parse_router(config.model.router)
    unified = getattr(router, "name", "") == "usmoe"
    if not unified:
        return (_THRESHOLD,)
    return (_THRESHOLD, _FEWER, _PREFIX) if router.k == 2 else (_THRESHOLD, _PREFIX)


def corrupted(corpus: Corpus, measurement: Measurement) -> Corpus:
    """The same text, with words of its test split replaced."""
    return dataclasses.replace(
        corpus,
        corrupt_mode=measurement.corrupt_mode,
        corrupt_rate=measurement.corrupt_rate,
        corrupt_splits=("test",),
        corrupt_seed=measurement.seed,
    )


def _at(config: TrainConfig, k: int) -> Any:
    """The router of a configuration with another k."""
    router: Any = parse_router(config.model.router)
    return dataclasses.replace(router, k=k)
