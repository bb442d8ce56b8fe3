"""What one run of a training experiment does: rows, texts, seeds and every configuration, saved whole."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from usmoe.data.corrupt import Mode
from usmoe.reproduce.experiment import Experiment, Scale
from usmoe.reproduce.kind import NOT_ASKED, Asked, words
from usmoe.reproduce.training.runs import SEEDS, SMALL, Run, digest
from usmoe.reproduce.training.study import STUDIES, Row, Study, Text, named, own
from usmoe.train.config import Evaluation, TrainConfig
from usmoe.train.methods import METHODS


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """How trained models are measured."""

    evaluation: Evaluation
    positions: int = 200
    """Of the honest figure: tokens that are predicted from those before them alone."""
    corrupt_mode: Mode = "replace"
    corrupt_rate: float = 0.04
    """Share of words."""
    seed: int = 0
    """Of positions and corruption: the same for every model, so that all are compared on the same tokens."""


MEASUREMENTS: dict[Scale, Measurement] = {
    "small": Measurement(evaluation=dataclasses.replace(SMALL.evaluation, tokens=200_000), positions=1000),
    "paper": Measurement(evaluation=Evaluation(batch=10, segment=128, memory=896)),
}


@dataclass(frozen=True, kw_only=True)
class PlannedRow:
    """A row of the table."""

    name: str
    label: str
    paper: str | None
    """The paper's column beside it."""
    k: float | None = None
    """Where the table is one over k."""
    note: str = ""
    """What was decided of the method."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run of an experiment, as it is saved."""

    experiment: str
    """As typed: table14."""
    scale: Scale
    rows: tuple[PlannedRow, ...]
    corpora: tuple[str, ...]
    texts: tuple[Text, ...]
    """Of the test split, on which each model is measured."""
    seeds: tuple[int, ...]
    runs: tuple[Run, ...]
    """Every model: a corpus, a row, a seed, and its configuration."""
    measurement: Measurement
    data: str | None = None
    """The folder in place of the hub."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Texts of the scale on which nothing is trained, and why."""
    device: str = "cpu"

    @property
    def parts(self) -> int:
        """Each model is trained, and measured on each text."""
        return len(self.runs) * (1 + len(self.texts))

    @property
    def study(self) -> Study:
        """The experiment's rows and texts."""
        return STUDIES[self.experiment]

    def to_dict(self) -> dict[str, Any]:
        """As JSON; every configuration whole."""
        return dataclasses.asdict(self)

    def basis(self) -> dict[str, Any]:
        """The models by their names, which hold every configuration, and how they are measured."""
        return {
            "runs": [one.name for one in self.runs],
            "texts": self.texts,
            "measurement": digest(self.measurement),
        }

    def options(self) -> tuple[str, ...]:
        """--row, --corpus, --router, --seeds, --steps, --seed and --dtype where they are given."""
        config = self.runs[0].config
        own = self.study.base(self.corpora[0], self.scale, None)
        return (
            *row_options(self.rows, self.study.rows),
            *words(corpus=self.corpora if NOT_ASKED in self.left_out.values() else None),
            *seed_options(self.seeds, self.scale),
            *words(steps=None if config.steps == own.steps else config.steps),
            *words(dtype=None if config.precision == own.precision else config.precision),
        )

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Plan:
        """What `to_dict` made."""
        fields: dict[str, Any] = dict(data)
        measurement = dict(data["measurement"])
        measurement["evaluation"] = Evaluation(**measurement["evaluation"])
        fields |= {name: tuple(data[name]) for name in ("corpora", "texts", "seeds")}
        fields["rows"] = tuple(PlannedRow(**one) for one in data["rows"])
        fields["runs"] = tuple(
            Run(corpus=one["corpus"], row=one["row"], config=TrainConfig.from_dict(one["config"]))
            for one in data["runs"]
        )
        fields["measurement"] = Measurement(**measurement)
        return Plan(**fields)


def plan(experiment: Experiment, asked: Asked) -> Plan:
    """What a run of the experiment does.

    At small scale the texts are those of `usmoe.reproduce.training.runs.CORPORA` that lie in the folder of data, at
    paper scale the paper's. Raises ValueError for rows and texts that the experiment does not have, for options of
    other kinds of experiments, and where there is no text at all.
    """
    asked.refuse(experiment, "model", "tasks", "batch_size")
    if asked.dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"--dtype {asked.dtype} is no precision of training. Choose float32 or bfloat16.")
    study = STUDIES[experiment.name]
    asked_corpora = study.corpora_at(asked.scale)
    rows = chosen(study.rows, asked, experiment, _base(study, asked_corpora[0], asked))
    corpora = some_of(asked.corpora, asked_corpora, "corpus", experiment)
    absent = _absent(study, corpora, asked)
    left_out = dict.fromkeys((name for name in asked_corpora if name not in corpora), NOT_ASKED)
    left_out |= dict.fromkeys(absent, "not in the folder of data")
    there = tuple(name for name in corpora if name not in absent)
    if not there:
        raise ValueError(
            f"There is no text to train on. {' '.join(absent.values())}"
            + (
                ""
                if asked.data
                else " At small scale the texts lie in a folder: give --data DIR, or --show for what was run before."
            )
        )
    seeds = seeds_of(asked)
    return Plan(
        experiment=experiment.name,
        scale=asked.scale,
        rows=tuple(map(planned, rows)),
        corpora=there,
        texts=study.texts,
        seeds=seeds,
        runs=tuple(
            row.run(corpus, _base(study, corpus, asked), seed) for seed in seeds for corpus in there for row in rows
        ),
        measurement=MEASUREMENTS[asked.scale],
        data=None if asked.data is None else str(asked.data),
        left_out=left_out,
        device=asked.device,
    )


