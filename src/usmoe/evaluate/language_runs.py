"""`compare_routers`: one model under many routers in lm-eval's tasks; kept, so that a run that was stopped goes on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval

from usmoe.evaluate.language import (
    TaskScore,
    group_scores,
    load_task,
    refuse_counts,
    refuse_generation,
    task_scores,
)
from usmoe.evaluate.language_data import LanguageTask, find_language_tasks
from usmoe.evaluate.language_model import LanguageModel
from usmoe.hf.continuation import Scoring
from usmoe.hf.identity import identity
from usmoe.hf.patch import patch_of, patched
from usmoe.report.whole import whole_json


def compare_routers(
    model: Any,
    tokenizer: Any,
    routers: Mapping[str, Any],
    names: Sequence[str],
    *,
    results: Path | None = None,
    model_digest: str = "",
    scoring: Scoring = "honest",
    limit: int | None = None,
    data: Path | None = None,
    include: Path | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = 0,
    seed: int = 0,
    progress: bool = True,
    anew: bool = False,
    done: Callable[[str, list[TaskScore]], None] = lambda label, scores: None,
) -> dict[str, list[TaskScore]]:
    """{label: the scores of the model under that router}, as `language_tasks` gives them, task after task, and in each
    all routers; the model is then as it was.

    routers       {label: router}; a router is whatever `usmoe.patch` takes, or None for the model as it is
    results       a folder: the scores of each task under each router, written as soon as they are there. What is there
                  for the same model, router, task, data and settings is read, not computed again
    model_digest  of the weights, and of all else that the scores depend on and the model does not say: its dtype, how
                  its experts are quantised. Needed with `results`
    anew          compute also what is there
    done          called with a label and the scores of one task as they come

    The other arguments are those of `language_tasks`, and so is what is refused; also a router that cannot work in the
    model. The router of a module that has no file is computed each time: nothing says whether it has changed.
    """
    refuse_counts(limit, num_fewshot)
    if results is not None and not model_digest:
        raise ValueError("Results are kept for a model of a known digest. Give model_digest, or leave results out.")
    tasks, groups = find_language_tasks(names, data=data, include=include)
    shots = {task.name: task.num_fewshot(num_fewshot) for task in tasks}
    about: dict[str, Any] = {}
    for label, router in routers.items():
        with _under(model, router):
            about[label] = _routers(model)
            for task in tasks:
                refuse_generation(model, task, scoring)
    scorer = LanguageModel(model, tokenizer, scoring=scoring, batch_size=batch_size, progress=progress)
    scores: dict[str, list[TaskScore]] = {label: [] for label in routers}
    for task in tasks:
        loaded = None
        for label, router in routers.items():
            key = _key(task, model_digest, scoring, limit, shots[task.name], seed) | {"routers": about[label]}
            place = _place(results, task, label, key) if results is not None and about[label] is not None else None
            found = None if place is None or anew else _read(place, key)
            if found is None:
                loaded = loaded or load_task(task, num_fewshot=num_fewshot, seed=seed, progress=progress)
                with _under(model, router):
                    found = task_scores(scorer, task, loaded, limit=limit, seed=seed)
                try:
                    if place is not None:
                        whole_json({"key": key, "scores": [one.to_dict() for one in found]}, place)
                except OSError:  # a full disk costs a file, not the figures
                    done(label, found)
                    raise
            scores[label] += found
            done(label, found)
    return {label: found + group_scores(groups, found) for label, found in scores.items()}


def _under(model: Any, router: Any) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if router is None else patched(model, router)


def _key(
    task: LanguageTask, model: str, scoring: Scoring, limit: int | None, num_fewshot: int, seed: int
) -> dict[str, Any]:
    """All that the scores depend on, but for the routers."""
    return {
        "model": model,
        "task": task.name,
        "version": task.version,
        "settings": task.digest,
        "data": "hub" if task.local is None else task.local.revision,
        "scoring": scoring,
        "limit": limit,
        "num_fewshot": num_fewshot,
        "seed": seed,
        "versions": f"lm-eval {lm_eval.__version__}, usmoe {version('usmoe')}",
    }


def _routers(model: Any) -> dict[str, Any] | None:
    """{layer: router} of the model as it is patched, as JSON; empty without a patch, None where a router is code that
    cannot be told from another."""
    state = patch_of(model)
    if state is None:
        return {}
    said = {layer.name: identity(router) for layer, router in zip(state.layers, state.routers, strict=True)}
    return None if None in said.values() else said


def _place(results: Path, task: LanguageTask, label: str, key: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    readable = re.sub(r"[^\w.=-]+", "_", label)[:60].strip("_")
    return results / "language" / re.sub(r"[^\w.-]+", "_", task.name) / f"{readable}-{digest}.json"


def _read(place: Path, key: Mapping[str, Any]) -> list[TaskScore] | None:
    """Scores that were kept under this key; None where there are none."""
    try:
        kept = json.loads(place.read_text(encoding="utf-8"))
        return [TaskScore.from_dict(one) for one in kept["scores"]] if kept["key"] == key else None
    except (FileNotFoundError, ValueError, TypeError, KeyError):  # none, or not of our writing
        return None
