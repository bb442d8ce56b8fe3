"""How to catch a router that breaks a promise: change what must not matter, and compare.

Each comparison gives (mask, weights) twice, before and after; `search` looks for a seed where they differ, and
`kept_promises` says by such searches what a router does, whatever it claims.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import reference
import usmoe
from every_router import Batch, differ, fit, grids, oracle, plain, whole
from usmoe.types import Budget, Promises

Compared = tuple[Any, Any]


def search(changes: Any, tries: int = 60) -> bool:
    """Whether a change moves what it must not move, for some seeded batch (B=2, L=6, E=4)."""
    for seed in range(tries):
        random = torch.Generator().manual_seed(seed)
        logits = torch.randn(2, 6, 4, generator=random, dtype=torch.float64) * 2
        if changes(Batch(logits, None, random)):
            return True
    return False


def beside_others(router: Any, batch: Batch) -> Compared:
    together = whole(router, batch.logits, batch.valid)
    valid = [None] * len(batch.logits) if batch.valid is None else list(batch.valid.split(1))
    alone = [whole(router, x, v) for x, v in zip(batch.logits.split(1), valid, strict=True)]
    return together, tuple(torch.cat(parts) for parts in zip(*alone, strict=True))


def with_padding(batch: Batch, garbage: list[float]) -> tuple[Tensor, Tensor]:
    """The same sequences with three tokens of padding each, left, right or both, and garbage in it."""
    b, length, experts = batch.logits.shape
    picks = torch.randint(len(garbage), (b, length + 3, experts), generator=batch.random)
    padded, valid = torch.tensor(garbage, dtype=torch.float64)[picks], torch.zeros(b, length + 3, dtype=torch.bool)
    for i in range(b):
        left = batch.below(4)
        padded[i, left : left + length] = batch.logits[i]
        valid[i, left : left + length] = True
    return padded, valid


GARBAGE = [1e30, -1e30, math.inf, -math.inf, math.nan]


def beside_padding(router: Any, batch: Batch, garbage: list[float]) -> Compared:
    padded, valid = with_padding(batch, garbage)
    mask, weight = whole(router, padded, valid)
    return whole(router, batch.logits), (mask[valid].view_as(batch.logits), weight[valid].view_as(batch.logits))


def before_and_after_a_change(router: Any, batch: Batch, t: int) -> Compared:
    """Mask and weights of the tokens before t, and the same after all tokens from t on have changed."""
    changed = batch.logits.clone()
    changed[:, t:] = batch.normal(*changed[:, t:].shape)
    before, after = whole(router, batch.logits), whole(router, changed)
    return (before[0][:, :t], before[1][:, :t]), (after[0][:, :t], after[1][:, :t])


def in_chunks(router: Any, batch: Batch, segments: Tensor | None, hand_on: bool = True) -> tuple[Tensor, Tensor]:
    """Mask and weights of a sequence that is routed in chunks of random lengths, empty ones among them."""
    length = batch.logits.shape[1]
    cuts = sorted([0, *(batch.below(length + 1) for _ in range(batch.below(4))), length])
    state, chunks = None, []
    for start, end in itertools.pairwise(cuts):
        parts = [None if x is None else x[:, start:end] for x in (batch.logits, batch.valid, segments)]
        logits, valid, ids = parts
        assert logits is not None
        routing = usmoe.route(logits, router, valid=valid, segments=ids, state=state)
        state = routing.state if hand_on else None
        chunks.append(grids(routing, logits))
    mask, weight = (torch.cat(each, 1) for each in zip(*chunks, strict=True))
    return mask, weight


def kept_promises(router: Any, tries: int = 60) -> Promises:
    """What searches over seeded batches find no exception to."""
    router = fit(router, 4)

    def never(compare: Callable[[Batch], Compared]) -> bool:
        return not search(lambda batch: differ(*compare(batch)), tries)

    return Promises(
        causal=never(lambda batch: before_and_after_a_change(router, batch, batch.below(5) + 1)),
        batch_independent=never(lambda batch: beside_others(router, batch)),
        padding_independent=never(lambda batch: beside_padding(router, batch, [0.0, 3.0])),
        streamable=never(lambda batch: (in_chunks(router, batch, None), whole(router, batch.logits))),
        budget=_kept_budget(router, tries),
    )


def _kept_budget(router: Any, tries: int) -> Budget:
    """exact: floor(k*S + 0.5) pairs of each pool; capped: k*t + burst in every prefix; expected: k a token
    on average, to 5 %, in sequences of 6 and of 64 tokens."""
    k = reference.experts_a_token(plain(router), getattr(router, "host", None))
    if k is None:  # a threshold: the budget of the text that it was found on
        k = _mean(router, 64, first=10_000)
    burst = getattr(plain(router), "burst", None)

    def over(batch: Batch) -> bool:
        used = usmoe.route(batch.logits, router).experts_per_token.view(batch.logits.shape[:2]).cumsum(1)
        return bool((used > k * torch.arange(1, used.shape[1] + 1) + (burst or 0)).any())

    def inexact(batch: Batch) -> bool:
        mask = usmoe.route(batch.logits, router).mask()
        return any(mask[pool].sum() != reference.budget(k, len(pool)) for pool in oracle(router, batch.logits).pools)

    if not search(inexact, tries):
        return "exact"
    if burst is not None and not search(over, tries):
        return "capped"
    near = all(math.isclose(_mean(router, length), k, rel_tol=0.05) for length in (6, 64))
    return "expected" if near else "none"


def _mean(router: Any, length: int, first: int = 0) -> float:
    """Mean experts a token over 300 batches of 2 sequences, as random as those of `search`."""
    random = torch.Generator().manual_seed(first)
    batches = torch.randn(300, 2, length, 4, generator=random, dtype=torch.float64) * 2
    counts = [usmoe.route(logits, router).experts_per_token for logits in batches]
    return torch.cat(counts).double().mean().item()
