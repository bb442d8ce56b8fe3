"""What one run of the fine-tuning experiment does: models, data sets and every configuration, saved whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from usmoe.reproduce.experiment import Experiment, Scale
from usmoe.reproduce.finetuning.study import CORPORA, ROWS, TASKS, settings
from usmoe.reproduce.kind import NOT_ASKED, Asked, words
from usmoe.reproduce.training.plan import (
    PlannedRow,
    chosen,
    number,
    planned,
    row_options,
    seed_options,
    seeds_of,
    some_of,
)
from usmoe.reproduce.training.runs import Run, digest
from usmoe.reproduce.training.study import STUDIES
from usmoe.train.config import TrainConfig
from usmoe.train.finetune_config import FinetuneConfig


@dataclass(frozen=True, kw_only=True)
class FinetuneRun:
    """One classifier: from a model, on a data set."""

    pretrained: Run
    task: str
    """sst2 | sst5 | imdb | banking77."""
    config: FinetuneConfig

    @property
    def name(self) -> str:
        """Of its folder; the digest is of both configurations."""
        one = self.pretrained
        both = f"{digest(one.config)}{digest(self.config)}"
        return f"{one.corpus}-{one.row}-{self.task}-{self.config.seed}-{both}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run of the experiment, as it is saved."""

    experiment: str
    scale: Scale
    rows: tuple[PlannedRow, ...]
    corpora: tuple[str, ...]
    """On which the models are pre-trained."""
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    """Of pre-training and of fine-tuning: each model is fine-tuned once."""
    runs: tuple[FinetuneRun, ...]
    data: str | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Data sets that are not run, and why."""
    device: str = "cpu"

    @property
    def pretrained(self) -> tuple[Run, ...]:
        """The models, each once."""
        return tuple({one.pretrained.name: one.pretrained for one in self.runs}.values())

    @property
    def parts(self) -> int:
        return len(self.pretrained) + len(self.runs)

    def to_dict(self) -> dict[str, Any]:
        """As JSON; every configuration whole, those of models once."""
        fields = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        return fields | {
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "pretrained": {one.name: dataclasses.asdict(one) for one in self.pretrained},
            "runs": [
                {"pretrained": one.pretrained.name, "task": one.task, "config": one.config.to_dict()}
                for one in self.runs
            ],
        }

    def basis(self) -> dict[str, Any]:
        """The classifiers by their names, which hold every configuration."""
        return {"runs": [one.name for one in self.runs]}

    def options(self) -> tuple[str, ...]:
        """--row, --router, --tasks, --seeds, --seed and --dtype where they are given."""
        config, own = self.runs[0].config, settings(self.tasks[0], self.scale)
        return (
            *row_options(self.rows, ROWS),
            *words(tasks=self.tasks if NOT_ASKED in self.left_out.values() else None),
            *seed_options(self.seeds, self.scale),
            *words(dtype=None if config.precision == own.precision else config.precision),
        )

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Plan:
        """What `to_dict` made."""
        fields: dict[str, Any] = dict(data)
        models = {
            name: Run(corpus=one["corpus"], row=one["row"], config=TrainConfig.from_dict(one["config"]))
            for name, one in fields.pop("pretrained").items()
        }
        fields |= {name: tuple(data[name]) for name in ("corpora", "tasks", "seeds")}
        fields["rows"] = tuple(PlannedRow(**one) for one in data["rows"])
        fields["runs"] = tuple(
            FinetuneRun(
                pretrained=models[one["pretrained"]],
                task=one["task"],
                config=FinetuneConfig.from_dict(one["config"]),
            )
            for one in data["runs"]
        )
        return Plan(**fields)


def plan(experiment: Experiment, asked: Asked) -> Plan:
    """What a run of the experiment does.

    Models are those of Table 14, trained where they are not there yet. Raises ValueError for rows, data sets and texts
    that the experiment does not have, for options of other kinds of experiments, and where no data set is there.
    """
    asked.refuse(experiment, "model", "batch_size", "steps")
    corpora = some_of(asked.corpora, CORPORA[asked.scale], "corpus", experiment)
    study = STUDIES["table14"]
    rows = chosen(ROWS, asked, experiment, study.base(corpora[0], asked.scale, None))
    by_either = {name.casefold(): task for task, paper in TASKS.items() for name in (task, paper)}
    wanted = [by_either.get(word.casefold(), word) for word in asked.tasks]
    tasks = some_of(wanted, list(TASKS), "task", experiment)
    absent = _absent(tasks, asked)
    left_out = dict.fromkeys((task for task in TASKS if task not in tasks), NOT_ASKED)
    left_out |= dict.fromkeys(absent, "not in the folder of data")
    tasks = tuple(task for task in tasks if task not in absent)
    if not tasks:
        raise ValueError(f"There is no data set. {' '.join(absent.values())}")
    seeds = seeds_of(asked)
    precision = {} if asked.dtype is None else {"precision": asked.dtype}
    return Plan(
        experiment=experiment.name,
        scale=asked.scale,
        rows=tuple(map(planned, rows)),
        corpora=corpora,
        tasks=tasks,
        seeds=seeds,
        runs=tuple(
            FinetuneRun(
                pretrained=row.run(corpus, study.base(corpus, asked.scale, None).replace(**precision), seed),
                task=task,
                config=settings(task, asked.scale).replace(seed=seed, **precision),
            )
            for seed in seeds
            for corpus in corpora
            for row in rows
            for task in tasks
        ),
        data=None if asked.data is None else str(asked.data),
        left_out=left_out,
        device=asked.device,
    )


def _absent(tasks: tuple[str, ...], asked: Asked) -> dict[str, str]:
    """{data set: why it is not there}, of local data that nobody asked for by name."""
    if asked.data is None:
        return {}
    from usmoe.data.labelled import labelled_rows

    absent = {}
    for task in tasks:
        try:
            labelled_rows(task, asked.data, offline=True, text_column=None, label_column=None)
        except ValueError as error:
            if asked.tasks:
                raise
            absent[task] = str(error)
    return absent


def announce(plan: Plan) -> str:
    """A sentence on how much is trained."""
    return (
        f"{number(plan.pretrained, 'model')} of Table 14, trained where they are not there; from each "
        f"{number(plan.tasks, 'classifier')}. What is there already is read; the same command goes on with all of it."
    )
