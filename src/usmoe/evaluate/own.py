"""Tasks that mteb does not know: a folder whose manifest.json says how it is scored becomes a task of mteb's own kind.

{"mteb": {"name": "MyRetrieval", "type": "Retrieval"}}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTaskClassification,
    AbsTaskClusteringLegacy,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
    AbsTaskSummarization,
)
from mteb.abstasks.task_metadata import TaskMetadata

from usmoe.data.local import at, manifest, sets
from usmoe.evaluate.fill import fill


class _Clustering(AbsTaskClusteringLegacy):
    """Rows of lists are sets of texts, each clustered by itself; rows of one text each are one set."""

    def dataset_transform(self, num_proc: int | None = None, **kwargs: Any) -> None:
        names, splits = (self.input_column_name, self.label_column_name), dict(self.dataset or {})
        folded: Any = DatasetDict({str(split): _one_set(rows, names) for split, rows in splits.items()})
        self.dataset = folded


def _one_set(rows: Any, names: tuple[str, str]) -> Dataset:
    flat = all(name in rows.column_names for name in names) and not isinstance(rows[0][names[1]], list)
    return Dataset.from_dict({name: [list(rows[name])] for name in names}) if flat else rows


TYPES: Mapping[str, tuple[type[mteb.AbsTask], str]] = {
    "Classification": (AbsTaskClassification, "accuracy"),
    "Clustering": (_Clustering, "v_measure"),
    "PairClassification": (AbsTaskPairClassification, "max_ap"),
    "Reranking": (AbsTaskRetrieval, "map_at_1000"),
    "Retrieval": (AbsTaskRetrieval, "ndcg_at_10"),
    "STS": (AbsTaskSTS, "cosine_spearman"),
    "Summarization": (AbsTaskSummarization, "cosine_spearman"),
}
"""The types of tasks, and the main score of each where the manifest names none."""

_CATEGORY = {"Classification": "t2c", "Clustering": "t2c"}
_FIELDS = ("name", "type", "main_score", "description", "prompt", "eval_splits", "min_score", "max_score")


def own_tasks(data: Path) -> dict[str, Path]:
    """The folders in `data` that say how mteb should score them, by the name of the task.

    Raises ValueError where two have one name."""
    found: dict[str, Path] = {}
    for folder in sets(data):
        if (said := manifest(folder).get("mteb")) is not None:
            name = _checked(said, folder)["name"]
            if name in found:
                raise ValueError(f"{found[name]} and {folder} both call their task {name}. Give one another name.")
            found[name] = folder
    return found


def own_task(folder: Path) -> mteb.AbsTask:
    """A task of mteb's kind from a folder whose manifest.json has an "mteb" block.

    name, type     what the task is called, and which of `TYPES` it is; its files have the columns of such tasks
    main_score     mteb's name of the score that counts; by default that of the type
    eval_splits    by default ["test"]; a Classification also needs "train"
    min_score, max_score  the scale of the human scores of STS and Summarization, by default 0 and 5
    description, prompt   as in mteb's metadata

    Texts count as English. Raises ValueError for a block that says something else.
    """
    local = at(folder)
    said = _checked(local.manifest["mteb"], folder)
    kind, main_score = TYPES[said["type"]]
    Kind: Any = kind

    class Own(Kind):
        metadata = TaskMetadata(
            name=said["name"],
            description=said.get("description", f"{said['type']} on the data of {folder.resolve().name}."),
            type=said["type"],
            category=_CATEGORY.get(said["type"], "t2t"),  # pyright: ignore[reportArgumentType]
            prompt=said.get("prompt"),
            dataset={"path": str(folder.resolve()), "revision": local.revision},
            eval_splits=list(said.get("eval_splits", ["test"])),
            eval_langs=["eng-Latn"],
            main_score=said.get("main_score", main_score),
        )

    if said["type"] in ("STS", "Summarization"):
        Own.min_score, Own.max_score = said.get("min_score", 0), said.get("max_score", 5)
    Own.__name__ = Own.__qualname__ = said["name"]
    return fill(Own(), local)


def _checked(said: Any, folder: Path) -> Mapping[str, Any]:
    """The "mteb" block of a manifest; raises ValueError where something in it cannot be."""
    where = f"'mteb' in {folder / 'manifest.json'}"
    if not isinstance(said, dict) or not {"name", "type"} <= said.keys():
        raise ValueError(f'{where} names no task. Write {{"name": "MyRetrieval", "type": "Retrieval"}}.')
    if unknown := sorted(said.keys() - set(_FIELDS)):
        raise ValueError(f"{where} has the unknown field {unknown[0]!r}. Known: {', '.join(_FIELDS)}.")
    if said["type"] not in TYPES:
        raise ValueError(f"{where} has the unknown type {said['type']!r}. Choose one of: {', '.join(TYPES)}.")
    if not isinstance(said["name"], str) or not re.fullmatch(r"\w[\w.-]*", said["name"]):
        raise ValueError(f"{where} has the name {said['name']!r}. Use letters, digits, '.', '_' and '-' alone.")
    return said
