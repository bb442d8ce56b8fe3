"""What one run of an experiment does: models, tasks, settings and precision, saved whole beside its result."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usmoe.reproduce.embeddings.study import CHECKPOINTS, STUDIES, TASKS, Checkpoint, Prompt, Study, setting_of
from usmoe.reproduce.experiment import Experiment, Scale
from usmoe.reproduce.given import given
from usmoe.reproduce.kind import NOT_ASKED, words

if TYPE_CHECKING:
    from usmoe.evaluate.setting import Setting

SHIPPED = "shipped"
"""The model that comes with usmoe."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of one model's figures."""

    model: str
    """A folder, a hub id, or "shipped"."""
    prompt: Prompt
    """In the paper's words."""
    label: str
    paper: str | None
    """The paper's column beside it."""
    setting: Setting


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run of an experiment, as it is saved."""

    experiment: str
    """As typed: table5."""
    scale: Scale
    models: tuple[str, ...]
    tasks: tuple[str, ...]
    """mteb's names."""
    columns: tuple[Column, ...]
    data: str | None = None
    """The folder in place of the hub."""
    cuts: Mapping[str, str] = field(default_factory=dict)
    """Of a task's local data: what its manifest says of how it was cut."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Tasks of the paper's table that are not run, and why."""
    batch_size: int = 32
    """Texts."""
    seed: int = 0
    """Of the bootstrap; mteb keeps its own seeds, so that scores are comparable."""
    device: str = "cpu"
    dtype: str = "float32"
    quantize: str | None = None
    """The experts' weights: nf4 | fp4; None: as loaded."""

    @property
    def parts(self) -> int:
        """How many scores the run asks for: columns of one setting share theirs."""
        return len({(one.model, one.setting) for one in self.columns}) * len(self.tasks)

    @property
    def study(self) -> Study:
        """The experiment's columns and rows."""
        return STUDIES[self.experiment]

    def to_dict(self) -> dict[str, Any]:
        """As JSON; a column's setting whole."""
        return dataclasses.asdict(self)

    def basis(self) -> dict[str, Any]:
        """Models, tasks, settings, precision, and how local data are cut."""
        columns = [[one.model, one.prompt, given(one.setting)] for one in self.columns]
        names = ("models", "tasks", "batch_size", "seed", "dtype", "quantize")
        return {name: getattr(self, name) for name in names} | {"columns": columns, "cuts": dict(self.cuts)}

    def options(self) -> tuple[str, ...]:
        """--model, --tasks, --batch-size, --seed and --dtype where they are given."""
        own, size, dtype = _own(self.study, self.scale)
        return words(
            model=None if self.models == own else self.models,
            tasks=self.tasks if NOT_ASKED in self.left_out.values() else None,
            batch_size=None if self.batch_size == size else self.batch_size,
            seed=self.seed or None,
            dtype=None if self.dtype == dtype else self.dtype,
        )

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Plan:
        """What `to_dict` made."""
        from usmoe.evaluate.setting import Setting

        columns = tuple(Column(**(one | {"setting": Setting(**one["setting"])})) for one in data["columns"])
        fields: dict[str, Any] = dict(data)
        fields |= {"models": tuple(data["models"]), "tasks": tuple(data["tasks"]), "columns": columns}
        return Plan(**fields)


