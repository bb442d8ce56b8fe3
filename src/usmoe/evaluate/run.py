"""`evaluate`: embeddings of one model under many settings, scored by mteb; cached, so that a run that was stopped goes
on."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from mteb.cache import ResultCache

from usmoe.embed.encoder import Encoder
from usmoe.embed.memory import FeatureMemory
from usmoe.embed.mteb_model import MTEBModel, refuse_sum
from usmoe.embed.standardize import Statistics, sample_of
from usmoe.evaluate.bands import band
from usmoe.evaluate.setting import Setting
from usmoe.evaluate.tasks import find_tasks
from usmoe.hf.load import saved_with
from usmoe.hf.saved import read_router
from usmoe.report.whole import whole_json


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one setting reaches in one task."""

    task: str
    type: str
    """Of the task, in mteb's words: STS, Classification, ..."""
    metric: str
    """mteb's main score of the task."""
    setting: Setting
    score: float
    """0 to 1, the mean over runs."""
    deviation: float | None
    """Over mteb's runs (ten classifiers on ten samples, the sets of a clustering), with n - 1; None for one run."""
    runs: int
    low: float | None
    """Lower end of the 95 % bootstrap band; None where mteb keeps no predictions to take one of."""
    high: float | None
    seconds: float
    """To encode and to score."""
    seed: int = 0
    """Of the bootstrap."""
    newer: str | None = None
    """The task that mteb has in its place by now, where there is one."""
    revision: str = ""
    """Of the data set: the hub's, or local- and a digest."""
    versions: str = ""
    """Of mteb and usmoe."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Score:
        """What `to_dict` made."""
        fields: dict[str, Any] = data | {"setting": Setting(**data["setting"])}
        return Score(**fields)


def evaluate(
    model: str | None,
    tasks: Sequence[str],
    settings: Sequence[Setting],
    *,
    data: Path | None = None,
    results: Path,
    batch_size: int = 32,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    offline: bool = False,
    quantize: str | None = None,
    progress: bool = True,
    anew: bool = False,
    done: Callable[[Score], None] = lambda score: None,
) -> list[Score]:
    """The score of every setting in every task: tasks in the order given, and in each the settings.

    model     None for the one that ships with usmoe, a folder, or a hub id
    tasks     names of mteb tasks, "paper" for the paper's nineteen, or tasks of one's own under `data`
    data      a folder of local data sets, in the hub's columns, instead of the hub
    results   a folder: mteb's own results and predictions, and beside them a Score for each task and setting. What is
              there for the same weights, data and setting is read, not computed again; finished tasks survive a kill
    seed      of the bootstrap; mteb keeps its own, so that its scores are comparable
    quantize  nf4 | fp4: the experts' weights in 4 bits
    anew      compute also what is kept
    done      called with each Score as it comes

    Settings that differ in their embedding alone share their forwards.

    Raises ValueError for an unknown task, data that are not there, and a MoEE sum in a task that reads vectors rather
    than similarities, all before anything is computed.
    """
    found = find_tasks(tasks, data=data)
    if any(setting.encoder_settings().is_sum for setting in settings):
        for task in found:
            refuse_sum(task.metadata)
    saved = bool(saved_with(model, offline=offline))
    routers = {setting.router: router_of(setting.router, saved) for setting in settings}
    first = Encoder(model, device=device, dtype=dtype, offline=offline)
    if quantize is not None:
        from usmoe.hf.packed import quantize_experts

        quantize_experts(first.model, quantize)  # pyright: ignore[reportArgumentType]
    about = {"quantize": quantize} if quantize else {}
    cache = ResultCache(cache_path=results)
    scores: dict[tuple[str, Setting], Score] = {}
    for forward, group in groupby(sorted(settings, key=lambda one: repr(one.forward)), key=lambda one: one.forward):
        memory = FeatureMemory()
        models = _models(first, list(group), routers[forward[0]], memory, about, batch_size)
        for task in found:
            missing = []
            for setting, scored in models.items():
                kept = None if anew else _read(_place(results, task, scored), task, setting, seed)
                if kept is None:
                    missing.append(setting)
                else:
                    scores[task.metadata.name, setting] = kept
                    done(kept)
            for score in _run(task, {one: models[one] for one in missing}, cache, results, batch_size, seed, progress):
                scores[task.metadata.name, score.setting] = score
                done(score)
            memory.clear()
    return [scores[task.metadata.name, setting] for task in found for setting in settings]


def router_of(text: str, saved: bool = False) -> Any:
    """The router of a Setting; None where the model, as it is loaded, has it already.

    saved  whether the model was saved with routers. Raises ValueError where they are asked for, and there are none
    """
    if text == "saved" and not saved:
        raise ValueError(
            "The model was saved without routers, so there is nothing that saved could mean. Give a router, or own for "
            "the model's own choice."
        )
    if text == "saved" or (text == "own" and not saved):
        return None
    return read_router(text)


def _models(
    first: Encoder, settings: Sequence[Setting], router: Any, memory: FeatureMemory, about: dict[str, Any], batch: int
) -> dict[Setting, MTEBModel]:
    """The models of settings that share their forwards; also those over the sample that they are standardised by."""
    encoders = {one: Encoder(first.model, first.tokenizer, router, **_fields(one)) for one in settings}
    sampling = FeatureMemory()
    for encoder in encoders.values():
        sampling.join(encoder)
    found = {}
    for one, encoder in encoders.items():
        if one.standardize is not None:
            name, texts = sample_of(one.standardize)
            features = sampling.features(encoder, texts, progress=False)
            encoder = encoder.variant(standardize=Statistics.of(features.whole, name))
        encoder.source = first.source
        alone = {} if encoder.text_alone else {"batch_size": batch}  # who is in a batch then counts
        found[one] = MTEBModel(encoder, instructions=one.instruction, memory=memory, about=about | alone)
    return found


def _fields(setting: Setting) -> dict[str, Any]:
    return asdict(setting.encoder_settings())


def _place(results: Path, task: Any, model: MTEBModel) -> Path:
    """Where the Score lies: in scores/ as mteb's own result lies in results/."""
    path = ResultCache(cache_path=results).get_task_result_path(task.metadata.name, model.mteb_model_meta)
    return results / "scores" / path.relative_to(results / "results")


