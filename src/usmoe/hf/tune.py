"""`tune`: the cheapest way to spend a budget: how much of it each layer gets, by which score, with which floor.

Routing is one linear program over the pairs of a pool; here the pairs of all layers share one budget, so that layers
compete for experts as tokens do. What a pair is worth to the model differs by layer, and is measured: by the likelihood
of text under thresholds, which is honest, since a threshold looks at nothing ahead.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from usmoe.hf.calibrate import Batch, calibrate, checked, ranking_scores, run, threshold
from usmoe.hf.layers import Layer
from usmoe.hf.patch import patched, supported_layers
from usmoe.layers.mode import evaluating
from usmoe.routing import USMoE
from usmoe.routing.router import Experts, experts_per_token

_SHARES = (0.6, 0.8, 1.25, 1.5)
"""At which multiples of its even share of the budget a layer's worth is measured."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What a search found, and what it tried."""

    routers: list[USMoE]
    """One a layer, ready for patch()."""
    nats: float
    """Honest NLL a token on the batches of the search."""
    even_nats: float
    """The same of the best score and floor with the budget spread evenly."""
    trials: int
    """How often the batches were run."""


def tune(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    budget: Experts = "0.75x",
    *,
    alphas: Sequence[float] = (0.0, 0.1, 0.5),
    floors: Sequence[int] = (0, 1),
    tick: Callable[[], None] = lambda: None,
) -> list[USMoE]:
    """One threshold router a layer that together spend `budget`, tuned on text; ready for `patch()`.

    budget   experts a token, the mean over the layers: a number, or "0.75x" of the model's own. Where experts of
             different layers cost differently, it is the floating-point operations that are kept to
    batches  text of the kind that will be served, as for `calibrate()`; a causal language model must be behind
    alphas   shares of the expert score to try; 0 is the model's own score
    floors   min_experts to try
    tick     called after each run over the batches; `trials()` of them

    First the score and the floor, the budget spread evenly; then what each layer loses and gains by a smaller and a
    larger share, all else being equal; the split where the next pair is worth the same in every layer; then single
    shifts from layer to layer. What is minimised is the honest negative log-likelihood; a change is taken where it is
    better by more than its standard error, so that chance does not choose, and the even split remains where it is as
    good.

    Raises ValueError for a budget that is none, for batches without two real tokens in a row, and as `calibrate()` and
    `patch()` do.
    """
    return search(model, batches, budget, alphas=alphas, floors=floors, tick=tick).routers


def trials(layers: int, alphas: int = 3, floors: int = 2) -> int:
    """How often tune() runs the batches at most, its calibrations apart."""
    return alphas + floors + len(_SHARES) * layers + 2 + 2 * layers


@torch.no_grad()
def search(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    budget: Experts = "0.75x",
    *,
    alphas: Sequence[float] = (0.0, 0.1, 0.5),
    floors: Sequence[int] = (0, 1),
    tick: Callable[[], None] = lambda: None,
) -> Tuned:
    """`tune()`, with what it measured on the way."""
    batches = checked(batches, "tune()")
    layers = supported_layers(model)
    if not alphas:
        raise ValueError(
            "tune() was given no alphas to try. Give some, such as alphas=(0.0,) for the model's own score."
        )
    text = _Text(model, batches, tick)
    even = _even(layers, budget)

    def best_of(candidates: Sequence[USMoE]) -> tuple[Tensor, USMoE]:
        """The first one, unless a later one is better beyond doubt."""
        tried = [(text.losses(calibrate(model, batches, _with(one, even))), one) for one in candidates]
        best = tried[0]
        for other in tried[1:]:
            best = other if _better(other[0], best[0]) else best
        return best

    with evaluating(model):
        _, score = best_of([USMoE(pool="threshold", threshold=0.0, alpha=alpha) for alpha in alphas])
        options = [dataclasses.replace(score, min_experts=floor) for floor in floors if floor <= min(even)]
        even_losses, score = best_of(options or [score])
        account = _Account(model, batches, layers, score, even)
        split = _split(account, text, even, even_losses)
        split = _shifted(account, text, split, (even_losses, even))
        routers = calibrate(model, batches, _with(score, split))
        losses = text.losses(routers)
    return Tuned(routers=routers, nats=losses.mean().item(), even_nats=even_losses.mean().item(), trials=text.runs)


def _better(losses: Tensor, others: Tensor) -> bool:
    """Whether losses are lower by more than the standard error of the mean difference, token by token: a search over
    many candidates finds some that are better by chance."""
    difference = losses - others
    error = difference.std().item() / len(difference) ** 0.5 if len(difference) > 1 else 0.0
    return difference.mean().item() < -error


def _even(layers: Sequence[Layer], budget: Experts) -> list[float]:
    """Experts a token of each layer, each with the same share of its own; or the same number, where the budget is one.

    Raises ValueError where the budget is none, or more than there are experts.
    """
    probe = USMoE(k=budget)  # refuses what is no budget
    return [experts_per_token(probe.k, layer.host, layer.columns) for layer in layers]


def _with(score: USMoE, split: Sequence[float]) -> list[USMoE]:
    return [dataclasses.replace(score, k=k) for k in split]


