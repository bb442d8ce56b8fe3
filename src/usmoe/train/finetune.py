"""`finetune`: a classifier from a checkpoint of `usmoe train`. Selected on some rows, tested once on others; a run that
is stopped, by whatever, goes on to the same numbers bit for bit.

Its folder is that of `usmoe train` (usmoe.train.folder), with best.safetensors the best epoch's classifier, and

result.json        what `finetune` returns
predictions.npy    the class of each test row, in their order: two runs can be compared row by row
"""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from usmoe.data import vocabulary as vocabularies
from usmoe.data.classification import PARTS, Classification, Examples, classification
from usmoe.data.vocabulary import Vocabulary
from usmoe.layers.balance import balance_loss
from usmoe.models.flops import flops
from usmoe.report.whole import whole, whole_json
from usmoe.train.agreement import accuracy, agreement, confusion, macro_f1
from usmoe.train.classifier import Classified, Classifier
from usmoe.train.classify import autocast, classify
from usmoe.train.finetune_config import FinetuneConfig
from usmoe.train.finetuned import (
    classifier_of,
    is_finetuned,
    read_weights,
    resolved,
    start_of,
)
from usmoe.train.folder import SCHEMA, RunFolder
from usmoe.train.log import Log, routed
from usmoe.train.scored import Scored, Selected
from usmoe.train.stop import Stopped, random_states, restore_random_states, stoppable
from usmoe.train.texts import Epochs, TextBatch, Texts
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
) -> Scored:
    """Train a classifier and test it, or go on with that; of a run that is whole, its result.

    folder      of this run
    checkpoint  of `usmoe train`: the folder, whose vocabulary is kept
    which       of its models: best or last
    data        a folder of local data sets in place of the hub
    resume      go on with the run in the folder; where there is none, begin
    anew        remove the run in the folder, once it is known that this one can begin

    After each epoch the rows for selection are classified; the first of the epochs with the highest accuracy there is
    tested, once. Ctrl-C and SIGTERM end the step, write a checkpoint and raise KeyboardInterrupt. Raises ValueError for
    bad data and configurations, a run that is already there, one whose configuration, data or checkpoint changed, and a
    loss that is not finite; OSError for a disk that is full. In every case the last checkpoint stays.
    """
    run = RunFolder(Path(folder))
    if run.begun and not is_finetuned(run.path):
        raise ValueError(f"{run.path} holds a run of usmoe train. Give another --run.")
    if run.begun and not (resume or anew):
        raise ValueError(
            f"{run.path} holds a run already. Give --resume to go on with it, --force to begin anew, or another --run."
        )
    start, said = start_of(Path(checkpoint), which)
    task = classification(config.data, data, offline=offline)
    config = resolved(config, start, device)
    with torch.random.fork_rng(), stoppable() as stop:
        torch.manual_seed(config.seed)
        model = classifier_of(config, start, len(task.classes)).to(device)
        texts = {name: _texts(getattr(task, name), start.vocabulary, config) for name in PARTS}
        with run.locked():
            if run.begun and anew:
                for name in FILES:
                    (run.path / name).unlink(missing_ok=True)
            if run.begun:
                run.refuse_differences(_begun(run), _compared(config, said, task), UNREAD)
                if (run.path / "result.json").is_file():
                    return Scored.load(run.path / "result.json")
            else:
                _begin(run, config, said, task, start.vocabulary)
            loop = _Loop(config, run, task, model, texts)
            loop.go(stop, progress=progress)
            return _tested(loop, said, stop)


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
    path = run.path / "config.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    if said.get("schema") != SCHEMA:
        raise ValueError(f"{path} is of another version of usmoe, and this one reads schema {SCHEMA}.")
    return {**said["config"], "checkpoint": said["start"], "rows": said["task"]["digest"]}


def _compared(config: FinetuneConfig, start: dict[str, Any], task: Classification) -> dict[str, Any]:
    return {**config.to_dict(), "checkpoint": start, "rows": task.digest}


