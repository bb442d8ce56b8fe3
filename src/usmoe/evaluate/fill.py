"""An mteb task that reads a local folder instead of the hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mteb
from datasets import Dataset, DatasetDict, Value
from mteb.abstasks import (
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskClusteringLegacy,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
    AbsTaskSummarization,
)
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

from usmoe.data.local import LocalData
from usmoe.data.rows import read, require_columns

OLD_RERANKING = ("query", "positive", "negative")
"""The columns of reranking sets before mteb 2: one row a query, its documents in lists."""


COLUMNS: Mapping[type[mteb.AbsTask], tuple[str, ...]] = {
    AbsTaskClassification: ("input_column_name", "label_column_name"),
    AbsTaskClustering: ("input_column_name", "label_column_name"),
    AbsTaskClusteringLegacy: ("input_column_name", "label_column_name"),
    AbsTaskPairClassification: ("input1_column_name", "input2_column_name", "label_column_name"),
    AbsTaskSTS: ("column_names", "score"),
    AbsTaskSummarization: (
        "text_column_name",
        "human_summaries_column_name",
        "machine_summaries_column_name",
        "relevancy_column_name",
    ),
}
"""For each type the attributes that name the columns it reads; a name that is no attribute is a column's."""


def fill(task: mteb.AbsTask, local: LocalData) -> mteb.AbsTask:
    """A task like the one given, of a class of its own, that reads the folder when it is evaluated.

    Its metadata name the folder and the revision of its contents in place of the hub's: they are the class's, because
    mteb's `unload_data` drops what an instance says. mteb's own `dataset_transform` follows the reading, so the files
    have the columns of the hub. A retrieval or reranking set has the parts corpus, queries, qrels (or default) and, to
    be reranked, top_ranked, each as a file or as a folder with a file for each split; or one file a split with the old
    columns query, positive and negative. The subset of a multilingual task is a sub-folder: en/test.parquet.

    Raises ValueError where a split is missing; what else is amiss with the data is raised when the task loads them.
    """
    Kind: Any = type(task)

    class Filled(Kind):
        metadata = task.metadata.model_copy(
            update={"dataset": {"path": str(local.folder.resolve()), "revision": local.revision}}
        )

        def load_data(self, num_proc: int | None = None, *, timer: Any = None, **kwargs: Any) -> None:
            if not self.data_loaded:
                _load(self, local, num_proc)

    Filled.__name__ = Filled.__qualname__ = Kind.__name__
    filled = Filled(seed=task.seed)
    filled.filter_eval_splits(task.eval_splits)
    filled.hf_subsets = list(task.hf_subsets)
    if not isinstance(task, AbsTaskRetrieval) and Kind.dataset_transform is mteb.AbsTask.dataset_transform:
        for subset in task.hf_subsets:
            there = _of_subset(task, local, subset)
            for split in _needed(task):
                there.file(split)
    return filled


def _load(task: Any, local: LocalData, num_proc: int | None) -> None:
    retrieval = isinstance(task, AbsTaskRetrieval)
    subsets = {subset: _of_subset(task, local, subset) for subset in task.hf_subsets}
    if retrieval:
        task.dataset = {
            subset: {split: _retrieval(task, there, split) for split in task.eval_splits}
            for subset, there in subsets.items()
        }
    else:
        loaded = {
            subset: DatasetDict({split: read(path) for split, path in there.files.items() if "/" not in split})
            for subset, there in subsets.items()
        }
        task.dataset = loaded if task.metadata.is_multilingual else loaded["default"]
    try:
        task.dataset_transform(num_proc=num_proc)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"{local.folder} is not in the form from which mteb makes {task.metadata.name} ({error}). {local.there} "
            "Give its files the splits and columns of the hub."
        ) from error
    if not retrieval:
        for subset, there in subsets.items():
            splits: Any = task.dataset
            _check(task, splits[subset] if task.metadata.is_multilingual else splits, there)
    if isinstance(task, AbsTaskClassification):
        of_subsets: Any = task.dataset if task.metadata.is_multilingual else {"default": task.dataset}
        numbered = {subset: _numbered(task, splits) for subset, splits in of_subsets.items()}
        filled: Any = numbered if task.metadata.is_multilingual else numbered["default"]
        task.dataset = filled
    task.data_loaded = True


