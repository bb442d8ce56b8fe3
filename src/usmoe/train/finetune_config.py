"""A fine-tuning run as one frozen value, and the paper's four as named ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from usmoe.data.classification import Labelled
from usmoe.layers.pooling import Pooling
from usmoe.models.config import LanguageConfig
from usmoe.routing.text import parse_router
from usmoe.train.config import Precision


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Everything that decides the numbers of a fine-tuning run, but the checkpoint and the machine. It is saved whole
    beside them."""

    data: Labelled
    model: LanguageConfig | None = None
    """Of a model from scratch, under the checkpoint's vocabulary; None: as the checkpoint's."""
    from_scratch: bool = False
    """Fresh parameters in place of the checkpoint's: the control."""
    router: str | None = None
    """As on the command line; None: the checkpoint's, at the k that its training ended with."""
    length: int = 512
    """Tokens of a text that are read at most, from its beginning."""
    batch: int = 16
    """Texts a step."""
    epochs: int = 15
    steps: int | None = None
    """Optimizer steps at most; None: all epochs."""
    lr: float = 1e-4
    """Of Adam, constant."""
    clip: float = 1.0
    """Largest norm of the gradient; 0: not clipped. The paper states none."""
    balance: float | None = None
    """Coefficient of the balance loss; None: as the checkpoint was trained."""
    dropout: float = 0.1
    """In the head; that of the body is its own. The paper states none."""
    pooling: Pooling = "last"
    """What of a text the head reads: the last token's state, as the released code does, or a mean over all."""
    precision: Precision = "auto"
    """float32, or bfloat16 by autocast; auto: bfloat16 where it pays (a GPU that has it)."""
    seed: int = 0
    """Of the head, of dropout and of the order of texts."""
    evaluation_batch: int = 32
    """Texts that are classified at once."""
    checkpoint_every: int = 200
    """Optimizer steps between checkpoints, beside those at the end of each epoch."""
    log_every: int = 20
    """Optimizer steps between lines of the log."""

    def __post_init__(self) -> None:
        whole = ("length", "batch", "epochs", "evaluation_batch", "checkpoint_every", "log_every")
        for name in (*whole, *(("steps",) if self.steps is not None else ())):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is impossible. Give a whole number from 1.")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr={self.lr} learns nothing. Give one above 0.")
        if not self.clip >= 0:
            raise ValueError(f"clip={self.clip} is impossible. Give 0 or more.")
        if self.balance is not None and not self.balance >= 0:
            raise ValueError(f"balance={self.balance} is impossible. Give 0 or more.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is no share. Give 0 or more, below 1.")
        if self.precision not in get_args(Precision):
            raise ValueError(f"There is no precision {self.precision!r}. Known: {', '.join(get_args(Precision))}.")
        if self.pooling not in get_args(Pooling):
            raise ValueError(f"There is no pooling {self.pooling!r}. Known: {', '.join(get_args(Pooling))}.")
        if self.router is not None:
            parse_router(self.router)

    def replace(self, **changes: Any) -> FinetuneConfig:
        """The same with some fields changed; fields of the data by data__train_rows=..."""
        inner = {name[6:]: changes.pop(name) for name in [*changes] if name.startswith("data__")}
        if inner:
            changes["data"] = dataclasses.replace(changes.get("data", self.data), **inner)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """As JSON; `from_dict` reads it back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @staticmethod
    def from_dict(said: Mapping[str, Any]) -> FinetuneConfig:
        """The configuration that `to_dict` wrote."""
        model = said.get("model")
        tables = {"data": Labelled(**said["data"]), "model": None if model is None else LanguageConfig(**model)}
        return FinetuneConfig(**{**said, **tables})


FINETUNE_PRESETS: dict[str, FinetuneConfig] = {
    name: FinetuneConfig(data=Labelled(source=name), batch=4 if name == "imdb" else 16)
    for name in ("sst2", "sst5", "imdb", "banking77")
}
"""The paper's Table 16: 512 tokens, Adam with 1e-4, 15 epochs, 16 texts a step and 4 of IMDB."""


def finetune_preset(source: str) -> FinetuneConfig:
    """Table 16's configuration of a set, or for data of one's own that of SST-2."""
    if source in FINETUNE_PRESETS:
        return FINETUNE_PRESETS[source]
    return FINETUNE_PRESETS["sst2"].replace(data=Labelled(source=source))
