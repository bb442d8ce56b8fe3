"""Which of lm-eval's tasks are meant, and the data they are made of: the hub's, or a folder's in its place."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval.tasks
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.config.group import GroupConfig
from lm_eval.tasks import TaskManager

from usmoe.data.local import LocalData, at, find
from usmoe.data.rows import read

Entry = Any
"""What lm-eval's index knows of a task, a group or a tag: its name, its kind, its file, and its settings."""

_SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")
"""The settings that name a split. A task is scored on the first that is given."""

_OF_A_GROUP = {"group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag"}
"""What a group's file says of the group; all else goes to its tasks."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LanguageTask:
    """One of lm-eval's tasks, not yet loaded."""

    name: str
    entry: Entry
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Settings that a group gives it."""
    local: LocalData | None = None
    """The folder that stands in for the hub; None: the hub."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """In that folder, the file of each split that the task names."""

    @property
    def settings(self) -> dict[str, Any]:
        """As in its file, functions by name."""
        return {**(self.entry.cfg or {}), **self.changes}

    @property
    def hub(self) -> str | None:
        """The data set on the hub: allenai/ai2_arc:ARC-Challenge. None for a task that says it in code."""
        path, name = self.settings.get("dataset_path"), self.settings.get("dataset_name")
        return path and (f"{path}:{name}" if name else str(path))

    @property
    def version(self) -> str | None:
        """As lm-eval counts it."""
        said = self.settings.get("metadata") or {}
        return str(said["version"]) if "version" in said else None

    @property
    def generates(self) -> bool:
        """Whether the model is to write text, as far as the task's file says."""
        return "class" not in self.settings and self.settings.get("output_type", "generate_until") == "generate_until"

    @property
    def digest(self) -> str:
        """Of its settings: a task of the user's own may change without a new version."""
        said = json.dumps(self.settings, sort_keys=True, default=str)
        if self.entry.yaml_path is not None:
            said = said.replace(str(self.entry.yaml_path.parent), ".")
        return hashlib.sha256(said.encode()).hexdigest()[:12]

    def num_fewshot(self, asked: int | None) -> int:
        """How many solved examples stand before each question: as many as are asked for, None for the task's own.

        Raises ValueError where the task is made for none, and where its examples are not in the folder."""
        own = self.settings.get("num_fewshot")
        shots = own or 0 if asked is None else asked
        if shots and own == 0:
            raise ValueError(f"{self.name} is a task without examples, but {shots} were asked for. Ask for 0.")
        source = next((self.settings[one] for one in reversed(_SPLITS) if self.settings.get(one)), None)
        if shots and self.local is not None and source not in self.files:
            raise ValueError(
                f"{self.name} takes its {shots} examples from the split {source!r}, and {self.local.folder} has none. "
                f"{self.local.there} Ask for 0 examples, or add the file."
            )
        return shots

    def load(self, shots: int) -> Task:
        """lm-eval's own task, its data read. Raises ValueError, in one sentence, where that fails for any reason."""
        manager = TaskManager(include_defaults=False)
        manager.task_index[self.name] = self.entry
        changes = {**self.changes, **self._local_settings(), "task": self.name}
        try:
            # a task of a group, since that is where lm-eval lets a task be named and changed at once
            task = manager.load([{"group": "usmoe", "task": [changes]}])["tasks"][self.name]
        except Exception as error:  # the hub, datasets, a template, or code of the task's own: its data is the matter
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise ValueError(f"{self._no_data}: {reason}. {self._what_to_do}") from error
        for unfit, why in (("UNSAFE_CODE", _RUNS_CODE), ("MULTIMODAL", _NO_TEXT)):
            if getattr(task, unfit, False):
                raise ValueError(f"{self.name} {why}")
        task.set_config("num_fewshot", shots)
        return task

    @property
    def _no_data(self) -> str:
        where = f"{self.hub or 'its data set'} of the hub" if self.local is None else str(self.local.folder)
        return f"{self.name} cannot be made from {where}"

    @property
    def _what_to_do(self) -> str:
        if self.local is not None:
            return f"Give the files the columns that {self.hub} has on the hub."
        return f"Give a folder that holds {self.hub or 'it'} (--data DIR), or a connection to the hub."

    def _local_settings(self) -> dict[str, Any]:
        if self.local is None:
            return {}
        files = self.files

        def rows(**_: Any) -> dict[str, Any]:
            return {split: read(path) for split, path in files.items()}

        missing = [name for name in _SPLITS if self.settings.get(name) not in files]
        return {"custom_dataset": rows, "dataset_kwargs": None, **dict.fromkeys(missing)}