def plan(
    experiment: Experiment,
    scale: Scale,
    *,
    model: str | None = None,
    data: Path | None = None,
    tasks: Sequence[str] = (),
    batch_size: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: str | None = None,
) -> Plan:
    """What a run of the experiment does.

    scale       paper: the paper's checkpoints with their experts in 4 bits, batches of 128, all tasks of the table.
                small: the model that ships with usmoe, and those of the tasks for which `data` holds local data
    model       one model in place of the scale's own: a folder, a hub id, or "shipped"
    tasks       some of the table's tasks, by mteb's name or the paper's
    batch_size  None: 128 at paper scale, else 32
    dtype       None: bfloat16 at paper scale, else float32

    Raises ValueError for an experiment that is not built, a task that the table does not have, and at small scale
    where neither `data` nor `tasks` is given, or no data stand for any task.
    """
    study = STUDIES[experiment.name]
    released = scale == "paper"
    wanted = _tasks(tasks, study, experiment.name)
    left_out = dict.fromkeys((name for name in study.tasks if name not in wanted), NOT_ASKED)
    cuts: dict[str, str] = {}
    if not released and data is None and not tasks:
        raise ValueError(
            "At small scale the tasks are those whose data lie in a folder. Give --data DIR, or --tasks NAME for data "
            "of the hub; --show prints what was run before."
        )
    if data is not None:
        cuts, absent = local_tasks(wanted, data)
        if not cuts or (tasks and absent):
            raise ValueError(f"{data} lacks data. {' '.join(absent.values())}")
        left_out |= absent
        wanted = tuple(name for name in wanted if name in cuts)
    own, own_size, own_dtype = _own(study, scale)
    models = own if model is None else (model,)
    return Plan(
        experiment=experiment.name,
        scale=scale,
        models=models,
        tasks=wanted,
        columns=tuple(column for one in models for column in columns(study, one, scale)),
        data=None if data is None else str(data),
        cuts=cuts,
        left_out=left_out,
        batch_size=batch_size or own_size,
        seed=seed,
        device=device,
        dtype=dtype or own_dtype,
        quantize="nf4" if released else None,
    )


def _own(study: Study, scale: Scale) -> tuple[tuple[str, ...], int, str]:
    """Models, batch size and dtype of a scale."""
    if scale == "paper":
        return tuple(one.hub for one in study.models), 128, "bfloat16"
    return (SHIPPED,), 32, "float32"


def columns(study: Study, model: str, scale: Scale) -> tuple[Column, ...]:
    """The columns of one model: every method, without and with prompts as the study has them."""
    checkpoint: Checkpoint | None = CHECKPOINTS.get(model)
    features = "logits" if checkpoint is None else checkpoint.features
    return tuple(
        Column(
            model=model,
            prompt=prompt,
            label=method.label,
            paper=method.paper,
            setting=setting_of(method, prompt, scale, features),
        )
        for prompt in study.prompts
        for method in study.methods
    )


def local_tasks(names: Sequence[str], data: Path) -> tuple[dict[str, str], dict[str, str]]:
    """{task: how its local data are cut} where a folder has data for it, and {task: why not} for the others."""
    from usmoe.data.local import manifest, sets
    from usmoe.evaluate.tasks import find_tasks

    sets(data)  # says where there is no such folder
    cuts, absent = {}, {}
    for name in names:
        try:
            (task,) = find_tasks([name], data=data)
        except ValueError as error:
            absent[name] = str(error)
        else:
            cuts[name] = str(manifest(Path(task.metadata.dataset["path"])).get("cut", "not said"))
    return cuts, absent


def _tasks(given: Sequence[str], study: Study, experiment: str) -> tuple[str, ...]:
    """The study's tasks, or those of them that are given by mteb's name or the paper's, in the table's order."""
    if not given:
        return study.tasks
    chosen = set()
    for word in given:
        found = [name for name in study.tasks if word.casefold() in (name.casefold(), TASKS[name][1].casefold())]
        if not found:
            near = difflib.get_close_matches(word, [*study.tasks, *(TASKS[name][1] for name in study.tasks)], 1)
            raise ValueError(
                f"{experiment} has no task {word!r}."
                + (f" Did you mean {near[0]}?" if near else "")
                + f" It has: {', '.join(study.tasks)}."
            )
        chosen.update(found)
    return tuple(name for name in study.tasks if name in chosen)


def downloads(plan: Plan) -> str:
    """A sentence on what a run fetches from the hub and how large it is; empty where it fetches nothing it knows of."""
    known = [CHECKPOINTS[name] for name in plan.models if name in CHECKPOINTS]
    parts = [f"{one.hub} ({one.parameters / 1e9:.3g} B parameters, {one.bytes / 1e9:.1f} GB)" for one in known]
    parts += [f"the data of {len(plan.tasks)} MTEB tasks"] if plan.data is None else []
    if not parts:
        return ""
    total = sum(one.bytes for one in known) / 1e9
    whole = f" In all {total:.1f} GB of weights, in bfloat16." if len(known) > 1 else ""
    return f"From the hub, where it is not on this machine yet: {'; '.join(parts)}.{whole}"