def _numbered(task: Any, splits: Mapping[str, Dataset]) -> DatasetDict:
    """The splits with their classes as numbers, in the order of the classes: of two that are words, scikit-learn does
    not know which is the positive one, nor of 2 and 3. 0, 1, ... stay as they are, and so do lists of classes."""
    name, needed = task.label_column_name, _needed(task)
    labels = [label for split in needed for label in splits[split][name]]
    if any(isinstance(label, list) for label in labels):
        return _together(splits)
    classes = set(labels)
    if classes == set(range(len(classes))) and not any(isinstance(label, bool) for label in classes):
        return _together(splits)
    places = {label: place for place, label in enumerate(sorted(classes))}

    def renamed(rows: Dataset) -> Dataset:
        numbers = [places.get(label) for label in rows[name]]
        return rows.remove_columns(name).add_column(name, numbers)  # pyright: ignore[reportCallIssue]

    return _together({split: renamed(rows) if split in needed else rows for split, rows in splits.items()})


def _together(splits: Mapping[str, Dataset]) -> DatasetDict:
    named: dict[Any, Dataset] = dict(splits)
    return DatasetDict(named)


def _needed(task: Any) -> list[str]:
    """The splits that an evaluation reads."""
    train = [task.train_split] if isinstance(task, AbsTaskClassification) else []
    return list(dict.fromkeys([*task.eval_splits, *train]))


def _of_subset(task: Any, local: LocalData, subset: str) -> LocalData:
    """The files of a subset of a multilingual task: those of its sub-folder, or all where there is none and the task
    has one subset alone."""
    inside = {key.removeprefix(f"{subset}/"): path for key, path in local.files.items() if key.startswith(f"{subset}/")}
    if not task.metadata.is_multilingual or (not inside and len(task.hf_subsets) == 1):
        return local
    if not inside:
        raise ValueError(f"{local.folder} has no sub-folder {subset}, which {task.metadata.name} needs. {local.there}")
    return LocalData(folder=local.folder, manifest=local.manifest, files=inside)


def _check(task: Any, splits: Mapping[str, Dataset], local: LocalData) -> None:
    """That the splits and columns which the evaluation reads are there, after mteb's own transformation."""
    for split in _needed(task):
        if split not in splits:
            local.file(split)
            raise ValueError(f"mteb's transformation of {local.folder} for {task.metadata.name} left no split {split}.")
        require_columns(splits[split], columns(task), local.files.get(split, local.folder))
        if not len(splits[split]):
            raise ValueError(f"{local.files.get(split, local.folder)} has no rows. Give it some.")
        for name in columns(task):
            if None in (values := list(splits[split][name])):
                place = local.files.get(split, local.folder)
                raise ValueError(
                    f"Row {values.index(None) + 1:,} of {place} has no {name}. Give it one, or leave it out."
                )


def columns(task: Any) -> list[str]:
    """The columns that the evaluation of a task reads; none are known for types that `COLUMNS` lacks."""
    names = [name for kind, names in COLUMNS.items() if isinstance(task, kind) for name in names]
    values = [getattr(task, name, name) for name in names]
    return [one for value in values for one in ([value] if isinstance(value, str) else value)]


def _retrieval(task: Any, local: LocalData, split: str) -> RetrievalSplitData:
    if "corpus" not in {key.partition("/")[0] for key in local.files} and split in local.files:
        return _old_reranking(local, split)
    corpus = _texts(local, "corpus", split, ["title", "text"])
    queries = _texts(local, "queries", split, ["text", "instruction"])
    relevant = _relevant(local, split)
    asked = [n for n, query in enumerate(queries["id"]) if query in relevant]
    documents = set(corpus["id"])
    if not asked or not any(documents & judged.keys() for judged in relevant.values()):
        raise ValueError(
            f"The ids of {local.folder} do not meet: qrels judge no query of queries, or no document of corpus. Give "
            "query-id and corpus-id the ids that stand there."
        )
    top = _top_ranked(local, split, documents)
    if top is None and task.metadata.type == "Reranking":
        raise ValueError(
            f"{local.folder} has no top_ranked, the documents to rerank for each query, which {task.metadata.name} "
            f"needs. {local.there}"
        )
    return RetrievalSplitData(corpus=corpus, queries=queries.select(asked), relevant_docs=relevant, top_ranked=top)


