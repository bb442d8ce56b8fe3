"""Two ways to measure how well a language model predicts a text, as usmoe.hf.likelihood has them for pretrained models:
teacher-forced, by one forward a segment; and honest, by the tokens before each one alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from usmoe import metrics
from usmoe.data.batches import Batch, Tokens
from usmoe.models.language import LanguageModel
from usmoe.train.config import Evaluation
from usmoe.train.reading import part, read, rerouted
from usmoe.types import RouterOutput


@dataclass(frozen=True, kw_only=True, eq=False)
class Forced:
    """The teacher-forced likelihood of a split, and what the routers did meanwhile."""

    nats: Float[Tensor, " T"]
    """Negative log-likelihood of every token but the first, in the order of the text; float32, on the CPU."""
    experts: float | None
    """Pairs a token: mean over tokens and layers. None for a dense model, as the two below."""
    dropped: float | None
    """Share of tokens without an expert, 0 to 1: mean over the layers."""
    load_cv: float | None
    """Coefficient of variation of the loads of the whole split: mean over the layers. NaN where nothing was routed."""
    seconds: float
    """Wall time."""

    @property
    def tokens(self) -> int:
        """How many were predicted."""
        return len(self.nats)

    @property
    def mean(self) -> float:
        """Nats a token."""
        return self.nats.double().mean().item()


def teacher_forced(
    model: LanguageModel,
    tokens: Tokens,
    setting: Evaluation,
    *,
    router: Any = None,
    window: int = 0,
    alone: bool = False,
    progress: bool = False,
) -> Forced:
    """The likelihood of every token of a split but the first, each predicted once, a forward a segment.

    The split is cut into setting.batch streams that are read side by side. Each begins with an empty memory and is read
    segment after segment, attention remembering setting.memory tokens (0: none, each segment by itself). Under a router
    that looks ahead or across the batch the figure is not that of any autoregressive model: see `honest`.

    router   in place of the model's own, or one a layer; the model is then as it was
    window   tokens over which routers that remember (prefix, a bucket) go on from segment to segment, in whole
             segments; then their memory is empty again. 0, as in training: it is so at each segment. A prefix router
             remembers E scores a token: a window bounds them
    alone    each stream by itself, in a batch of one, so that no router sees another

    A split of fewer tokens than streams has fewer streams. The model is evaluated in evaluation mode, and each module
    is then in the mode that it was in. Raises ValueError for a split of fewer than two tokens, and where a likelihood
    is no number.
    """
    tokens, began = part(tokens, setting), time.perf_counter()
    tally, rows = _Tally(), []
    with rerouted(model, router):
        for stream in range(min(setting.batch, len(tokens) - 1)) if alone else (None,):
            found, valid = [], []
            for segment in read(model, tokens, setting, window=window, stream=stream, progress=progress):
                found.append(predicted(model, segment.out.hidden, segment.batch).cpu())
                valid.append(segment.batch.valid.cpu())
                tally.count(segment.out.said, segment.batch.valid)
            rows.append(torch.cat(found, 1)[torch.cat(valid, 1)])
    return Forced(nats=finite(torch.cat(rows)), seconds=time.perf_counter() - began, **tally.summary())


def predicted(model: LanguageModel, hidden: Float[Tensor, "B L D"], batch: Batch) -> Float[Tensor, "B L"]:
    """Negative log-likelihood of each target; 0 at padding."""
    nats = hidden.new_zeros(batch.targets.shape, dtype=torch.float32)
    nats[batch.valid] = model.words.nats(hidden[batch.valid], batch.targets[batch.valid])
    return nats


def finite(nats: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """The same. Raises ValueError where one of them is NaN or infinite."""
    wrong = int((~nats.isfinite()).sum())
    if wrong:
        raise ValueError(
            f"The likelihood of {wrong} of {len(nats)} tokens is no finite number: parameters or logits of the model "
            "are none either. Take an earlier checkpoint, or float32."
        )
    return nats


class _Tally:
    """What the routers do, segment by segment, without keeping their Routings."""

    def __init__(self) -> None:
        self._tokens = 0
        self._dropped: Tensor | int = 0
        self._loads: Tensor | int = 0

    def count(self, said: Sequence[RouterOutput], valid: Bool[Tensor, "B L"]) -> None:
        """Count a segment; what a router gives to padding is left out."""
        if not said:
            return
        real = valid.reshape(-1)
        counts = torch.stack([metrics.experts_per_token(one.routing, real) for one in said])  # (layers, real tokens)
        self._tokens += counts.shape[1]
        self._dropped = self._dropped + (counts == 0).sum(1)
        self._loads = self._loads + torch.stack([metrics.load(one.routing, real) for one in said])

    def summary(self) -> dict[str, float | None]:
        """The fields of Forced that come from the Routings."""
        if not isinstance(self._loads, Tensor) or not isinstance(self._dropped, Tensor):
            return {"experts": None, "dropped": None, "load_cv": None}
        return {
            "experts": self._loads.sum(1).double().mean().item() / self._tokens,
            "dropped": self._dropped.double().mean().item() / self._tokens,
            "load_cv": statistics.fmean(map(metrics.variation, self._loads)),
        }
