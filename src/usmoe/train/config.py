"""A training run as one frozen value: what is learnt from, by what model, and how."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from usmoe.checked import refuse_wrong_types
from usmoe.data.corpus import Corpus
from usmoe.models.config import MODELS, LanguageConfig

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How a model is measured on a split: in streams side by side, segment after segment."""

    batch: int = 10
    """Streams."""
    segment: int
    """Tokens predicted at once."""
    memory: int
    """Tokens of the segments before that are remembered; 0: reset at each segment."""
    tokens: int | None = None
    """Of a split, from its beginning; None: all of them."""

    def __post_init__(self) -> None:
        refuse_wrong_types(self)
        _refuse_below(1, self, "batch", "segment", "tokens")
        _refuse_below(0, self, "memory")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides the numbers of a run, but the machine. It is saved whole beside them."""

    corpus: Corpus
    model: LanguageConfig = MODELS["transformer-xl-base"]
    batch: int = 44
    """Sequences a step."""
    segment: int = 512
    """Tokens of each sequence that a step predicts."""
    memory: int = 512
    """Tokens of the segments before that attention sees; 0: none."""
    order: Literal["streams", "windows"] = "streams"
    """The corpus as `batch` streams read on segment by segment, or its segments in a random order (without memory)."""
    steps: int = 100_000
    """Optimizer steps."""
    accumulate: int = 1
    """Parts into which the sequences of a step are divided, one forward each."""
    optimizer: Literal["adam", "adamw", "muon"] = "adam"
    """muon: for the matrices of attention and experts; adamw for the rest."""
    lr: float = 2.5e-4
    """At its peak."""
    schedule: Literal["cosine", "constant", "plateau"] = "cosine"
    """To 0 by a cosine; constant; or constant, and to 0 over the last `decay` steps by 1 - sqrt(progress)."""
    warmup: int = 0
    """Optimizer steps of linear warm-up."""
    decay: int = 0
    """Optimizer steps of the plateau's end."""
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 0.25
    """Largest norm of the gradient; 0: not clipped."""
    balance: float = 0.0
    """Coefficient of the balance loss (usmoe.layers.balance)."""
    z_loss: float = 0.0
    """Coefficient of the routers' z-loss."""
    output_z_loss: float = 0.0
    """Coefficient of the squared log-partition of the words."""
    distill: float = 0.0
    """Coefficient of the distillation of a gate with two stages (StableMoE)."""
    similarity: float = 0.0
    """Coefficient of the routers' similarity loss (Expert Race)."""
    sparsity: bool = False
    """Whether ReMoE's adaptive regulariser drives the routers to their k."""
    grow_k: tuple[int, int] | None = None
    """SMoE-Dropout: experts a token at the first and at the last step, in equal parts between; in place of the router's
    k."""
    freeze_at: float | None = None
    """StableMoE: after which share of the steps the second stage begins."""
    precision: Precision = "auto"
    """float32, or bfloat16 by autocast; auto: bfloat16 where it pays (a GPU that has it)."""
    compile: bool = False
    """torch.compile the layers."""
    seed: int = 0
    evaluate_every: int = 1000
    """Optimizer steps between evaluations on the validation split; the best model is kept."""
    evaluation: Evaluation = None  # pyright: ignore[reportAssignmentType]
    """None: in the segments of training, after as much memory."""
    checkpoint_every: int = 1000
    """Optimizer steps between checkpoints."""
    log_every: int = 20
    """Optimizer steps between lines of the log."""

    def __post_init__(self) -> None:
        if self.evaluation is None:
            object.__setattr__(self, "evaluation", Evaluation(segment=self.segment, memory=self.memory))
        for name in ("betas", "grow_k"):  # lists, from JSON
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        refuse_wrong_types(self)
        counts = ("batch", "segment", "steps", "accumulate", "evaluate_every", "checkpoint_every", "log_every")
        _refuse_below(1, self, *counts)
        losses = ("balance", "z_loss", "output_z_loss", "distill", "similarity")
        _refuse_below(0, self, "memory", "warmup", "decay", "clip", "weight_decay", *losses)
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr} learns nothing. Give one above 0.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} is impossible. Give a whole number from 0 to 2^63 - 1.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} are impossible. Give two numbers from 0, below 1.")
        if self.order == "windows" and self.memory:
            raise ValueError("order=windows has nothing to remember between segments. Give memory=0, or order=streams.")
        if self.batch % self.accumulate:
            raise ValueError(f"batch={self.batch} does not divide into {self.accumulate} parts. Choose another number.")
        if self.schedule != "plateau" and self.decay:
            raise ValueError(f"decay={self.decay} belongs to schedule=plateau. Leave it at 0.")
        if self.warmup + self.decay > self.steps:
            raise ValueError(f"warmup={self.warmup} and decay={self.decay} are more than steps={self.steps} together.")
        if self.freeze_at is not None and not 0 < self.freeze_at < 1:
            raise ValueError(f"freeze_at={self.freeze_at} is no share of the steps. Give one between 0 and 1.")
        if self.freeze_at is not None and self.model.gate != "stable":
            raise ValueError(f"freeze_at belongs to gate=stable, and the gate is {self.model.gate}. Leave it out.")
        if self.distill and self.model.gate != "stable":
            raise ValueError(f"distill belongs to gate=stable, and the gate is {self.model.gate}. Leave it out.")
        if self.freeze_at is not None and not self.distill:
            raise ValueError("freeze_at begins a stage whose router was never taught. Give distill, such as 1.")
        if self.grow_k is not None and not 0 < self.grow_k[0] <= self.grow_k[1] <= self.model.num_experts:
            raise ValueError(
                f"grow_k={self.grow_k} is impossible with {self.model.num_experts} experts. Give two numbers from 1 to "
                f"{self.model.num_experts}, the smaller first."
            )
        if not self.model.num_experts:
            for name in (*losses[:2], *losses[3:], "sparsity", "grow_k"):
                if getattr(self, name):
                    raise ValueError(f"{name} belongs to experts, and the model has none. Leave it out.")

    def replace(self, **changes: Any) -> TrainConfig:
        """The same with some fields changed; fields of the model, the corpus and the evaluation by model__router=..."""
        inner: dict[str, dict[str, Any]] = {}
        outer: dict[str, Any] = {}
        for name, value in changes.items():
            first, _, rest = name.partition("__")
            if rest:
                inner.setdefault(first, {})[rest] = value
            else:
                outer[name] = value
        if self._evaluated_as_trained and "evaluation" not in outer and "evaluation" not in inner:
            outer["evaluation"] = None
        for name, values in inner.items():
            outer[name] = dataclasses.replace(outer.get(name, getattr(self, name)), **values)
        return dataclasses.replace(self, **outer)

    def to_dict(self) -> dict[str, Any]:
        """As JSON; `from_dict` reads it back."""
        said = json.loads(json.dumps(dataclasses.asdict(self)))
        return said | ({"evaluation": None} if self._evaluated_as_trained else {})

    @property
    def _evaluated_as_trained(self) -> bool:
        return self.evaluation == Evaluation(segment=self.segment, memory=self.memory)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> TrainConfig:
        """A configuration of tables, as TOML and JSON have them. `model` may be a name, or say `like = name` and what
        differs. Raises ValueError for fields that are not known, with the nearest, and for a missing corpus."""
        said = dict(data)
        if "corpus" not in said:
            raise ValueError('The configuration names no corpus. Give one: corpus = {source = "enwik8"}.')
        corpus, model = said.pop("corpus"), said.pop("model", "transformer-xl-base")
        fields: dict[str, Any] = {
            "corpus": _made(
                Corpus, {"source": corpus} if isinstance(corpus, str) else _table(corpus, "corpus"), "corpus"
            ),
            "model": _model(model),
        }
        if (evaluation := said.pop("evaluation", None)) is not None:
            trained = {name: said.get(name, getattr(TrainConfig, name)) for name in ("segment", "memory")}
            fields["evaluation"] = _made(Evaluation, trained | _table(evaluation, "evaluation"), "evaluation")
        return _made(TrainConfig, said | fields, "the configuration")


