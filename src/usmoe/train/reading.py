"""How a model reads a split: in streams side by side or one by one, segment after segment, with what it remembers."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from usmoe.data.batches import Batch, Tokens, evaluation
from usmoe.layers import MoE, mode
from usmoe.layers.threshold_form import moving_threshold, threshold_form
from usmoe.models.language import LanguageModel, LanguageOutput, Memory
from usmoe.train.config import Evaluation
from usmoe.train.stop import Stopped
from usmoe.types import is_causal


@dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """One forward, and what it began with."""

    start: int
    """How many tokens of each stream lie before it."""
    streams: range
    """Which streams of the split its rows are."""
    batch: Batch
    """On the model's device."""
    memory: Memory | None
    """Of the segments before, as it was handed to the model."""
    out: LanguageOutput


def part(tokens: Tokens, setting: Evaluation) -> Tokens:
    """What of a split is read. Raises ValueError where nothing of it can be predicted."""
    tokens = tokens[: setting.tokens]
    if len(tokens) < 2:
        raise ValueError(
            f"The split has {len(tokens)} tokens to read, and the first is not predicted. Give a longer text, or a "
            "larger evaluation.tokens."
        )
    return tokens


def batches(tokens: Tokens, setting: Evaluation) -> Iterator[Batch]:
    """The batches of a part that can be read; fewer streams than asked for where it has too few tokens."""
    return evaluation(tokens, min(setting.batch, len(tokens) - 1), setting.segment)


@torch.no_grad()
def read(
    model: LanguageModel,
    tokens: Tokens,
    setting: Evaluation,
    *,
    window: int = 0,
    stream: int | None = None,
    progress: bool = False,
    stop: threading.Event | None = None,
) -> Iterator[Segment]:
    """Every segment of a part, in order. The model is to be in evaluation mode (`evaluating`).

    window    tokens over which routers that remember (prefix, a bucket) go on from segment to segment, in whole
              segments; then, as at the beginning, their memory is empty. 0: it is so at each segment
    stream    read that one alone, in a batch of one, in the place of all side by side

    stop      once it is set, Stopped is raised before the next segment

    Attention remembers setting.memory tokens; where that is 0, routers remember nothing from segment to segment either.
    """
    device = next(model.parameters()).device
    memory, since = None, 0
    streams = range(min(setting.batch, len(tokens) - 1)) if stream is None else range(stream, stream + 1)
    steps = -(-_longest(len(tokens), setting) // setting.segment)
    shown = tqdm(batches(tokens, setting), total=steps, unit="segment", leave=False, disable=None if progress else True)
    for number, whole in enumerate(shown):
        if stop is not None and stop.is_set():
            raise Stopped
        batch = _rows(whole, streams, device)
        if batch is None:
            break
        width = batch.inputs.shape[1]
        if memory is not None and since + width > window:
            memory, since = dataclasses.replace(memory, routers=(None,) * len(memory.routers)), 0
        out = forward(model, batch, memory, setting, window)
        yield Segment(start=number * setting.segment, streams=streams, batch=batch, memory=memory, out=out)
        memory, since = out.memory, since + width


def forward(
    model: LanguageModel, batch: Batch, memory: Memory | None, setting: Evaluation, window: int
) -> LanguageOutput:
    """One segment under what came before it. Padding, if there is any, does not compete."""
    valid = batch.valid
    return model(
        batch.inputs,
        memory=memory,
        remember=setting.memory,
        stream=window > 0,
        valid=None if valid.all() else valid,
    )


def _longest(tokens: int, setting: Evaluation) -> int:
    """Tokens of the longest stream that are predicted."""
    return -(-(tokens - 1) // min(setting.batch, tokens - 1))


def _rows(batch: Batch, streams: range, device: torch.device) -> Batch | None:
    """Those rows, without columns that are padding in all of them; None where nothing is left."""
    inputs, targets = batch.inputs[streams.start : streams.stop], batch.targets[streams.start : streams.stop]
    width = int(batch.valid[streams.start : streams.stop].any(0).sum())  # padding stands at the end
    if not width:
        return None
    return Batch(inputs=inputs[:, :width].to(device), targets=targets[:, :width].to(device), first=batch.first)


@contextlib.contextmanager
def evaluating(model: LanguageModel, routers: Any = None) -> Iterator[None]:
    """Every module in evaluation mode, and where routers are given under these (one, or one a layer); then each as it
    was.

    Raises ValueError, and changes nothing, where the number differs or a router cannot work here."""
    with rerouted(model, routers), mode.evaluating(model):
        yield


@contextlib.contextmanager
def rerouted(model: LanguageModel, routers: Any) -> Iterator[None]:
    """Under another router, or one a layer; then each layer has its own again, with all that it tracked. None: under
    its own.

    Raises ValueError, and changes nothing, where the number differs or a router cannot work here."""
    before = [(layer, layer.router, layer.cut.total, layer.cut.weight) for layer in model.moe_layers]
    try:
        if routers is not None:
            model.reroute(routers)
        yield
    finally:
        for layer, router, total, weight in before:
            layer.router, layer.cut.total, layer.cut.weight = router, total, weight


def deciding(model: LanguageModel) -> list[Any]:
    """The router of each MoE layer that decides in evaluation mode: of a layer that routes by the moving average of its
    cut, the threshold that this makes."""
    return [_deciding(layer) for layer in model.moe_layers]


def _deciding(layer: MoE) -> Any:
    if not layer.moving or is_causal(layer.router):
        return layer.router
    threshold = moving_threshold(layer.cut, layer.router)
    return layer.router if threshold is None else threshold_form(layer.router, threshold)
