"""`train`: the loop. A run that is stopped, by whatever, goes on to the same numbers bit for bit."""

from __future__ import annotations

import dataclasses
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object

from usmoe.data.batches import Batch, Streams, Windows
from usmoe.data.prepare import Prepared, prepare
from usmoe.data.units import stated
from usmoe.models.language import LanguageModel, Memory
from usmoe.train.config import TrainConfig
from usmoe.train.device import compile_here, place_of, precision_of
from usmoe.train.folder import RunFolder
from usmoe.train.likelihood import NotFiniteError, teacher_forced
from usmoe.train.log import Log
from usmoe.train.objective import Learner
from usmoe.train.optimizers import learning_rate, optimisers_of
from usmoe.train.pinned import Tell, pin, refuse_edited
from usmoe.train.stop import Stopped, random_states, restore_random_states, stoppable
from usmoe.train.tally import Tally
from usmoe.types import RouterOutput


@dataclass(frozen=True, kw_only=True)
class Finished:
    """How a run ended, or where it stopped."""

    folder: Path
    step: int
    steps: int
    validation: float | None
    """The best so far, nats a token."""
    unit: str
    """Of the figures: bits a character, or a byte; perplexity a word."""

    @property
    def whole(self) -> bool:
        return self.step == self.steps


def train(
    config: TrainConfig,
    folder: Path,
    *,
    cache: Path,
    data: Path | None = None,
    offline: bool = False,
    device: str = "cpu",
    resume: bool = False,
    seconds: float | None = None,
    progress: bool = True,
    tensorboard: bool = False,
    router: Any = None,
    begun: Callable[[TrainConfig], object] = lambda config: None,
    tell: Tell = warnings.warn,
) -> Finished:
    """Train a language model, or go on with it.

    folder   of the run (`usmoe.train.folder`)
    cache    where prepared corpora are kept, for other runs too
    data     a folder of local corpora in place of the hub
    resume   go on with the run in the folder; where there is none, begin
    seconds  stop after the step that ends so long from now, with a checkpoint
    router   an object in place of the configuration's text: it must be the same one at each resume
    begun    called with the whole configuration once it is known that the run can go on
    tell     called with a sentence where the source of a router of one's own is not known (usmoe.train.pinned)

    Several processes (accelerate launch, torchrun) train one model, each on its own sequences of a step.

    Ctrl-C and SIGTERM end the step, write a checkpoint and raise KeyboardInterrupt. Raises ValueError for bad
    configurations, a run that is already there, one whose configuration or router's source changed, and a loss that
    is not finite; OSError for a disk that is full. In every case the last checkpoint stays.
    """
    run, main = RunFolder(Path(folder)), os.environ.get("RANK", "0") == "0"
    place = place_of(device)
    if main and run.begun and not resume:
        raise ValueError(f"{run.path} holds a run already. Give --resume to go on with it, or another --run.")
    with run.telling(), run.locked() if main else nullcontext(), torch.random.fork_rng(), stoppable() as stop:
        prepared = prepare(config.corpus, Path(cache), data=data, offline=offline)
        config = resolved(config, prepared, device)
        if main and run.begun:
            config = run.refuse_change(config, prepared.digest)
            if config.model.num_experts:
                refuse_edited(run.path, config.model.router, router, tell)
        loop = _Loop(config, run, prepared, place, router)
        if main:
            run.begin(config, prepared.vocabulary, prepared.digest)
            if config.model.num_experts:
                pin(run.path, config.model.router, router, tell)
            begun(config)
        return loop.go(stop, seconds, progress=progress, tensorboard=tensorboard)


def resolved(config: TrainConfig, prepared: Prepared, device: str) -> TrainConfig:
    """The configuration with what depends on the data and the machine: the vocabulary's size, the precision.

    Raises ValueError where the vocabulary contradicts the model's."""
    size = prepared.vocabulary.size
    if config.model.vocabulary not in (None, size):
        raise ValueError(
            f"The model knows {config.model.vocabulary} tokens, and the corpus has {size}. Leave the model's "
            "vocabulary out, or take the corpus that it belongs to."
        )
    model = config.model.replace(vocabulary=size)
    return dataclasses.replace(config, precision=precision_of(config.precision, device), model=model)


