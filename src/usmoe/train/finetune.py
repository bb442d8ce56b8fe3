"""`finetune`: a classifier from a checkpoint of `usmoe train`. Selected on some rows, tested once on others; a run that
is stopped, by whatever, goes on to the same numbers bit for bit.

Its folder is that of `usmoe train` (usmoe.train.folder), with best.safetensors the best epoch's classifier, and

result.json        what `finetune` returns
predictions.npy    the class of each test row, in their order: two runs can be compared row by row
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from usmoe.data import vocabulary as vocabularies
from usmoe.data.classification import PARTS, Classification, Examples, classification
from usmoe.data.vocabulary import Vocabulary
from usmoe.models.flops import flops
from usmoe.report.whole import whole, whole_json
from usmoe.train.agreement import agreement
from usmoe.train.classify import classify
from usmoe.train.device import place_of
from usmoe.train.finetune_config import FinetuneConfig
from usmoe.train.finetune_loop import FinetuneLoop
from usmoe.train.finetuned import (
    begun_with,
    classifier_of,
    is_finetuned,
    read_weights,
    resolved,
    start_of,
)
from usmoe.train.folder import SCHEMA, RunFolder
from usmoe.train.pinned import Tell, pin, refuse_edited
from usmoe.train.scored import Scored
from usmoe.train.stop import Stopped, stoppable
from usmoe.train.texts import Texts
from usmoe.types import promises_of

UNREAD = ("checkpoint_every", "log_every")
"""Fields that may change between stop and resume: they decide what is written, not what is learnt."""

FILES = ("result.json", "predictions.npy", "best.safetensors", "checkpoint.pt", "log.jsonl", "config.json")
"""What is removed of a run where another begins; its vocabulary is written anew."""


def finetune(
    config: FinetuneConfig,
    folder: Path,
    *,
    checkpoint: Path,
    which: str = "best",
    data: Path | None = None,
    offline: bool = False,
    device: str = "cpu",
    resume: bool = False,
    anew: bool = False,
    progress: bool = True,
    begun: Callable[[int], object] = lambda steps: None,
    tell: Tell = warnings.warn,
) -> Scored:
    """Train a classifier and test it, or go on with that; of a run that is whole, its result.

    folder      of this run
    checkpoint  of `usmoe train`: the folder, whose vocabulary is kept
    which       of its models: best or last
    data        a folder of local data sets in place of the hub
    resume      go on with the run in the folder; where there is none, begin
    anew        remove the run in the folder, once it is known that this one can begin
    begun       called with the number of optimizer steps once it is known that the run can go on
    tell        called with a sentence where the source of a router of one's own is not known (usmoe.train.pinned)

    After each epoch the rows for selection are classified; the first of the epochs with the highest accuracy there is
    tested, once. Ctrl-C and SIGTERM end the step, write a checkpoint and raise KeyboardInterrupt. Raises ValueError for
    bad data and configurations, a run that is already there, one whose configuration, data or checkpoint changed, and a
    loss that is not finite; OSError for a disk that is full. In every case the last checkpoint stays.
    """
    run = RunFolder(Path(folder))
    refuse_what_is_there(run.path, going_on=resume or anew)
    place = place_of(device)
    start, said = start_of(Path(checkpoint), which, tell)
    task = classification(config.data, data, offline=offline)
    config = resolved(config, start, device)
    assert config.model is not None
    routed = config.model.num_experts > 0
    with torch.random.fork_rng(), stoppable() as stop:
        torch.manual_seed(config.seed)
        model = classifier_of(config, start, len(task.classes)).to(place)
        texts = {name: _texts(getattr(task, name), start.vocabulary, config) for name in PARTS}
        with run.locked():
            if run.begun and anew:
                for name in FILES:
                    (run.path / name).unlink(missing_ok=True)
            if run.begun:
                run.refuse_differences(_begun(run), _compared(config, said, task), UNREAD)
                if routed:
                    refuse_edited(run.path, config.model.router, None, tell)
                if (run.path / "result.json").is_file():
                    return Scored.load(run.path / "result.json")
            else:
                _begin(run, config, said, task, start.vocabulary)
            if routed:
                pin(run.path, config.model.router, None, tell)
            loop = FinetuneLoop(config, run, task, model, texts)
            begun(loop.steps)
            loop.go(stop, progress=progress)
            return _tested(loop, said, stop)


def refuse_what_is_there(folder: Path, *, going_on: bool) -> None:
    """Raise ValueError where a folder holds a run of usmoe train, or one of usmoe finetune that is not asked for.

    going_on  it is asked for: to go on with, or to remove
    """
    run = RunFolder(folder)
    if run.begun and not is_finetuned(run.path):
        raise ValueError(f"{run.path} holds a run of usmoe train. Give another --run.")
    if run.begun and not going_on:
        raise ValueError(
            f"{run.path} holds a run already. Give --resume to go on with it, --force to begin anew, or another --run."
        )


def _texts(examples: Examples, vocabulary: Vocabulary, config: FinetuneConfig) -> Texts:
    try:
        return Texts(vocabulary, examples.texts, config.length)
    except ValueError as error:
        raise ValueError(f"The checkpoint's vocabulary does not fit these texts, as {error}") from error


def _begin(
    run: RunFolder, config: FinetuneConfig, start: dict[str, Any], task: Classification, vocabulary: Vocabulary
) -> None:
    vocabularies.save(vocabulary, run.vocabulary)
    about = {"digest": task.digest, "classes": task.classes}
    said = {"schema": SCHEMA, "config": config.to_dict(), "start": start, "task": about}
    whole_json(said, run.path / "config.json")


def _begun(run: RunFolder) -> dict[str, Any]:
    """What the run in a folder was begun with, as `_compared` has it."""
    said = begun_with(run.path)
    return {**said["config"], "checkpoint": said["start"], "rows": said["task"]["digest"]}


def _compared(config: FinetuneConfig, start: dict[str, Any], task: Classification) -> dict[str, Any]:
    return {**config.to_dict(), "checkpoint": start, "rows": task.digest}


def _tested(loop: FinetuneLoop, start: dict[str, Any], stop: threading.Event) -> Scored:
    """The best epoch's model on the test rows: the result, which is written."""
    config, task, run, best, texts = loop.config, loop.task, loop.run, loop.best, loop.texts["test"]
    assert best is not None
    assert config.model is not None
    read_weights(loop.model, run.path / "best.safetensors")
    began = time.monotonic()
    try:
        answers = classify(loop.model, texts, config, stop=stop)
    except Stopped:
        raise KeyboardInterrupt(f"All steps are saved in {run.path}; --resume tests the best epoch.") from None
    said = answers.classes.numpy()
    found = agreement(task.test.labels, said, len(task.classes))
    parts: dict[str, Examples] = {name: getattr(task, name) for name in PARTS}
    moe, pairs = loop.model.body.moe_layers, answers.routed["experts"] or 0.0
    longest = round(float((texts.lengths**2).sum() / texts.lengths.sum()))  # of the text that a token stands in
    scored = Scored(
        accuracy=found.accuracy,
        accuracy_band=found.accuracy_band,
        macro_f1=found.macro_f1,
        macro_f1_band=found.macro_f1_band,
        **answers.routed,
        rows={name: part.rows for name, part in parts.items()},
        counts={name: len(part) for name, part in parts.items()},
        classes=len(task.classes),
        known=task.known,
        cut=texts.cut,
        tokens=float(texts.lengths.mean()),
        history=tuple(loop.history),
        best=best,
        router=config.model.router if moe else None,
        alone=all(layer.moving or promises_of(layer.router).batch_independent for layer in moe),
        flops=flops(config.model, pairs, longest).without_words,
        seconds=loop.spent,
        test_seconds=time.monotonic() - began,
        start=start,
        config=config,
        names=task.classes,
        empty=task.empty,
        unknown=texts.unknown,
    )
    with whole(run.path / "predictions.npy") as part, part.open("wb") as file:
        np.save(file, said)
    scored.save(run.path / "result.json")
    return scored
