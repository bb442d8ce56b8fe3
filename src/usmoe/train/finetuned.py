"""From the checkpoint of a language model to a classifier, and a classifier read back from its run.

    tuned = load_classifier(Path("usmoe-runs/sst2"))    # a run of usmoe finetune; of several seeds .../seed-0
    likely = tuned.probabilities(["a warm , funny film", "dull"])    # (2, C)
    [tuned.classes[place] for place in likely.argmax(1)]    # ["positive", "negative"]

Under a router whose promises are not batch_independent a text's class depends on the texts beside it in a batch (32 of
them, `FinetuneConfig.evaluation_batch`); `usmoe finetune` says so.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from usmoe.data import vocabulary as vocabularies
from usmoe.data.vocabulary import Vocabulary
from usmoe.models.language import LanguageModel
from usmoe.routing.text import parse_router
from usmoe.train.classifier import Classifier
from usmoe.train.classify import classify
from usmoe.train.device import precision_of
from usmoe.train.finetune_config import FinetuneConfig
from usmoe.train.folder import SCHEMA, RunFolder, Trained, load_run
from usmoe.train.pinned import Tell, refuse_edited
from usmoe.train.texts import Texts


@dataclass(frozen=True, kw_only=True)
class FineTuned:
    """A classifier that a run has made."""

    model: Classifier
    vocabulary: Vocabulary
    classes: tuple[str, ...]
    config: FinetuneConfig

    def probabilities(self, texts: Sequence[str]) -> Float[Tensor, "N C"]:
        """Of each class, for each text; on the CPU."""
        return classify(self.model, Texts(self.vocabulary, texts, self.config.length), self.config).logits.softmax(-1)


def start_of(folder: Path, which: str, tell: Tell = warnings.warn) -> tuple[Trained, dict[str, Any]]:
    """The checkpoint of `usmoe train`, and what says which it is: the folder's name, the model, its step, digests.

    which  best or last
    tell   as in `load_run`

    Raises ValueError where it is none, or of another vocabulary."""
    if which not in ("best", "last"):
        raise ValueError(f"There is no model {which!r} of a run. Choose one of: best, last.")
    if is_finetuned(folder):
        raise ValueError(f"{folder} is a run of usmoe finetune. Give the folder of one of usmoe train.")
    trained = load_run(folder, which, tell=tell)
    with (folder / f"{which}.safetensors").open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    said = {"run": folder.resolve().name, "model": which, "step": trained.step, "weights": weights}
    return trained, said | {"vocabulary": vocabularies.digest(trained.vocabulary)}


def resolved(config: FinetuneConfig, start: Trained, device: str) -> FinetuneConfig:
    """The configuration with what the checkpoint and the machine decide: model, router, balance loss, precision.

    Raises ValueError for what contradicts the checkpoint."""
    if config.model is not None and not config.from_scratch:
        raise ValueError("A model of another configuration cannot have the checkpoint's parameters. Add from_scratch.")
    model, size = config.model or start.config.model, start.vocabulary.size
    if model.vocabulary not in (None, size):
        raise ValueError(
            f"The model knows {model.vocabulary} tokens, and the checkpoint's vocabulary has {size}. Leave the model's "
            "vocabulary out."
        )
    if not model.num_experts and (config.router is not None or config.balance):
        raise ValueError("A dense model has no experts to route to or to balance. Leave router and balance out.")
    router, balance = config.router or model.router, config.balance
    if config.router is None and config.model is None and start.config.grow_k is not None:
        router = str(dataclasses.replace(parse_router(router), k=start.config.grow_k[1]))  # pyright: ignore
    if balance is None:
        balance = start.config.balance if model.num_experts else 0.0
    return config.replace(
        model=model.replace(vocabulary=size, router=router),
        balance=balance,
        precision=precision_of(config.precision, device),
    )


def classifier_of(config: FinetuneConfig, start: Trained, classes: int) -> Classifier:
    """The classifier that a run begins with: the checkpoint's body or a fresh one, and a fresh head.

    Of StableMoE the body is in its second stage, whichever the checkpoint was in."""
    assert config.model is not None
    if config.from_scratch:
        return Classifier(LanguageModel(config.model), classes, config.dropout, config.pooling)
    body = start.model
    if config.model.router != start.config.model.router:
        for layer in body.moe_layers:
            layer.cut.router = layer.router  # whose average it is: another router begins its own
        body.reroute(parse_router(config.model.router))
    for layer in body.moe_layers:
        if hasattr(layer.gate, "freeze"):
            layer.gate.freeze()  # pyright: ignore[reportCallIssue]
    return Classifier(body, classes, config.dropout, config.pooling)


def is_finetuned(folder: Path) -> bool:
    """Whether a folder holds a run of `usmoe finetune`. Raises ValueError, naming the file, where its config.json is
    damaged."""
    return (folder / "config.json").is_file() and "start" in _config_json(folder)


def begun_with(folder: Path) -> dict[str, Any]:
    """What config.json of a run of `usmoe finetune` says: "config", "start" and "task".

    Raises ValueError, naming the file, where it is damaged or of another version."""
    said, path = _config_json(folder), folder / "config.json"
    if said.get("schema") != SCHEMA:
        raise ValueError(f"{path} is of another version of usmoe, and this one reads schema {SCHEMA}.")
    missing = [name for name in ("config", "start", "task") if not isinstance(said.get(name), dict)]
    missing += [f"task.{name}" for name in ("digest", "classes") if not missing and name not in said["task"]]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}. Put the one of the run back.")
    return said


def _config_json(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}). Put the one of the run back.") from error
    if not isinstance(said, dict):
        raise ValueError(f"{path} is no JSON object. Put the one of the run back.")
    return said


def read_weights(model: nn.Module, path: Path) -> None:
    """Raises ValueError, naming the file, where it is not whole or of another model."""
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path} cannot be read ({reason}). It is not whole, or of another model.") from error


def load_classifier(
    folder: Path, *, device: str = "cpu", edited: bool = False, tell: Tell = warnings.warn
) -> FineTuned:
    """The best classifier of a run, in evaluation mode, with its vocabulary and the names of its classes.

    edited, tell  as in `load_run`

    Raises ValueError where the folder holds none, or one that is damaged, and where the source of its router was
    edited."""
    run = RunFolder(Path(folder))
    path = run.path / "best.safetensors"
    if not is_finetuned(run.path) or not path.is_file():
        raise ValueError(f"{run.path} holds no classifier of usmoe finetune. Give its folder, or --resume its run.")
    said = begun_with(run.path)
    config, classes = FinetuneConfig.from_dict(said["config"]), tuple(said["task"]["classes"])
    assert config.model is not None
    if config.model.num_experts:
        refuse_edited(run.path, config.model.router, None, tell, edited=edited)
    model = Classifier(LanguageModel(config.model), len(classes), config.dropout, config.pooling)
    read_weights(model, path)
    vocabulary = vocabularies.load(run.vocabulary)
    return FineTuned(model=model.to(device).eval(), vocabulary=vocabulary, classes=classes, config=config)