class _Text:
    """The honest likelihood of the batches, under threshold routers."""

    def __init__(self, model: PreTrainedModel, batches: list[Batch], tick: Callable[[], None]) -> None:
        self._model, self._batches, self._tick = model, batches, tick
        self.runs = 0

    def losses(self, routers: list[USMoE]) -> Float[Tensor, " S"]:
        """NLL of each token that follows a real token."""
        kept = []
        with patched(self._model, routers):
            for batch in self._batches:
                logits = run(self._model, batch).logits
                given = batch if isinstance(batch, Mapping) else {"input_ids": batch}
                tokens = given["input_ids"].to(logits.device)
                mask = given.get("attention_mask")
                real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool().to(logits.device)
                losses = torch.nn.functional.cross_entropy(
                    logits[:, :-1].float().transpose(1, 2), tokens[:, 1:], reduction="none"
                )
                kept.append(losses[real[:, 1:] & real[:, :-1]].double().cpu())
        losses = torch.cat(kept) if kept else torch.zeros(0)
        if not len(losses):
            raise ValueError("tune() was given no two real tokens in a row. Give batches of text.")
        self.runs += 1
        self._tick()
        return losses


class _Account:
    """What a split costs, and the routers that spend it, from one reading of the scores."""

    def __init__(
        self, model: PreTrainedModel, batches: list[Batch], layers: list[Layer], score: USMoE, even: list[float]
    ) -> None:
        self._score = score
        routers = calibrate(model, batches, _with(score, even))
        for layer, router in zip(layers, routers, strict=True):
            if not isinstance(router, USMoE):
                raise ValueError(
                    f"{layer.name} saw no token of the batches. Give tune() batches in which all layers do."
                )
        seeds = [dataclasses.replace(r, pool="sequence", threshold=None, min_experts=0) for r in routers]
        self._scores = ranking_scores(model, batches, routers, seeds)
        self.price = [layer.flops_per_pair for layer in layers]
        self.least = [float(max(score.min_experts, 0.05 * k)) for k in even]
        self.most = [float(layer.columns) for layer in layers]
        self.total = sum(price * k for price, k in zip(self.price, even, strict=True))

    def routers(self, split: Sequence[float]) -> list[USMoE]:
        wanted = _with(self._score, split)
        return [
            dataclasses.replace(one, threshold=threshold(one, layer, scores))
            for one, (layer, scores) in zip(wanted, self._scores, strict=True)
        ]

    def changed(self, split: Sequence[float], layer: int, k: float) -> list[float] | None:
        """The split with another number for one layer; None where the layer cannot have it."""
        inside = self.least[layer] <= k <= self.most[layer]
        return [k if place == layer else other for place, other in enumerate(split)] if inside else None


def _split(account: _Account, text: _Text, even: list[float], losses: Tensor) -> list[float]:
    """The split where the next pair is worth the same in every layer, by each layer's convex curve of loss."""
    curves = []
    for layer, k in enumerate(even):
        points = [(k, 0.0)]
        for share in _SHARES:
            split = account.changed(even, layer, k * share)
            if split is not None:
                points.append((k * share, (text.losses(account.routers(split)) - losses).mean().item()))
        curves.append(_convex(sorted(points)))
    # pieces of all curves, the steepest fall for a floating-point operation first
    pieces = sorted(
        ((low[1] - high[1]) / ((high[0] - low[0]) * account.price[layer]), layer, high[0] - low[0])
        for layer, curve in enumerate(curves)
        for low, high in itertools.pairwise(curve)
    )[::-1]
    split = [curve[0][0] for curve in curves]
    left = account.total - sum(price * k for price, k in zip(account.price, split, strict=True))
    for _, layer, width in pieces:
        taken = min(width, left / account.price[layer])
        split[layer] += taken
        left -= taken * account.price[layer]
    return split


def _convex(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lower convex hull of points in order of their first coordinate (Andrew's monotone chain)."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (a, fa), (b, fb) = hull[-2:]
            if (fb - fa) * (x - a) < (y - fa) * (b - a):
                break
            hull.pop()
        hull.append((x, y))
    return hull


def _shifted(account: _Account, text: _Text, split: list[float], even: tuple[Tensor, list[float]]) -> list[float]:
    """The better of the split and the even one, after one round of shifts from each layer to the next and to the one
    before, each kept where it helps."""

    def better(split: list[float] | None, best: tuple[Tensor, list[float]]) -> tuple[Tensor, list[float]]:
        if split is None:
            return best
        losses = text.losses(account.routers(split))
        return (losses, split) if _better(losses, best[0]) else best

    best = better(split, even)
    layers = len(split)
    for giver, step in itertools.product(range(layers), (1, -1)):
        best = better(_moved(account, best[1], giver, (giver + step) % layers), best)
    return best[1]


def _moved(account: _Account, split: list[float], giver: int, taker: int) -> list[float] | None:
    """The split with a tenth of one layer's share spent in another; None where a layer cannot have that."""
    if giver == taker:
        return None
    given = split[giver] / 10
    fewer = account.changed(split, giver, split[giver] - given)
    got = split[taker] + given * account.price[giver] / account.price[taker]
    return None if fewer is None else account.changed(fewer, taker, got)
