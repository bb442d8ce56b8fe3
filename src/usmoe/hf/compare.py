"""Several routers on one model and one text: a row each, by the same measure."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from usmoe import metrics
from usmoe.hf.calibrate import calibrate
from usmoe.hf.layers import Layer
from usmoe.hf.likelihood import honest, teacher_forced
from usmoe.hf.patch import listening, patch_of, patched
from usmoe.routing import ExpertChoice, OwnChoice, USMoE
from usmoe.routing.router import experts_per_token
from usmoe.types import RouterOutput, Routing, makes_promises, promises_of


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A router under a name; `calibrated` where thresholds are to be found first, on the calibration text."""

    label: str
    router: Any
    calibrated: bool = False
    title: str | None = None
    """On the router maps; None: not drawn there."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one router does on one text. Shares are 0 to 1; means are over real tokens and layers."""

    label: str
    router: str | list[str]
    """As text; one a layer where they differ."""
    causal: bool
    """Whether the router promises that no token depends on a later one."""
    unpromised: bool
    """Whether a router makes no promises at all, as one of the user's own may: it may be causal, or look ahead."""
    perplexity: float
    """Teacher-forced, per token."""
    honest_perplexity: float | None
    """Each token predicted from the tokens before it alone; None where it was not asked for."""
    honest_interval: tuple[float, float] | None
    """95 % confidence, of the sampled positions."""
    honest_positions: int
    bits_per_byte: float
    """Teacher-forced."""
    honest_bits_per_byte: float | None
    budget: float | None
    """Experts a token that the router was asked for, mean over the layers; None for one that says none."""
    experts_mean: float
    experts_min: int
    experts_max: int
    dropped: float
    """Share of tokens without an expert."""
    load_cv: float
    """Coefficient of variation of the experts' loads, a layer."""
    moe_flops: float
    """Per token, of all MoE layers: the routed pairs that were counted, 2 per multiply-add, and the gates."""
    seconds: float
    """Wall time of the teacher-forced pass."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self)


def contenders(k: int) -> list[Contender]:
    """The demo's routers, for a model of k experts a token. Fewer experts: the whole number at or below 0.75 k."""
    fewer = max(1, math.floor(0.75 * k))
    return [
        Contender(label="the model's own choice", router=OwnChoice(), title="own choice"),
        *([Contender(label=f"own choice, {fewer} instead of {k}", router=OwnChoice(k=fewer))] if fewer < k else []),
        Contender(label="expert choice", router=ExpertChoice(score="softmax_experts"), title="expert choice"),
        Contender(label="USMoE, own score", router=USMoE(), title="USMoE"),
        Contender(label="USMoE, own score, 0.75x", router=USMoE(k="0.75x")),
        Contender(label="USMoE, alpha 0.5", router=USMoE(alpha=0.5)),
        Contender(label="USMoE, alpha 0.5, 0.75x", router=USMoE(k="0.75x", alpha=0.5)),
        Contender(label="causal USMoE (threshold)", router=USMoE(), calibrated=True),
        Contender(
            label="causal USMoE (threshold), 0.75x",
            router=USMoE(k="0.75x"),
            calibrated=True,
            title="causal USMoE, 0.75x",
        ),
    ]


def settled(model: PreTrainedModel, entries: Sequence[Contender], calibration: Int[Tensor, "C L"]) -> list[Contender]:
    """The same contenders, with the thresholds of those that want them found on the calibration text."""
    return [
        dataclasses.replace(entry, router=calibrate(model, calibration.split(8), entry.router), calibrated=False)
        if entry.calibrated
        else entry
        for entry in entries
    ]


@torch.no_grad()
def compare(
    model: PreTrainedModel,
    tokens: Int[Tensor, "B L"],
    entries: Sequence[Contender],
    *,
    bytes_per_token: float,
    positions: int = 0,
    seed: int = 0,
    tick: Callable[[str], None] = lambda label: None,
) -> list[Row]:
    """A Row for each contender, `settled` before, all on the same tokens and the same honest positions.

    bytes_per_token turns nats per token into bits per byte. tick(label) is called after each step of a contender's
    work: `steps(entries, positions)` of them in all.
    """
    return [_row(model, tokens, entry, bytes_per_token, positions, seed, tick) for entry in entries]


def steps(entries: Sequence[Contender], positions: int) -> int:
    """How often compare() ticks."""
    return len(entries) * (1 + positions)


def _row(
    model: PreTrainedModel,
    tokens: Tensor,
    entry: Contender,
    bytes_per_token: float,
    positions: int,
    seed: int,
    tick: Callable[[str], None],
) -> Row:
    router = entry.router
    one_for_all = not isinstance(router, list | tuple | Mapping)
    with patched(model, router):
        state = patch_of(model)
        assert state is not None
        tally = Tally(state.layers)
        with listening(model, tally):
            start = time.perf_counter()
            forced = teacher_forced(model, tokens)
            seconds = time.perf_counter() - start
        tick(entry.label)
        alone = None
        if positions:
            alone = honest(model, tokens, forced, positions, seed, lambda: tick(entry.label))
            for _ in range(positions - alone.positions):
                tick(entry.label)
        asked = [_budget(one, layer) for one, layer in zip(state.routers, state.layers, strict=True)]
    nats = forced.double().mean().item()
    bits = 1 / math.log(2) / bytes_per_token
    return Row(
        label=entry.label,
        router=str(router) if one_for_all else [str(one) for one in state.routers],
        causal=all(promises_of(one).causal for one in state.routers),
        unpromised=not all(map(makes_promises, state.routers)),
        perplexity=math.exp(nats),
        honest_perplexity=None if alone is None else alone.perplexity,
        honest_interval=None
        if alone is None
        else (math.exp(alone.nats - alone.interval), math.exp(alone.nats + alone.interval)),
        honest_positions=0 if alone is None else alone.positions,
        bits_per_byte=nats * bits,
        honest_bits_per_byte=None if alone is None else alone.nats * bits,
        seconds=seconds,
        budget=None if None in asked else sum(k for k in asked if k is not None) / len(asked),
        **tally.summary(),
    )


def _budget(router: Any, layer: Layer) -> float | None:
    """Experts a token that a router is asked for in a layer: the model's own number where it names none."""
    return experts_per_token(router.k, layer.host, layer.columns) if hasattr(router, "k") else None


class Tally:
    """Counts what the layers' routers do, forward by forward, without keeping their Routings."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = {layer.name: layer for layer in layers}
        self._load = {layer.name: torch.zeros(layer.num_experts, dtype=torch.long) for layer in layers}
        self._counts: list[Tensor] = []
        self._tokens = dict.fromkeys(self._layers, 0)

    def __call__(self, name: str, said: RouterOutput) -> None:
        routing: Routing = said.routing
        counts = metrics.experts_per_token(routing).cpu()
        self._counts.append(counts)
        self._tokens[name] += len(counts)
        self._load[name] += metrics.load(routing).cpu()

    def summary(self) -> dict[str, Any]:
        """The fields of a Row that come from the Routings."""
        counts = torch.cat(self._counts)
        spreads = [metrics.variation(load) for load in self._load.values()]
        flops = 0.0
        for name, layer in self._layers.items():
            pairs = self._load[name].sum().item() / self._tokens[name]
            flops += pairs * layer.flops_per_pair + layer.flops_per_gate
        return {
            "experts_mean": counts.double().mean().item(),
            "experts_min": int(counts.min()),
            "experts_max": int(counts.max()),
            "dropped": (counts == 0).double().mean().item(),
            "load_cv": sum(spreads) / len(spreads),
            "moe_flops": flops,
        }
