"""The folder of a run: what is in it, how it is written so that nothing is ever half there, and how a model comes back.

config.json        the configuration, as it was resolved when the run began
vocabulary.json    what the tokens mean
log.jsonl          a line every few steps, and one an evaluation
checkpoint.pt      everything that going on needs
router.json, router   of a router of one's own: which it is, and its source (usmoe.train.pinned)
best.safetensors   the model with the best validation figure so far
last.safetensors   the model after the last step
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from usmoe.data import vocabulary as vocabularies
from usmoe.data.vocabulary import Vocabulary
from usmoe.models.language import LanguageModel
from usmoe.report.whole import whole, whole_json
from usmoe.routing.text import parse_router
from usmoe.train.config import TrainConfig
from usmoe.train.pinned import Tell, refuse_edited, router_given

SCHEMA = 1
LENGTHENING = ("evaluate_every", "checkpoint_every", "log_every")
"""Fields that may change between stop and resume: they decide what is written, not what is learnt."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model that a run has made."""

    model: LanguageModel
    vocabulary: Vocabulary
    config: TrainConfig
    step: int
    """After how many optimizer steps."""


@dataclass(frozen=True)
class RunFolder:
    """A run on disk."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    @property
    def vocabulary(self) -> Path:
        return self.path / "vocabulary.json"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def begun(self) -> bool:
        return (self.path / "config.json").is_file()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Held by one process at a time. Raises ValueError where another one works here."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ValueError(
                    f"Another process trains in {self.path}. Wait for it, or give another --run."
                ) from error
            for left in self.path.glob(".*.part"):  # of a process that was killed while it wrote
                left.unlink()
            try:
                yield
            finally:
                if [file.name for file in self.path.iterdir()] == [".lock"]:  # what was refused leaves nothing
                    (self.path / ".lock").unlink()
                    self.path.rmdir()

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """What the disk refuses becomes a sentence that says what is kept."""
        try:
            yield
        except OSError as error:
            if error.errno is None:  # a sentence already
                raise
            kept = f"The last good checkpoint is {self.checkpoint}" if self.checkpoint.is_file() else "Nothing was kept"
            at = f" at {error.filename}" if error.filename else ""
            why = f"{error.strerror}{at}." if error.strerror else str(error)  # a sentence of usmoe.report.whole
            raise OSError(f"The run in {self.path} stopped: {why} {kept}.") from error

    def begin(self, config: TrainConfig, vocabulary: Vocabulary, text: str) -> None:
        """text: a digest of what is learned from."""
        vocabularies.save(vocabulary, self.vocabulary)
        whole_json({"schema": SCHEMA, "text": text, **config.to_dict()}, self.path / "config.json")

    def config(self) -> TrainConfig:
        """Raises ValueError where there is no run, or one of another schema."""
        return self._begun()[0]

    def _begun(self) -> tuple[TrainConfig, str | None]:
        """The configuration, and the digest of what was learned from."""
        path = self.path / "config.json"
        if not path.is_file():
            raise ValueError(f"{self.path} holds no run of usmoe train. Give the folder of one.")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON ({error}). Put the one of the run back.") from error
        if not isinstance(data, dict) or "corpus" not in data:
            raise ValueError(f"{self.path} is no run of usmoe train (of usmoe finetune, perhaps). Give one.")
        if data.pop("schema", None) != SCHEMA:
            raise ValueError(f"{path} is of another version of usmoe, and this one reads schema {SCHEMA}.")
        text = data.pop("text", None)
        return TrainConfig.from_dict(data), text

    def refuse_change(self, config: TrainConfig, text: str) -> TrainConfig:
        """The configuration to go on with. Raises ValueError, saying what changed, where another run was begun here,
        or one on another text.

        What is only written more or less often may change; so may the steps of a schedule whose learning rate does not
        depend on them so far."""
        before, learned = self._begun()
        if learned != text and before.corpus == config.corpus:
            raise ValueError(
                f"The run in {self.path} learned from another text than {config.corpus.source} holds now. Put that "
                "text back, or begin a new run in another folder."
            )
        self.refuse_differences(before.to_dict(), config.to_dict(), self.may_change(before))
        if before.schedule == "plateau" and config != before and self.checkpoint.is_file():
            step = self.read()["step"]
            if step > min(before.steps - before.decay, config.steps - config.decay):
                raise ValueError(
                    f"The run in {self.path} is at step {step}, where its learning rate already falls. Its steps and "
                    "decay cannot change any more."
                )
        return config

    @staticmethod
    def may_change(config: TrainConfig) -> set[str]:
        """Fields that may differ when a run goes on."""
        staged = config.grow_k is not None or config.freeze_at is not None
        return {*LENGTHENING, *(() if config.schedule == "cosine" or staged else ("steps", "decay"))}

    def refuse_differences(self, before: dict[str, Any], now: dict[str, Any], may: Collection[str]) -> None:
        """Raises ValueError, saying what changed, where two configurations differ in more than the fields that may."""
        changes = [one for one in differences(before, now) if one[0].split(".")[0] not in may]
        if changes:
            told = "; ".join(f"{name} was {old!r} and is {new!r}" for name, old, new in changes)
            raise ValueError(
                f"The run in {self.path} was begun with another configuration: {told}. Put that back, or begin a new "
                "run in another folder."
            )

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint, whole or not at all. Raises OSError, naming the one that is kept, on a full disk."""
        try:
            with whole(self.checkpoint) as part:
                torch.save(state, part)
        except (OSError, RuntimeError) as error:
            kept = "the last good one is kept" if self.checkpoint.is_file() else "there is none yet"
            raise OSError(
                f"The checkpoint of step {state['step']} could not be written to {self.path} ({_first(error)}); {kept}."
                " Make room, and go on with --resume."
            ) from error

    def read(self, device: str | torch.device = "cpu") -> dict[str, Any]:
        """The checkpoint. Raises ValueError, naming the file, where it cannot be read."""
        try:
            return torch.load(self.checkpoint, weights_only=True, map_location=device)
        except Exception as error:  # torch raises pickle's, zip's and its own errors for a file that is cut short
            raise ValueError(
                f"{self.checkpoint} cannot be read ({_first(error)}). It is not whole, and the run cannot go on."
            ) from error

    def save_model(self, model: nn.Module, name: str, step: int) -> None:
        """Write the weights as name.safetensors, whole or not at all."""
        tensors = {key: value.detach().contiguous().cpu() for key, value in model.state_dict().items()}
        with whole(self.path / f"{name}.safetensors") as part:
            save_file(tensors, part, metadata={"step": str(step)})

    def forget_after(self, step: int, due: bool = False) -> None:
        """Leave out of the log what lies after the checkpoint that a run goes on from.

        due  whether the evaluation after that step is still to be made"""
        if not self.log.is_file():
            return
        kept = []
        for line in self.log.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                if row["step"] < step or (row["step"] == step and not (due and "validation" in row)):
                    kept.append(line)
            except (ValueError, KeyError):  # a line that was cut short by the stop
                continue
        with whole(self.log) as part:
            part.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def rows(self) -> list[dict[str, Any]]:
        """The log; nothing where it is not there."""
        if not self.log.is_file():
            return []
        return [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines()]


