"""The steps of a fine-tuning run, its selections, and its checkpoints."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from typing import Any

import torch
import torch.nn.functional as F

from usmoe.data.classification import Classification
from usmoe.layers.balance import balance_loss
from usmoe.train.agreement import accuracy, confusion, macro_f1
from usmoe.train.classifier import Classified, Classifier
from usmoe.train.classify import autocast, classify
from usmoe.train.finetune_config import FinetuneConfig
from usmoe.train.folder import RunFolder
from usmoe.train.log import Log
from usmoe.train.scored import Selected
from usmoe.train.stop import Stopped, random_states, restore_random_states
from usmoe.train.tally import Tally
from usmoe.train.texts import Epochs, TextBatch, Texts


class FinetuneLoop:
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
                **Tally(out.said).figures,
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
            f"{what} at step {self.step}, on the texts {rows} of training; {kept}. Begin a new run in "
            "another folder, with a smaller lr, a clip, or precision=float32."
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