def _read(path: Path, task: Any, setting: Setting, seed: int) -> Score | None:
    """A Score that was kept, of the same data, seed and versions; None where there is none. Its setting may have been
    typed otherwise, so it gets the one that was asked for."""
    try:
        score = Score.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError, KeyError):  # none, or one that another version wrote
        return None
    same = (score.revision, score.seed, score.versions) == (_revision(task), seed, _versions())
    return replace(score, setting=setting) if same else None


def _revision(task: Any) -> str:
    return str(task.metadata.dataset.get("revision"))


def _versions() -> str:
    return f"mteb {version('mteb')}, usmoe {version('usmoe')}"


def _run(
    task: Any,
    models: dict[Setting, MTEBModel],
    cache: ResultCache,
    results: Path,
    batch_size: int,
    seed: int,
    progress: bool,
) -> Iterable[Score]:
    """Score the settings in one task, and keep each Score as soon as there is one."""
    if not models:
        return
    task.load_data()
    drawn = copy.deepcopy((task.rng_state, task.np_rng))  # some tasks draw a sample: each setting the same
    task.check_if_dataset_is_superseded = lambda: None  # it would say so for each setting, twice; a Score has it
    for setting, model in models.items():
        place = _place(results, task, model)
        predictions = results / "predictions" / place.parent.relative_to(results / "scores")
        (predictions / task.prediction_file_name).unlink(missing_ok=True)  # mteb adds to what is there
        task.rng_state, task.np_rng = copy.deepcopy(drawn)
        began = time.monotonic()
        said = mteb.evaluate(
            model,  # pyright: ignore[reportArgumentType] - the protocol is stated with a constructor
            task,
            cache=cache,
            overwrite_strategy="always",  # what can be kept is in our Scores
            prediction_folder=predictions,
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": progress},
            show_progress_bar=False,
            co2_tracker=False,
        ).task_results[0]
        score = _score(task, setting, said, predictions, seed, time.monotonic() - began)
        unwritten = None
        try:
            whole_json(score.to_dict(), place)
        except OSError as error:  # a full disk costs a file, not the figure
            unwritten = error
        yield score
        if unwritten is not None:
            raise unwritten
    task.unload_data()


def _score(task: Any, setting: Setting, said: Any, predictions: Path, seed: int, seconds: float) -> Score:
    runs = _runs(said, task.metadata.main_score)
    kept = predictions / task.prediction_file_name
    around = band(task, json.loads(kept.read_text(encoding="utf-8")), seed=seed) if kept.is_file() else None
    return Score(
        task=task.metadata.name,
        type=task.metadata.type,
        metric=task.metadata.main_score,
        setting=setting,
        score=float(said.get_score()),
        deviation=float(np.std(runs, ddof=1)) if len(runs) > 1 else None,
        runs=max(1, len(runs)),
        low=None if around is None else around.low,
        high=None if around is None else around.high,
        seconds=seconds,
        seed=seed,
        newer=task.superseded_by,
        revision=_revision(task),
        versions=_versions(),
    )


def _runs(said: Any, metric: str) -> list[float]:
    """The score of each run that mteb averages over; empty where there is but one."""
    found: list[float] = []
    for subsets in said.scores.values():
        for scores in subsets:
            found += [run[metric] for run in scores.get("scores_per_experiment", []) if metric in run]
            found += scores.get("v_measures", []) if isinstance(scores.get("v_measures"), list) else []
    return found