def load_run(
    folder: Path,
    which: str = "best",
    *,
    device: str = "cpu",
    router: Any = None,
    edited: bool = False,
    tell: Tell = warnings.warn,
) -> Trained:
    """The model of a run, in evaluation mode, with its vocabulary and configuration.

    which   best: by the validation figure; last: after the last step
    router  in place of the configuration's
    edited  read it also where the source of its router of one's own was edited since, and say so
    tell    called with a sentence where that is so, and where nothing is known of it

    Raises ValueError where the folder holds no run, or no such model yet, and where the source of its router was
    edited.
    """
    run = RunFolder(Path(folder))
    config, vocabulary = run.config(), vocabularies.load(run.vocabulary)
    path = run.path / f"{which}.safetensors"
    if not path.is_file():
        raise ValueError(f"{run.path} has no {path.name} yet. Let the run go on: --resume.")
    if config.model.vocabulary != vocabulary.size:
        raise ValueError(
            f"{run.path}: the vocabulary has {vocabulary.size} tokens, and the model {config.model.vocabulary}. They "
            "do not belong together."
        )
    if router is None and config.model.num_experts:
        router = _router_of(run.path, config, edited, tell)
    model = LanguageModel(config.model, router)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({_first(error)}). It is not whole.") from error
    if config.freeze_at is not None or config.sparsity:  # buffers of the training alone
        tensors = {name: tensor for name, tensor in tensors.items() if name in model.state_dict()}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f"{path} is not of the model that config.json describes ({_second(error)}). Put the files of one run back."
        ) from error
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        step = int((file.metadata() or {}).get("step", 0))
    return Trained(model=model.to(device).eval(), vocabulary=vocabulary, config=config, step=step)


def _router_of(run: Path, config: TrainConfig, edited: bool, tell: Tell) -> Any:
    """The router that a run was trained under; None: its configuration says it."""
    given = router_given(run)
    if given is None:
        refuse_edited(run, config.model.router, None, tell, edited=edited)
        return None
    if ":" in given:
        raise ValueError(
            f"The run in {run} was trained under an object, {given}, and not under what its configuration says. Give "
            "it: load_run(folder, router=...)."
        )
    return parse_router(given)


def differences(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(name, old, new) of every value that differs, names of tables with dots."""
    found: list[tuple[str, Any, Any]] = []
    for name in dict.fromkeys((*one, *other)):
        old, new = one.get(name), other.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append((f"{prefix}{name}", old, new))
    return found


def _second(error: BaseException) -> str:
    """Of torch's list of what does not fit, the first item."""
    return [*str(error).splitlines(), type(error).__name__][1].strip().rstrip(".")


def _first(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
