"""Two ways to measure how well a language model predicts a text, as usmoe.hf.likelihood has them for pretrained models:
teacher-forced, by one forward a segment; and honest, by the tokens before each one alone."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from usmoe.data.batches import Batch, Tokens
from usmoe.models.language import LanguageModel, Memory
from usmoe.report.estimate import Honest, corrected, drawn
from usmoe.train.config import Evaluation
from usmoe.train.reading import deciding, evaluating, forward, part, read
from usmoe.train.tally import Tally
from usmoe.types import RouterOutput, is_causal, promises_of


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
    stop: threading.Event | None = None,
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

    stop     once it is set, Stopped is raised before the next segment

    A split of fewer tokens than streams has fewer streams. The model is evaluated in evaluation mode, and each module
    is then in the mode that it was in. Raises ValueError for a split of fewer than two tokens, and where a likelihood
    is no number.
    """
    tokens, began = part(tokens, setting), time.perf_counter()
    tally, rows = Tally(), []
    with evaluating(model, router):
        for stream in range(min(setting.batch, len(tokens) - 1)) if alone else (None,):
            found, valid = [], []
            for segment in read(model, tokens, setting, window=window, stream=stream, progress=progress, stop=stop):
                found.append(predicted(model, segment.out.hidden, segment.batch).cpu())
                valid.append(segment.batch.valid.cpu())
                tally.count(_of_real(segment.out.said, segment.batch.valid))
            rows.append(torch.cat(found, 1)[torch.cat(valid, 1)])
    return Forced(nats=finite(torch.cat(rows)), seconds=time.perf_counter() - began, **tally.figures)


def honest(
    model: LanguageModel,
    tokens: Tokens,
    setting: Evaluation,
    forced: Forced,
    positions: int,
    seed: int = 0,
    *,
    window: int = 0,
    progress: bool = False,
) -> Honest:
    """The honest likelihood of the same split: of token t+1 when the model is run on tokens 1 ... t alone.

    forced     what `teacher_forced` gave for the same tokens, setting and window, under the same routers
    positions  how many to sample, seeded, without replacement

    The segments before are wholly in the past of t, and are read as in teacher forcing; the current one is cut at t,
    and all of it is routed anew. Where a router looks across the batch (pools batch and time step), tokens 1 ... t
    alone are a batch of one, the segments before included: the figure is then that of a sequence by itself.

    Where every layer's router promises that it looks neither ahead nor across the batch, the teacher-forced figure is
    honest as it is: it is returned, with an interval of 0, and nothing is sampled (positions = 0).

    Raises ValueError where `forced` is of another text, where there is no position to sample, and where a likelihood is
    no finite number.
    """
    total = len(part(tokens, setting)) - 1
    if forced.tokens != total:
        raise ValueError(
            f"The teacher-forced figure is of {forced.tokens} tokens, and these are {total}. Give its own."
        )
    if all(map(is_causal, deciding(model))):
        return Honest(nats=forced.mean, interval=0.0, positions=0)
    if positions < 1:
        raise ValueError(f"positions={positions} is no sample, and a router looks ahead. Give 1 or more.")
    places = drawn(total, positions, seed)
    return corrected(forced.nats, places, recomputed(model, tokens, setting, places, window=window, progress=progress))


def recomputed(
    model: LanguageModel,
    tokens: Tokens,
    setting: Evaluation,
    places: Int[Tensor, " P"],
    *,
    window: int = 0,
    progress: bool = False,
) -> Float[Tensor, " P"]:
    """The honest likelihood at those places of `Forced.nats`, whatever the routers promise; see `honest`.

    Prefixes of equal length are run side by side where no router looks across the batch. A router's state must then
    offer select(rows), as usmoe's do.
    """
    tokens = part(tokens, setting)
    count = min(setting.batch, len(tokens) - 1)
    bounds = torch.tensor([number * (len(tokens) - 1) // count for number in range(count + 1)])
    row = torch.searchsorted(bounds, places, right=True) - 1
    offset = places - bounds[row]
    start, length = offset - offset % setting.segment, offset % setting.segment + 1
    together = all(promises_of(router).batch_independent for router in deciding(model))
    found = torch.zeros(len(places))
    with evaluating(model):
        for stream in (None,) if together else row.unique().tolist():
            mine = torch.ones_like(row, dtype=torch.bool) if stream is None else row == stream
            last = int(start[mine].max())
            for segment in read(model, tokens, setting, window=window, stream=stream, progress=progress):
                here = mine & (start == segment.start)
                for size in length[here].unique().tolist():
                    wanted = (here & (length == size)).nonzero().squeeze(1)
                    rows = (row[wanted] - segment.streams.start).to(segment.batch.inputs.device)
                    cut = _cut(segment.batch, rows, size)
                    out = forward(model, cut, _of_rows(segment.memory, rows), setting, window)
                    found[wanted] = model.words.nats(out.hidden[:, -1], cut.targets[:, -1]).cpu()
                if segment.start == last:
                    break
    return finite(found)


def _cut(batch: Batch, rows: Int[Tensor, " R"], size: int) -> Batch:
    """The first tokens of those rows."""
    return Batch(inputs=batch.inputs[rows, :size], targets=batch.targets[rows, :size], first=batch.first)


def _of_rows(memory: Memory | None, rows: Int[Tensor, " R"]) -> Memory | None:
    """What is remembered of those sequences."""
    if memory is None:
        return None
    return Memory(
        layers=tuple(layer[rows] for layer in memory.layers),
        routers=tuple(None if state is None else state.select(rows) for state in memory.routers),
        valid=None if memory.valid is None else memory.valid[rows],
        segment=None if memory.segment is None else memory.segment[rows],
    )


def predicted(model: LanguageModel, hidden: Float[Tensor, "B L D"], batch: Batch) -> Float[Tensor, "B L"]:
    """Negative log-likelihood of each target; 0 at padding."""
    nats = hidden.new_zeros(batch.targets.shape, dtype=torch.float32)
    nats[batch.valid] = model.words.nats(hidden[batch.valid], batch.targets[batch.valid])
    return nats


class NotFiniteError(ValueError):
    """A likelihood is NaN or infinite."""


def finite(nats: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """The same. Raises NotFiniteError where one of them is NaN or infinite."""
    wrong = int((~nats.isfinite()).sum())
    if wrong:
        raise NotFiniteError(
            f"The likelihood of {wrong} of {len(nats)} tokens is no finite number: parameters or logits of the model "
            "are none either. Take an earlier checkpoint, or float32."
        )
    return nats


def _of_real(said: Sequence[RouterOutput], valid: Bool[Tensor, "B L"]) -> list[RouterOutput]:
    """The same, padding left out of every count, also for a router of one's own that does not say what is padding."""
    real = valid.reshape(-1)
    return [dataclasses.replace(one, routing=dataclasses.replace(one.routing, valid=real)) for one in said]