def _part(local: LocalData, names: tuple[str, ...], split: str) -> str | None:
    """The key of a part's file for a split: corpus/test, else corpus, else the one file in corpus/."""
    for name in names:
        for key in (f"{name}/{split}", name):
            if key in local.files:
                return key
        inside = [key for key in local.files if key.startswith(f"{name}/")]
        if len(inside) == 1:
            return inside[0]
    return None


def _texts(local: LocalData, part: str, split: str, kept: list[str]) -> Dataset:
    """Ids and texts of the corpus or of the queries; a missing title or instruction is empty."""
    path = local.file(_part(local, (part,), split) or part)
    rows = read(path)
    if "_id" in rows.column_names and "id" not in rows.column_names:
        rows = rows.rename_column("_id", "id")
    require_columns(rows, ["id", "text"], path)
    found = {name: [value or "" for value in rows[name]] for name in kept if name in rows.column_names}
    return Dataset.from_dict({"id": list(map(str, rows["id"])), **found})


def _relevant(local: LocalData, split: str) -> dict[str, dict[str, int]]:
    path = local.file(_part(local, ("qrels", "default", split), split) or "qrels")
    rows = read(path)
    require_columns(rows, ["query-id", "corpus-id", "score"], path)
    relevant: dict[str, dict[str, int]] = {}
    for query, document, score in zip(rows["query-id"], rows["corpus-id"], rows["score"], strict=True):
        relevant.setdefault(str(query), {})[str(document)] = int(score)
    return relevant


def _top_ranked(local: LocalData, split: str, documents: set[str]) -> dict[str, list[str]] | None:
    key = _part(local, ("top_ranked",), split)
    if key is None:
        return None
    rows = read(local.files[key])
    require_columns(rows, ["query-id", "corpus-ids"], local.files[key])
    rows = rows.cast_column("query-id", Value("string"))
    top = {query: list(map(str, ids)) for query, ids in zip(rows["query-id"], rows["corpus-ids"], strict=True)}
    unknown = next((one for ids in top.values() for one in ids if one not in documents), None)
    if unknown is not None:
        raise ValueError(f"{local.files[key]} ranks the document {unknown!r}, which the corpus does not have. Add it.")
    return top


def _old_reranking(local: LocalData, split: str) -> RetrievalSplitData:
    """One row a query, as in mteb 1: each query has documents of its own, and their ids put the relevant ones first,
    which decides ties as mteb does. A query without relevant or without other documents is left out, as there."""
    path = local.files[split]
    rows = read(path)
    require_columns(rows, OLD_RERANKING, path)
    corpus: dict[str, str] = {}
    queries: dict[str, str] = {}
    relevant: dict[str, dict[str, int]] = {}
    for n, (query, positive, negative) in enumerate(zip(*(rows[name] for name in OLD_RERANKING), strict=True)):
        if positive and negative:
            ids = [f"q{n}-d{m:05d}" for m in range(len(positive) + len(negative))]
            corpus |= dict(zip(ids, [*positive, *negative], strict=True))
            relevant[f"q{n}"] = {one: int(m < len(positive)) for m, one in enumerate(ids)}
            queries[f"q{n}"] = query
    if not queries:
        raise ValueError(f"{path} has no query with both positive and negative documents. Give it some.")
    return RetrievalSplitData(
        corpus=Dataset.from_dict({"id": list(corpus), "text": list(corpus.values())}),
        queries=Dataset.from_dict({"id": list(queries), "text": list(queries.values())}),
        relevant_docs=relevant,
        top_ranked={query: list(judged) for query, judged in relevant.items()},
    )
