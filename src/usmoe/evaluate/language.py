"""Zero-shot language tasks by lm-eval, under any router, each answer scored honestly unless asked otherwise.

    scores = language_tasks(model, tokenizer, ["arc_challenge"], data=Path("data"))
    with usmoe.patched(model, usmoe.USMoE(alpha=0.5)): language_tasks(...)

The tasks, their prompts and their metrics are lm-eval's; what a token's likelihood is, is ours (usmoe.hf.continuation).
"""

from __future__ import annotations

import contextlib
import functools
import numbers
import os
import random
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.api.task
import numpy as np
import torch
from lm_eval.api.task import Task
from tqdm import tqdm

from usmoe.evaluate.language_data import LanguageGroup, LanguageTask, find_language_tasks
from usmoe.evaluate.language_model import LanguageModel, cannot_generate, without_notes
from usmoe.hf.continuation import Scoring, looks_ahead

RESAMPLES = 1000
"""Of the bootstrap by which lm-eval finds the standard error of a metric that is no mean."""


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """What a model reaches in one metric of one task."""

    task: str
    alias: str
    """How lm-eval prints it."""
    metric: str
    """In lm-eval's words: acc, acc_norm, word_perplexity, ..."""
    filter: str
    """What lm-eval does to the answers before it counts them; none for likelihoods."""
    value: float
    stderr: float | None
    """Standard error of the mean over samples, by bootstrap for what is no mean; None where lm-eval gives none."""
    higher_is_better: bool | None
    samples: int
    """Scored: the first ones of the task, where there was a limit."""
    available: int
    """In the task."""
    limit: int | None
    num_fewshot: int
    scoring: Scoring
    truncated: int
    """Requests (several a sample) whose context did not fit the model, and was cut from the left."""
    hub: str | None
    """The data set: allenai/ai2_arc:ARC-Challenge."""
    revision: str | None
    """Of the data set: the hub's commit, or local- and a digest; None where it is not known."""
    version: str | None
    """Of the task, as lm-eval counts."""
    lm_eval: str
    """Version of lm-eval."""
    group: bool = False
    """Whether the task is a group: the mean of others."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> TaskScore:
        """What `to_dict` made."""
        return TaskScore(**data)


def language_tasks(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    *,
    scoring: Scoring = "honest",
    limit: int | None = None,
    data: Path | None = None,
    include: Path | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = 0,
    seed: int = 0,
    progress: bool = True,
) -> list[TaskScore]:
    """The model's scores, as it is patched, in lm-eval's tasks: each metric of each task, then of the groups named.

    names        tasks, groups (mmlu) or tags (ai2_arc) as `lm_eval ls tasks` lists them, or of files in `include`
    scoring      honest | teacher-forced, as LanguageModel says
    limit        samples a task, from its beginning; None for all
    data         a folder in place of the hub, in the hub's columns (usmoe.data.local.find)
    include      a folder of task files of one's own; the functions that they name are run
    num_fewshot  solved examples before each question; None for what each task is made for
    seed         of those examples, and of whatever a task draws; it seeds random, numpy and torch

    Raises ValueError, in one sentence: for an unknown task, with the nearest names; for a task whose data are neither
    in the folder nor to be had from the hub; for one that generates text under a router that looks ahead, unless the
    scoring is teacher-forced; and for numbers out of range. All but the hub's failures come before anything is run.
    """
    refuse_counts(limit, num_fewshot)
    tasks, groups = find_language_tasks(names, data=data, include=include)
    for task in tasks:
        task.num_fewshot(num_fewshot)
        refuse_generation(model, task, scoring)
    scorer = LanguageModel(model, tokenizer, scoring=scoring, batch_size=batch_size, progress=progress)
    scores: list[TaskScore] = []
    for task in tasks:
        loaded = load_task(task, num_fewshot=num_fewshot, seed=seed, progress=progress)
        scores += task_scores(scorer, task, loaded, limit=limit, seed=seed)
    return scores + group_scores(groups, scores)


def refuse_counts(limit: int | None, num_fewshot: int | None) -> None:
    """Raise ValueError for a limit, or a number of examples, that cannot be one."""
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit={limit} is no number of samples. Choose limit >= 1, or leave it out for all.")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"num_fewshot={num_fewshot} is no number of examples. Choose 0 or more.")


def refuse_generation(model: Any, task: LanguageTask, scoring: Scoring) -> None:
    """Raise ValueError for a task that generates text where the model, as it is patched, cannot do so honestly."""
    if task.generates and scoring == "honest" and looks_ahead(model):
        raise ValueError(cannot_generate(task.name))


def load_task(task: LanguageTask, *, num_fewshot: int | None, seed: int, progress: bool) -> Task:
    """lm-eval's task, its data read; it can be run several times."""
    with _quiet(progress):
        _seed(seed)
        return task.load(task.num_fewshot(num_fewshot))