class _Loop:
    """The state of a run in this process, and its steps."""

    def __init__(
        self, config: TrainConfig, run: RunFolder, prepared: Prepared, place: torch.device, router: Any
    ) -> None:
        self.config, self.run, self.prepared = config, run, prepared
        self.accelerator = _accelerator(config, place)
        if config.batch % (config.accumulate * self.accelerator.num_processes):
            raise ValueError(
                f"batch={config.batch} does not divide into {config.accumulate} parts on each of "
                f"{self.accelerator.num_processes} processes. Choose another number."
            )
        order = {"streams": Streams, "windows": Windows}[config.order]
        seeded = {"seed": config.seed} if config.order == "windows" else {}
        self.batches = order(prepared.train, config.batch, config.segment, **seeded)
        torch.manual_seed(config.seed)
        self.learner = Learner(LanguageModel(config.model, router).train(), config).to(self.accelerator.device)
        if config.compile:
            compile_here(self.model.layers)
        self.optimisers = optimisers_of(self.learner, config)
        self.wrapped = self.accelerator.prepare(self.learner)
        torch.manual_seed(config.seed + self.accelerator.process_index)  # another dropout in each process
        self.step, self.best, self.spent = 0, math.inf, 0.0
        self.running = [0.0, 0]  # nats since the last line of the log, and how many steps
        self.memories: list[Memory | None] = [None] * config.accumulate
        self.frozen = False
        self.due = False  # whether the evaluation after the last step is still to be made
        if run.checkpoint.is_file():
            self._restore(run.read())

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def model(self) -> LanguageModel:
        return self.learner.model

    def go(self, stop: threading.Event, seconds: float | None, *, progress: bool, tensorboard: bool) -> Finished:
        """Steps until the end, a signal, or the end of the time."""
        if self.main:
            self.run.forget_after(self.step, self.due)
        log = Log(
            self.run.log,
            step=self.step,
            steps=self.config.steps,
            progress=progress and self.main,
            tensorboard=tensorboard and self.main,
        )
        began, before = time.monotonic(), self.spent
        with closing(log), suppress(Stopped):  # an evaluation that is left is made when the run goes on
            if self.due:
                self._stage(self.step - 1)
                self._evaluate(log, stop)
            over = False
            while self.step < self.config.steps and not over:
                self.spent = before + time.monotonic() - began
                self._advance(log)
                over = self._agreed(stop.is_set() or (seconds is not None and time.monotonic() - began >= seconds))
                if self.due or over or self.step % self.config.checkpoint_every == 0:
                    self.spent = before + time.monotonic() - began
                    self._save()  # before the evaluation, which may take long
                if self.due:
                    self._evaluate(log, stop)
            if self.step == self.config.steps:
                self._save()
        if stop.is_set() and (self.due or self.step < self.config.steps):
            raise KeyboardInterrupt(
                f"step {self.step} of {self.config.steps} is saved in {self.run.path}; --resume goes on."
            )
        return Finished(
            folder=self.run.path,
            step=self.step,
            steps=self.config.steps,
            validation=None if math.isinf(self.best) else self.best,
            unit=self.prepared.unit,
        )

    def _agreed(self, asked: bool) -> bool:
        """Whether any of the processes asks for it."""
        if self.accelerator.num_processes == 1:
            return asked
        several: Any = self.accelerator.reduce(torch.tensor(float(asked), device=self.accelerator.device))
        return bool(several.item())

    def _advance(self, log: Log) -> None:
        """One step, and what is written after it."""
        config, started = self.config, time.monotonic()
        self._stage(self.step)
        batch = self.batches.at(self.step)
        nats, norm, told = self._learn(batch)
        self.step += 1
        self.running[0] += nats
        self.running[1] += 1
        log.tick()
        last = self.step == config.steps
        if self.main and (self.step % config.log_every == 0 or last):
            mean = self.running[0] / self.running[1]
            row = {
                "step": self.step,
                "loss": mean,
                **self._stated(mean, "train"),
                "lr": learning_rate(self.step - 1, config),
                "gradient": norm,
                **Tally(*told).figures,
                "tokens_per_second": batch.inputs.numel() / (time.monotonic() - started),
                "elapsed": self.spent,
            }
            self.running = [0.0, 0]
            log.write(row)
            log.show(row)
        self.due = self.step % config.evaluate_every == 0 or last

    def _learn(self, batch: Batch) -> tuple[float, float, list[tuple[RouterOutput, ...]]]:
        """Gradients of a batch, one step of every optimiser. Nats a token, the gradient's norm, what the MoE layers
        said of each part. Raises ValueError where either is not finite; the parameters are then as before."""
        config, accelerator = self.config, self.accelerator
        rate = learning_rate(self.step, config)
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        inputs, targets = (
            part[mine].to(accelerator.device).chunk(config.accumulate) for part in (batch.inputs, batch.targets)
        )
        nats, told = torch.zeros((), device=accelerator.device), []
        for number, (tokens, goal) in enumerate(zip(inputs, targets, strict=True)):
            memory = None if batch.first else self.memories[number]
            with self._synchronised(number == config.accumulate - 1), accelerator.autocast():
                said = self.wrapped(tokens, goal, memory)
                accelerator.backward(said.total / config.accumulate)
            nats, self.memories[number] = nats + said.nats / config.accumulate, said.out.memory
            told.append(said.out.said)
        norm = torch.nn.utils.clip_grad_norm_(self.learner.parameters(), config.clip or math.inf)
        mean = accelerator.reduce(nats, "mean").item()  # pyright: ignore[reportAttributeAccessIssue]
        for what, value in (("loss", mean), ("gradient's norm", norm.item())):
            if not math.isfinite(value):
                raise ValueError(self._not_finite(f"The {what} is {value}"))
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=False)  # fresh memory for gradients costs as much as computing them
        if self.learner.sparsity is not None:
            self.learner.sparsity.update([one for part in told for one in part])
        return mean, norm.item(), told

    def _not_finite(self, what: str) -> str:
        """what: is not finite: The loss is nan."""
        kept = "there is no checkpoint yet"
        if self.run.checkpoint.is_file():
            kept = f"the last good checkpoint is {self.run.checkpoint}, of step {self.run.read()['step']}"
        return (
            f"{what} at step {self.step}, batch {self.step % self.batches.steps_per_epoch} of "
            f"epoch {self.step // self.batches.steps_per_epoch}; {kept}. Begin a new run in another folder, with a "
            "smaller lr, a clip, or precision=float32."
        )

    @contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Gradients meet those of other processes at the last part of a step alone."""
        if last or self.accelerator.num_processes == 1:
            yield
            return
        with self.accelerator.no_sync(self.wrapped):
            yield

    def _stage(self, step: int) -> None:
        """What a step begins with where the method has stages."""
        config = self.config
        if config.grow_k is not None:
            first, last = config.grow_k
            k = min(first + (last - first + 1) * step // config.steps, last)
            if self.model.moe_layers[0].router.k != k:
                self.model.reroute([dataclasses.replace(layer.router, k=k) for layer in self.model.moe_layers])
        if config.freeze_at is not None and not self.frozen and step >= config.freeze_at * config.steps:
            for layer in self.model.moe_layers:
                layer.gate.freeze()  # pyright: ignore[reportCallIssue]
            self.learner.zero_grad(set_to_none=True)  # what has no gradient from now on, no optimiser moves
            self.frozen = True

    def _evaluate(self, log: Log, stop: threading.Event) -> None:
        """The validation figure; the best model is kept. Raises Stopped once a stop is asked for."""
        if not self.main:
            self.due = False
            return
        heeded = stop if self.accelerator.num_processes == 1 else None  # else all agree on it after a step
        try:
            nats = teacher_forced(self.model, self.prepared.validation, self.config.evaluation, stop=heeded).mean
        except NotFiniteError as error:
            raise ValueError(self._not_finite("The validation figure is not finite")) from error
        self.due = False
        figures = {f"validation_{name}": value for name, value in self._stated(nats, "validation").items()}
        row = {"step": self.step, "validation": nats, **figures}
        log.write(row)
        log.show(row)
        if nats < self.best:
            self.best = nats
            self.run.save_model(self.model, "best", self.step)

    def _stated(self, nats: float, split: str) -> dict[str, float]:
        prepared = self.prepared
        return stated(nats, prepared.unit, len(prepared.tokens[split]) / prepared.units[split])

    def _save(self) -> None:
        """Replace the checkpoint. Raises ValueError, and keeps the one before, where a parameter is not finite."""
        broken = next((name for name, one in self.model.named_parameters() if not one.isfinite().all()), None)
        if broken is not None:
            raise ValueError(self._not_finite(f"The parameter {broken} is not finite"))
        mine = {
            "memory": [None if one is None else [layer.cpu() for layer in one.layers] for one in self.memories],
            **random_states(self.accelerator.device),
        }
        each = gather_object([mine])
        if not self.main:
            return
        self.run.save(
            {
                "step": self.step,
                "learner": self.learner.state_dict(),
                "optimisers": [one.state_dict() for one in self.optimisers],
                "config": self.config.to_dict(),
                "best": self.best,
                "due": self.due,
                "running": self.running,
                "seconds": self.spent,
                "processes": each,
            }
        )
        if self.step == self.config.steps and not self.due:
            self.run.save_model(self.model, "last", self.step)

    def _restore(self, state: dict[str, Any]) -> None:
        each = state["processes"]
        if len(each) != self.accelerator.num_processes:
            raise ValueError(
                f"The run in {self.run.path} was trained by {len(each)} processes, and there are "
                f"{self.accelerator.num_processes} now. Start as many."
            )
        before = TrainConfig.from_dict(state["config"])
        now = self.config.to_dict()
        self.run.refuse_differences(before.to_dict(), now, self.run.may_change(before))
        mine, device = each[self.accelerator.process_index], self.accelerator.device
        self.learner.load_state_dict(state["learner"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.best, self.spent = state["step"], state["best"], state["seconds"]
        self.running, self.due = list(state["running"]), state["due"]
        empty = (None,) * self.config.model.layers
        self.memories = [
            None if one is None else Memory(layers=tuple(layer.to(device) for layer in one), routers=empty)
            for one in mine["memory"]
        ]
        restore_random_states(mine, device)


def _accelerator(config: TrainConfig, place: torch.device) -> Accelerator:
    """An accelerator of this precision, whatever an earlier run of this process had."""
    AcceleratorState._reset_state(reset_partial_state=True)
    if place.type == "cuda" and place.index is not None:
        torch.cuda.set_device(place)
    return Accelerator(
        cpu=place.type == "cpu",
        mixed_precision="bf16" if config.precision == "bfloat16" else "no",
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=config.freeze_at is not None)],
    )