_READERS = ("arrow", "csv", "json", "parquet", "text")
"""A task file that names one of these as its data set says in which files it lies."""

_RUNS_CODE = "runs code that the model writes, which usmoe does not. Leave it out."
_NO_TEXT = "is a task on images or sound. Choose tasks on text alone, such as arc_challenge."


@dataclass(frozen=True, kw_only=True, eq=False)
class LanguageGroup:
    """Several tasks with a score of their own, their mean: mmlu, say."""

    config: GroupConfig
    tasks: list[str]

    def aggregate(self, metrics: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The group's metrics from those of its tasks, as lm-eval takes them together."""
        group = Group.from_config(self.config)
        # it asks its tasks for their names alone
        group.get_all_tasks = lambda recursive=True: [SimpleNamespace(task_name=name) for name in self.tasks]  # pyright: ignore
        return dict(group.aggregate(metrics))  # pyright: ignore


def find_language_tasks(
    names: Sequence[str], *, data: Path | None = None, include: Path | None = None
) -> tuple[list[LanguageTask], list[LanguageGroup]]:
    """lm-eval's tasks of these names, each once, and those of the groups named (and of the groups in them) that have a
    score. A group or a tag stands for its tasks.

    data     a data set's folder, or a folder of them, in place of the hub (usmoe.data.local.find)
    include  a folder with task files (YAML) of one's own; one of a name that lm-eval knows takes its place. The Python
             functions that such a file names are run

    Raises ValueError for an unknown name, with the nearest ones; for a task on images or sound, and for one that runs
    what the model writes; and where `data` has nothing for a task, or not the split that it is scored on.
    """
    if include is not None and not (include.is_dir() and any(include.glob("**/*.yaml"))):
        raise ValueError(f"{include} is no folder with task files. Give one that holds .yaml files, as lm-eval's.")
    if not names:
        raise ValueError("No task is named. Name one at least, such as arc_challenge.")
    index = _Index(include)
    tasks: dict[str, LanguageTask] = {}
    groups: list[LanguageGroup] = []
    for name in dict.fromkeys(names):
        for found in _members(name, {}, index, groups):
            known = tasks.setdefault(found.name, found)
            if known.changes != found.changes:
                raise ValueError(f"{found.name} is asked for twice, with different settings. Name one of its groups.")
    _refuse_unfit(tasks.values())
    if data is not None:
        tasks = {name: _from_folder(task, data) for name, task in tasks.items()}
        _refuse_shared_files(list(tasks.values()))
    return list(tasks.values()), list({group.config.group: group for group in groups}.values())


class _Index:
    """Entries by name: those of a folder of the user's first, then lm-eval's own."""

    def __init__(self, include: Path | None) -> None:
        self._own = TaskManager(include_path=include, include_defaults=False).task_index if include else {}
        self._all: dict[str, Entry] | None = None

    def __getitem__(self, name: str) -> Entry:
        entry = self._own.get(name)
        if entry is None and self._all is None:
            entry = _declared(name)
        if entry is None:
            self._all = _shipped()
            entry = self._all.get(name)
        if entry is None:
            near = difflib.get_close_matches(name, [*self._own, *_shipped()], n=4)
            hint = f"Did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists them."
            raise ValueError(f"There is no task {name!r}. {hint}")
        return entry


@functools.cache
def _declared(name: str) -> Entry | None:
    """The entry of the one file of lm-eval's that says `task: name`; None for tags and groups, whose members are all
    over, and where several files say so."""
    says = re.compile(rf"""^["']?task["']?\s*:\s*["']?{re.escape(name)}["']?\s*$""", re.MULTILINE)
    files = Path(lm_eval.tasks.__file__).parent.glob("**/*.yaml")
    found = [file for file in files if says.search(file.read_text(encoding="utf-8", errors="ignore"))]
    if len(found) != 1:
        return None
    entry = TaskManager(include_path=found[0].parent, include_defaults=False).task_index.get(name)
    return entry if entry is not None and entry.yaml_path == found[0] else None


@functools.cache
def _shipped() -> dict[str, Entry]:
    """All fourteen thousand, which takes seconds."""
    return TaskManager().task_index


def _members(
    name: str, changes: Mapping[str, Any], index: _Index, groups: list[LanguageGroup]
) -> Iterator[LanguageTask]:
    """The tasks that a name stands for; the groups on the way are added to `groups`."""
    entry = index[name]
    kind = entry.kind.name
    if kind == "TAG":
        for one in sorted(entry.tags):
            yield from _members(one, changes, index, groups)
    elif kind == "GROUP":
        yield from _of_group(name, entry.cfg, changes, index, groups)
    else:
        yield LanguageTask(name=name, entry=entry, changes=changes)


def _of_group(
    name: str, config: Mapping[str, Any], changes: Mapping[str, Any], index: _Index, groups: list[LanguageGroup]
) -> Iterator[LanguageTask]:
    changes = {**{key: value for key, value in config.items() if key not in _OF_A_GROUP}, **changes}
    members, place = config.get("task") or [], len(groups)
    found: list[LanguageTask] = []
    for one in [members] if isinstance(members, str) else members:
        said = {"task": one} if isinstance(one, str) else dict(one)
        if isinstance(said.get("task"), list):  # a group within the file of a group
            found += _of_group(f"{name}::{said['group']}", said, changes, index, groups)
        else:
            inner = said.pop("group", None) or said.pop("task")
            found += _members(inner, {**changes, **said}, index, groups)
    settings = {key: value for key, value in config.items() if key in _OF_A_GROUP - {"tag"}}
    if settings.get("aggregate_metric_list"):
        tasks = [task.name for task in found]
        whole = LanguageGroup(config=GroupConfig(**{**settings, "group": name}), tasks=tasks)
        groups.insert(place, whole)  # before its parts
    yield from found


def _refuse_unfit(tasks: Any) -> None:
    for task in tasks:
        if task.settings.get("unsafe_code"):
            raise ValueError(f"{task.name} {_RUNS_CODE}")
        if task.settings.get("doc_to_image") or task.settings.get("doc_to_audio"):
            raise ValueError(f"{task.name} {_NO_TEXT}")


def _from_folder(task: LanguageTask, data: Path) -> LanguageTask:
    """The task with the folder, and the files of its splits there."""
    if task.settings.get("dataset_path") in _READERS:
        return task
    if task.hub is None or "class" in task.settings:
        raise ValueError(f"{task.name} reads its data by code of its own, not from a folder. Leave it or --data out.")
    path, _, name = task.hub.partition(":")
    local = _snapshot(data, path, name) or find(data, task.hub)
    files = local.files
    inside = {split.removeprefix(f"{name}/"): file for split, file in files.items() if split.startswith(f"{name}/")}
    files = inside if name and inside else files
    named = [task.settings[one] for one in _SPLITS if task.settings.get(one)]
    if named and named[0] not in files:
        raise ValueError(
            f"{task.name} is scored on the split {named[0]!r} of {task.hub}, and {local.folder} does not hold it. "
            f"{local.there}"
        )
    return LanguageTask(
        name=task.name,
        entry=task.entry,
        changes=task.changes,
        local=local,
        files={split: files[split] for split in named if split in files},
    )


def _snapshot(data: Path, path: str, name: str) -> LocalData | None:
    """A configuration's folder in a data set as it lies on the hub: ai2_arc/ARC-Challenge."""
    repository = path.rpartition("/")[2]
    places = [data.resolve(), data.resolve() / repository] if name else []
    found = [place / name for place in places if place.name.casefold() == repository.casefold()]
    return next((at(place) for place in found if place.is_dir() and at(place).files), None)


def _refuse_shared_files(tasks: Sequence[LanguageTask]) -> None:
    """Two configurations of a set are not one: ARC-Easy is not scored on ARC-Challenge's questions."""
    owners: dict[Path, LanguageTask] = {}
    for task in tasks:
        for file in task.files.values():
            other = owners.setdefault(file, task)
            if other.hub != task.hub:
                raise ValueError(
                    f"{file} would serve both {other.hub} and {task.hub}, which are not the same. Give each a folder, "
                    f'and name it in its manifest.json: "hub": "{task.hub}".'
                )