def task_scores(
    scorer: LanguageModel, task: LanguageTask, loaded: Task, *, limit: int | None, seed: int
) -> list[TaskScore]:
    """Each metric of one task."""
    before = scorer.truncated
    with _quiet(scorer.progress):
        _seed(seed)
        loaded.set_fewshot_seed(seed)
        said: Any = lm_eval.evaluate(
            scorer,
            {"tasks": {task.name: loaded}, "groups": {}},  # pyright: ignore[reportArgumentType]
            limit=limit,
            bootstrap_iters=RESAMPLES,
            log_samples=False,
        )
    truncated = scorer.truncated - before
    if truncated:
        warnings.warn(
            f"{truncated} requests of {task.name} are longer than what the model can read: their beginnings were cut.",
            stacklevel=2,
        )
    about = {
        "available": said["n-samples"][task.name]["original"],
        "limit": limit,
        "num_fewshot": loaded.get_config("num_fewshot"),
        "scoring": scorer.scoring,
        "truncated": truncated,
        "hub": task.hub,
        "revision": _revision(task, loaded),
        "version": task.version,
    }
    return _scores(said["results"][task.name], said["higher_is_better"][task.name], about)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def group_scores(groups: Sequence[LanguageGroup], scores: Sequence[TaskScore]) -> list[TaskScore]:
    """The metrics of groups, from those of their tasks."""
    metrics: dict[str, dict[str, Any]] = {}
    for one in scores:
        said = metrics.setdefault(one.task, {"sample_len": one.samples})
        said[f"{one.metric},{one.filter}"] = one.value
        said[f"{one.metric}_stderr,{one.filter}"] = "N/A" if one.stderr is None else one.stderr
    found: list[TaskScore] = []
    for group in groups:
        parts = [one for one in scores if one.task in group.tasks]
        firsts = {one.task: one for one in parts}.values()
        first = parts[0]
        about = asdict(first) | {
            "available": sum(one.available for one in firsts),
            "truncated": sum(one.truncated for one in firsts),
            "hub": first.hub if len({one.hub for one in firsts}) == 1 else None,
            "revision": first.revision if len({one.revision for one in firsts}) == 1 else None,
            "version": str((group.config.metadata or {}).get("version", "")) or None,
            "group": True,
        }
        found += _scores(group.aggregate(metrics), {one.metric: one.higher_is_better for one in parts}, about)
    return found


def _scores(said: Mapping[str, Any], better: Mapping[str, Any], about: Mapping[str, Any]) -> list[TaskScore]:
    """A TaskScore for each "metric,filter" of what lm-eval says."""
    found: list[TaskScore] = []
    for key, value in said.items():
        metric, comma, kept = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, numbers.Real):
            continue
        stderr = said.get(f"{metric}_stderr,{kept}")
        own = {
            "task": said["name"],
            "alias": str(said["alias"]).strip(),
            "metric": metric,
            "filter": kept,
            "value": float(value),
            "stderr": float(stderr) if isinstance(stderr, numbers.Real) else None,
            "higher_is_better": better.get(metric),
            "samples": said["sample_len"],
            "lm_eval": lm_eval.__version__,
        }
        found.append(TaskScore(**{**about, **own}))
    return found


def _revision(task: LanguageTask, loaded: Any) -> str | None:
    """Of the data: the digest of a folder's files, or the commit in the addresses that were read from the hub."""
    if task.local is not None:
        return task.local.revision
    splits = loaded.dataset.values() if isinstance(getattr(loaded, "dataset", None), Mapping) else ()
    read = " ".join(str(address) for split in splits for address in (split.info.download_checksums or {}))
    commit = re.search(r"@([0-9a-f]{40})/", read)
    return commit and commit[1]


@contextlib.contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Keep stdout for results, bars on stderr where that is a terminal, and lm-eval's bootstrap in this process."""
    bars = progress and sys.stderr.isatty()
    was_off = datasets.are_progress_bars_disabled()
    whole, alone = lm_eval.api.task.tqdm, os.environ.get("DISABLE_MULTIPROC")
    lm_eval.api.task.tqdm = functools.partial(tqdm, disable=not bars, leave=False)  # it takes no word of ours
    os.environ["DISABLE_MULTIPROC"] = "1"  # a fork for each core, beside the threads of torch
    if not bars:
        datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stdout(sys.stderr), without_notes("lm_eval.api.task", "Custom kwargs can be passed"):
            yield
    finally:
        lm_eval.api.task.tqdm = whole
        os.environ.pop("DISABLE_MULTIPROC")
        if alone is not None:
            os.environ["DISABLE_MULTIPROC"] = alone
        if not was_off:
            datasets.enable_progress_bars()