class _Loop:
    """The state of a run, and its steps."""

    def __init__(
        self, config: FinetuneConfig, run: RunFolder, task: Classification, model: Classifier, texts: dict[str, Texts]
    ) -> None:
        self.config, self.run, self.task, self.model, self.texts = config, run, task, model, texts
        self.device = next(model.parameters()).device
        self.epochs = Epochs(texts["train"], config.batch, config.seed)
        self.labels = torch.from_numpy(task.train.labels)
        every = [one for one in model.parameters() if one.requires_grad]
        self.optimiser = torch.optim.Adam(every, lr=config.lr, fused=True)
        self.step, self.spent = 0, 0.0
        self.running = [0.0, 0]  # loss since the last line of the log, and how many steps
        self.history: list[Selected] = []
        if run.checkpoint.is_file():
            self._restore(run.read())

    @property
    def steps(self) -> int:
        whole = self.config.epochs * self.epochs.steps
        return whole if self.config.steps is None else min(whole, self.config.steps)

    @property
    def best(self) -> Selected | None:
        """The first of those with the highest accuracy."""
        return max(self.history, key=lambda one: one.accuracy, default=None)

    def go(self, stop: threading.Event, *, progress: bool) -> None:
        """Steps and selections until the end; KeyboardInterrupt, all saved, where a signal comes."""
        self.run.forget_after(self.step)
        log = Log(self.run.log, step=self.step, steps=self.steps, progress=progress, tensorboard=False)
        began, before, saved = time.monotonic(), self.spent, self.step
        try:
            while not stop.is_set():
                if self._is_due():
                    if saved != self.step:
                        self._save()
                    self._select(log, stop)
                    self.spent = before + time.monotonic() - began
                    self._save()
                    saved = self.step
                if self.step == self.steps:
                    return
                self._advance(log)
                self.spent = before + time.monotonic() - began
                if self.step % self.config.checkpoint_every == 0:
                    self._save()
                    saved = self.step
            if saved != self.step:
                self._save()
        except Stopped:  # within a selection, before which all was saved
            pass
        finally:
            log.close()
        raise KeyboardInterrupt(f"step {self.step} of {self.steps} is saved in {self.run.path}; --resume goes on.")

    def _is_due(self) -> bool:
        """Whether an epoch, or the last, has ended and was not looked at."""
        ended = self.step > 0 and (self.step % self.epochs.steps == 0 or self.step == self.steps)
        return ended and all(one.step != self.step for one in self.history)

    def _advance(self, log: Log) -> None:
        """One step, and what is written after it."""
        config, started = self.config, time.monotonic()
        batch = self.epochs.at(self.step)
        loss, norm, out = self._learn(batch)
        self.step += 1
        self.running = [self.running[0] + loss, self.running[1] + 1]
        log.tick()
        if self.step % config.log_every == 0 or self.step == self.steps:
            row = {
                "step": self.step,
                "epoch": self.step / self.epochs.steps,
                "loss": self.running[0] / self.running[1],
                "gradient": norm,
                **routed(out.said),
                "tokens_per_second": int(batch.valid.sum()) / (time.monotonic() - started),
                "elapsed": self.spent,
            }
            self.running = [0.0, 0]
            log.write(row)
            log.show(row)

    def _learn(self, batch: TextBatch) -> tuple[float, float, Classified]:
        """One step of Adam. The cross-entropy, the gradient's norm, what the model said. Raises ValueError where either
        is not finite; the parameters are then as before."""
        self.model.train()
        assert self.config.balance is not None
        with autocast(self.config, self.device):
            out = self.model(batch.tokens.to(self.device), batch.valid.to(self.device))
            loss = F.cross_entropy(out.logits, self.labels[batch.rows].to(self.device))
            total = loss + self.config.balance * balance_loss(out.said) if self.config.balance else loss
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip or math.inf).item()
        if not (math.isfinite(loss.item()) and math.isfinite(norm)):
            raise ValueError(self._not_finite(loss.item(), norm, batch))
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=False)
        return loss.item(), norm, out

    def _not_finite(self, loss: float, norm: float, batch: TextBatch) -> str:
        what = f"The loss is {loss}" if not math.isfinite(loss) else f"The gradient's norm is {norm}"
        kept = "there is no checkpoint yet"
        if self.run.checkpoint.is_file():
            kept = f"the last good checkpoint is {self.run.checkpoint}, of step {self.run.read()['step']}"
        rows = ", ".join(str(row + 1) for row in sorted(batch.rows.tolist()))
        return (
            f"{what} at step {self.step}, on the texts {rows} of training; {kept}. Give a smaller lr, a clip, or "
            "precision=float32."
        )

    def _select(self, log: Log, stop: threading.Event) -> None:
        """The figures of this step on the rows for selection; the best model is kept."""
        answers = classify(self.model, self.texts["validation"], self.config, stop=stop)
        true = self.task.validation.labels
        table = confusion(true, answers.classes.numpy(), len(self.task.classes))
        found = Selected(
            epoch=self.step / self.epochs.steps,
            step=self.step,
            loss=F.cross_entropy(answers.logits.double(), torch.from_numpy(true)).item(),
            accuracy=float(accuracy(table)),
            macro_f1=float(macro_f1(table)),
        )
        self.history.append(found)
        row = {"validation" if name == "loss" else name: one for name, one in dataclasses.asdict(found).items()}
        log.write(row)
        log.show(row)
        if self.best is found:
            self.run.save_model(self.model, "best", self.step)

    def _save(self) -> None:
        self.run.save(
            {
                "step": self.step,
                "model": self.model.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "history": [dataclasses.asdict(one) for one in self.history],
                "running": self.running,
                "seconds": self.spent,
                **random_states(self.device),
            }
        )

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.spent, self.running = state["step"], state["seconds"], list(state["running"])
        self.history = [Selected(**one) for one in state["history"]]
        restore_random_states(state, self.device)


def _tested(loop: _Loop, start: dict[str, Any], stop: threading.Event) -> Scored:
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
        alone=all(promises_of(layer.router).batch_independent for layer in moe),
        flops=flops(config.model, pairs, longest).without_words,
        seconds=loop.spent,
        test_seconds=time.monotonic() - began,
        start=start,
        config=config,
    )
    with whole(run.path / "predictions.npy") as part, part.open("wb") as file:
        np.save(file, said)
    scored.save(run.path / "result.json")
    return scored