def read_config(path: Path) -> TrainConfig:
    """The configuration in a .toml or .json file. Raises ValueError, naming the file, for what is none."""
    data = read_tables(path)
    try:
        return TrainConfig.from_dict(data)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_tables(path: Path) -> dict[str, Any]:
    """What a .toml or .json file states, as `TrainConfig.from_dict` takes it. Raises ValueError where there is none."""
    if not path.is_file():
        raise ValueError(f"There is no configuration {path}. Give a .toml or .json file, or the name of a preset.")
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: it holds no table")
    run = "schema" in data  # the config.json of a run
    return {name: value for name, value in data.items() if not run or name not in ("schema", "text")}


def _model(said: str | Mapping[str, Any]) -> LanguageConfig:
    fields = {"like": said} if isinstance(said, str) else _table(said, "model")
    like = fields.pop("like", None)
    if like is not None and like not in MODELS:
        raise ValueError(f"There is no model {like!r}. Known: {', '.join(MODELS)}.")
    start = {} if like is None else dataclasses.asdict(MODELS[like])
    return _made(LanguageConfig, start | fields, "model")


def _table(said: Any, what: str) -> dict[str, Any]:
    if not isinstance(said, Mapping):
        raise ValueError(f"{what}={said!r} is no table. Give its fields, such as [{what}] in TOML.")
    return dict(said)


def _made(kind: Any, fields: Mapping[str, Any], what: str) -> Any:
    known = [one.name for one in dataclasses.fields(kind)]
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"{what} has no field {name!r}.{hint} Known: {', '.join(known)}.")
    lists = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return kind(**lists)


def _refuse_below(least: int, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ValueError(f"{name}={value!r} is impossible. Give {least} or more.")