def planned(row: Row) -> PlannedRow:
    """A row as it is saved."""
    return PlannedRow(name=row.name, label=row.label, paper=row.paper, k=row.k, note=row.method.note)


def about(rows: Sequence[PlannedRow]) -> tuple[str, ...]:
    """What was decided of each method, once where several rows are of one. Of a method that is known, in today's words:
    those of a result are as old as it is."""
    said: dict[str, str] = {}
    for row in rows:
        method = METHODS.get(row.name if row.k is None else row.name.removesuffix(f"-k{row.k:g}"))
        if note := row.note if method is None else method.note:
            said.setdefault(note, row.label)
    return tuple(f"{label}: {note}" for note, label in said.items())


def chosen(rows: Sequence[Row], asked: Asked, experiment: Experiment, base: TrainConfig) -> list[Row]:
    """The rows of an experiment, or those that are asked for by name, methods that it does not have included; then
    those of routers of one's own, each of which can route in the model of `base`.

    Raises ValueError for an unknown row, for a router that cannot be had or cannot route there, and for one that is
    given twice."""
    known = {row.name: row for row in rows} | {name: named(name) for name in METHODS if name not in _names(rows)}
    wanted = some_of(asked.rows, list(known), "row", experiment) if asked.rows else [row.name for row in rows]
    found = {name: known[name] for name in wanted}
    for router in asked.routers:
        row = own(router, base)
        if row.name in found:
            raise ValueError(f"--router {router} is the router of the row {found[row.name].label!r}. Give it once.")
        found[row.name] = row
    return list(found.values())


def _names(rows: Sequence[Row | PlannedRow]) -> list[str]:
    return [row.name for row in rows]


def row_options(rows: Sequence[PlannedRow], own_rows: Sequence[Row]) -> tuple[str, ...]:
    """--row and --router that give these rows in place of an experiment's own."""
    known = {*_names(own_rows), *METHODS}
    named = tuple(name for name in _names(rows) if name in known)
    routers = tuple(row.label for row in rows if row.name not in known)
    return words(row=None if named == tuple(_names(own_rows)) else named, router=routers)


def seeds_of(asked: Asked) -> tuple[int, ...]:
    """As many as are asked for, or as the scale has."""
    return tuple(range(asked.seed, asked.seed + (asked.seeds or _number_of_seeds(asked.scale))))


def seed_options(seeds: Sequence[int], scale: Scale) -> tuple[str, ...]:
    """--seeds and --seed that give these in place of the scale's own."""
    return words(seeds=None if len(seeds) == _number_of_seeds(scale) else len(seeds), seed=seeds[0] or None)


def _number_of_seeds(scale: Scale) -> int:
    return len(SEEDS) if scale == "small" else 1


def _base(study: Study, corpus: str, asked: Asked) -> TrainConfig:
    base = study.base(corpus, asked.scale, asked.steps)
    return base if asked.dtype is None else base.replace(precision=asked.dtype)


def some_of(given: Sequence[str], known: Sequence[str], what: str, experiment: Experiment) -> tuple[str, ...]:
    """All that are known, or those of them that are given, in their order."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ValueError(
                f"{experiment.name} has no {what} {name!r}."
                + (f" Did you mean {near[0]}?" if near else "")
                + f" It has: {', '.join(known)}."
            )
    return tuple(name for name in known if not given or name in given)


def _absent(study: Study, corpora: Sequence[str], asked: Asked) -> dict[str, str]:
    """{text: why it is not there}, of texts that nobody asked for by name."""
    from usmoe.data.corpus import SPLITS
    from usmoe.data.sources import find_source

    absent = {}
    for name in corpora:
        try:
            find_source(study.base(name, asked.scale, None).corpus, asked.data).refuse_missing(SPLITS)
        except ValueError as error:
            if name in asked.corpora:
                raise
            absent[name] = str(error)
    return absent


def announce(plan: Plan) -> str:
    """A sentence on how much is trained."""
    configs = {one.corpus: one.config for one in plan.runs}
    tokens = {name: one.steps * one.batch * one.segment / 1e6 for name, one in configs.items()}
    told = ", ".join(f"{each:.2f} M tokens of {name}" for name, each in tokens.items())
    without = "".join(f" Without {name}: {why}." for name, why in plan.left_out.items())
    return (
        f"{number(plan.runs, 'model')} ({number(plan.rows, 'row')}, {number(plan.corpora, 'text')}, "
        f"{number(plan.seeds, 'seed')}), {plan.runs[0].config.steps:,} steps each ({told}).{without} Those that are "
        "trained already are read, and one that was stopped goes on; the same command goes on with all of it."
    )


def number(things: Sequence[Any], word: str) -> str:
    """1 seed, 2 seeds."""
    return f"{len(things)} {word}{'' if len(things) == 1 else 's'}"
