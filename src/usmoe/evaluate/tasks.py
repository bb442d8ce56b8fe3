"""Which tasks to score: mteb's by name, the paper's nineteen, and a folder's own."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import mteb
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.get_tasks import TASK_LIST

from usmoe.data.local import find
from usmoe.evaluate.fill import fill
from usmoe.evaluate.own import own_task, own_tasks

PAPER: dict[str, tuple[str, ...]] = {
    "Classification": (
        "EmotionClassification",
        "ToxicConversationsClassification",
        "TweetSentimentExtractionClassification",
    ),
    "Clustering": ("MedrxivClusteringS2S", "TwentyNewsgroupsClustering"),
    "PairClassification": ("TwitterSemEval2015", "TwitterURLCorpus"),
    "Reranking": ("AskUbuntuDupQuestions", "SciDocsRR", "StackOverflowDupQuestions"),
    "STS": ("STS12", "STS13", "STS14", "STS15", "STS16", "BIOSSES", "SICK-R", "STSBenchmark"),
    "Summarization": ("SummEval",),
}
"""The paper's nineteen tasks by type. Its "Medrxiv" under summarization is SummEval."""


def find_tasks(names: Sequence[str], *, data: Path | None = None) -> list[mteb.AbsTask]:
    """mteb's tasks of these names, in their order, each once.

    names  as mteb spells them; "paper" stands for the nineteen of `PAPER`; also the names that folders of `data` give
           to tasks of their own (`own_task`)
    data   a data set's folder, or a folder of them, in place of the hub, read when a task is evaluated

    A task in several languages keeps its subsets that are English alone (STS22: en, not de-en), else those with
    English in them; one without any keeps all.

    Raises ValueError for an unknown name, with the nearest ones; for a task on images, sound or video; and where
    `data` has nothing for a task, or lacks one of its splits.
    """
    wanted = dict.fromkeys(one for name in names for one in (_paper() if name == "paper" else (name,)))
    own = own_tasks(data) if data is not None else {}
    known = {task.metadata.name for task in TASK_LIST}
    for name in own.keys() & known:
        raise ValueError(f"{own[name]} calls its task {name}, which is one of mteb's. Give it another name.")
    return [own_task(own[name]) if name in own else _task(name, known | own.keys(), data) for name in wanted]


def _paper() -> tuple[str, ...]:
    return tuple(name for names in PAPER.values() for name in names)


def _task(name: str, known: set[str], data: Path | None) -> mteb.AbsTask:
    if name not in known:
        raise ValueError(f"There is no task {name!r}. {_nearest(name, known)}")
    task = mteb.get_task(name)
    if set(task.metadata.modalities) != {"text"}:
        raise ValueError(
            f"{name} is a task on {' and '.join(task.metadata.modalities)}. Choose tasks on text alone, such as STS12."
        )
    _english(task)
    if data is None:
        return task
    if isinstance(task, AbsTaskAggregate):
        parts = ", ".join(part.metadata.name for part in task.metadata.tasks)
        raise ValueError(f"{name} is made of other tasks, and a folder serves one. Name these instead: {parts}.")
    source = task.metadata.dataset
    hub = f"{source['path']}:{source['name']}" if "name" in source else source["path"]
    return fill(task, find(data, hub))


def _english(task: mteb.AbsTask) -> None:
    """Keep the subsets that are English alone, else those with English in them, else all."""
    languages = task.metadata.hf_subsets_to_langscripts
    codes = {subset: {language.partition("-")[0] for language in said} for subset, said in languages.items()}
    alone = [subset for subset, said in codes.items() if said == {"eng"}]
    task.hf_subsets = alone or [subset for subset, said in codes.items() if "eng" in said] or list(codes)


def _nearest(name: str, known: set[str]) -> str:
    folded = {one.casefold(): one for one in known | {"paper"}}
    near = difflib.get_close_matches(name.casefold(), folded, n=3)
    listed = ", ".join(folded[one] for one in near)
    return (
        f"Did you mean {listed}?" if near else "mteb.get_tasks() lists them; 'paper' stands for the paper's nineteen."
    )
