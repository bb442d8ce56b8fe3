"""Laws: what every router keeps, whatever the logits. A new router joins ALL_ROUTERS and meets all of them.

Promises are held to their word, and where a router promises nothing, a search finds the counterexample: that is the
positive control, without which a law that cannot fail would look like one that holds.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

import reference
import usmoe
from every_router import (
    ALL_ROUTERS,
    EXPERT_CHOICES,
    USMOES,
    Batch,
    assert_same,
    batches,
    differ,
    fit,
    grids,
    laws,
    oracle,
    pairs,
    plain,
    those,
    whole,
)

every = pytest.mark.parametrize("router", ALL_ROUTERS, ids=str)


def every_one(holds: Any) -> pytest.MarkDecorator:
    """Every router whose promises are such."""
    return pytest.mark.parametrize("router", those(holds), ids=str)


def search(changes: Any, tries: int = 60) -> bool:
    """Whether a change moves what it must not move, for some seeded batch (B=2, L=6, E=4)."""
    for seed in range(tries):
        random = torch.Generator().manual_seed(seed)
        logits = torch.randn(2, 6, 4, generator=random, dtype=torch.float64) * 2
        if changes(Batch(logits, None, random)):
            return True
    return False


@every
@given(batch=batches())
@laws
def test_equals_the_oracle(router: Any, batch: Batch):
    router = fit(router, batch.logits.shape[-1])
    routing = usmoe.route(batch.logits, router, valid=batch.valid)
    answer = oracle(router, batch.logits, batch.valid)
    assert pairs(routing) == answer.pairs  # sorted by expert, then by token; each pair once
    assert routing.weight.tolist() == pytest.approx([answer.weight[pair] for pair in answer.pairs], abs=1e-12)


@every
@given(batch=batches())
@laws
def test_spends_its_budget(router: Any, batch: Batch):
    """exact: floor(k*S + 0.5) pairs of every pool. Expert choice: each expert max(1, floor(k*S/E + 0.5)) of it."""
    experts = batch.logits.shape[-1]
    router = fit(router, experts)
    mask = usmoe.route(batch.logits, router, valid=batch.valid).mask()
    answer = oracle(router, batch.logits, batch.valid)
    k = reference.experts_a_token(plain(router), getattr(router, "host", None))
    for pool in answer.pools:
        if router.promises.budget == "exact":
            assert mask[pool].sum() == reference.budget(k, len(pool))
        elif router.promises.budget == "none":
            assert mask[pool].sum(0).tolist() == [max(1, math.floor(k * len(pool) / experts + 0.5))] * experts


@every
@given(batch=batches(padded=False))
@laws
def test_follows_a_permutation_of_the_tokens_of_a_pool(router: Any, batch: Batch):
    logits = batch.logits
    router = fit(router, logits.shape[-1])
    order = torch.arange(logits.shape[0] * logits.shape[1])
    answer = oracle(router, logits)
    for pool in answer.pools if max(map(len, answer.pools)) > 1 else [order.tolist()]:
        order[pool] = torch.tensor(pool)[torch.randperm(len(pool), generator=batch.random)]
    mask, weight = (x.flatten(0, 1) for x in whole(router, logits))
    shuffled = logits.flatten(0, 1)[order].view_as(logits)
    assert_same(whole(router, shuffled), (mask[order].view_as(logits), weight[order].view_as(logits)))


def _beside_others(router: Any, batch: Batch) -> tuple[Any, Any]:
    together = whole(router, batch.logits, batch.valid)
    valid = [None] * len(batch.logits) if batch.valid is None else list(batch.valid.split(1))
    alone = [whole(router, x, v) for x, v in zip(batch.logits.split(1), valid, strict=True)]
    return together, tuple(torch.cat(parts) for parts in zip(*alone, strict=True))


@every_one(lambda promises: promises.batch_independent)
@given(batch=batches())
@laws
def test_other_sequences_do_not_matter_if_promised(router: Any, batch: Batch):
    router = fit(router, batch.logits.shape[-1])
    assert_same(*_beside_others(router, batch))


@every_one(lambda promises: not promises.batch_independent)
def test_other_sequences_matter_if_not_promised(router: Any):
    router = fit(router, 4)
    assert search(lambda batch: differ(*_beside_others(router, batch)))


@every
@given(batch=batches())
@laws
def test_packed_segments_are_routed_as_each_alone(router: Any, batch: Batch):
    logits, valid = batch.logits, batch.valid
    router = fit(router, logits.shape[-1])
    segments = (torch.rand(logits.shape[:2], generator=batch.random) < 0.4).cumsum(1) * -7 + 3
    mask, weight = grids(usmoe.route(logits, router, valid=valid, segments=segments), logits)
    for b, ids in enumerate(segments):
        for segment in ids.unique():
            own = ids == segment
            alone = whole(router, logits[b, own][None], None if valid is None else valid[b, own][None])
            assert_same(alone, (mask[b, own][None], weight[b, own][None]))


def _with_padding(batch: Batch, garbage: list[float]) -> tuple[Tensor, Tensor]:
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


def _beside_padding(router: Any, batch: Batch, garbage: list[float]) -> tuple[Any, Any]:
    padded, valid = _with_padding(batch, garbage)
    mask, weight = whole(router, padded, valid)
    return whole(router, batch.logits), (mask[valid].view_as(batch.logits), weight[valid].view_as(batch.logits))


@every_one(lambda promises: promises.padding_independent)
@given(batch=batches(padded=False))
@laws
def test_padding_does_not_matter_if_promised(router: Any, batch: Batch):
    router = fit(router, batch.logits.shape[-1])
    masked = getattr(router, "mask_padding", True)  # where padding competes, NaN and +inf in it are refused
    assert_same(*_beside_padding(router, batch, GARBAGE if masked else [1e30, -1e30, -math.inf]))


@every_one(lambda promises: not promises.padding_independent)
def test_padding_matters_if_not_promised(router: Any):
    router = fit(router, 4)
    assert search(lambda batch: differ(*_beside_padding(router, batch, [0.0, 3.0])))


@every
@given(batch=batches(padded=False))
@laws
def test_masked_padding_takes_no_pair_and_its_content_never_matters(router: Any, batch: Batch):
    router = fit(router, batch.logits.shape[-1])
    if getattr(router, "mask_padding", True):
        padded, valid = _with_padding(batch, GARBAGE)
        routing = usmoe.route(padded, router, valid=valid)
        assert not routing.mask()[~valid.flatten()].any()
        assert_same(grids(routing, padded), whole(router, padded.where(valid[..., None], 1.0), valid))


def _before_and_after_a_change(router: Any, batch: Batch, t: int) -> tuple[Any, Any]:
    """Mask and weights of the tokens before t, and the same after all tokens from t on have changed."""
    changed = batch.logits.clone()
    changed[:, t:] = batch.normal(*changed[:, t:].shape)
    before, after = whole(router, batch.logits), whole(router, changed)
    return (before[0][:, :t], before[1][:, :t]), (after[0][:, :t], after[1][:, :t])


@every_one(lambda promises: promises.causal)
@given(batch=batches(padded=False))
@laws
def test_later_tokens_do_not_matter_to_a_causal_router(router: Any, batch: Batch):
    router = fit(router, batch.logits.shape[-1])
    t = batch.below(batch.logits.shape[1]) + 1
    assert_same(*_before_and_after_a_change(router, batch, t))
    mask, weight = whole(router, batch.logits)
    assert_same(whole(router, batch.logits[:, :t]), (mask[:, :t], weight[:, :t]))


@every_one(lambda promises: not promises.causal)
def test_later_tokens_matter_to_a_router_that_is_not_causal(router: Any):
    router = fit(router, 4)
    assert search(lambda batch: differ(*_before_and_after_a_change(router, batch, 5)))


@every_one(lambda promises: promises.streamable)
@given(batch=batches())
@laws
def test_chunks_equal_the_whole_for_a_streamable_router(router: Any, batch: Batch):
    router = fit(router, batch.logits.shape[-1])
    cuts = sorted({0, batch.below(batch.logits.shape[1] + 1), batch.logits.shape[1]})
    state, chunks = None, []
    for start, end in itertools.pairwise(cuts):
        part, valid = batch.logits[:, start:end], None if batch.valid is None else batch.valid[:, start:end]
        routing = usmoe.route(part, router, valid=valid, state=state)
        state = routing.state
        chunks.append(grids(routing, part))
    joined = tuple(torch.cat(parts, 1) for parts in zip(*chunks, strict=True))
    assert_same(joined, whole(router, batch.logits, batch.valid))


OF_A_SEQUENCE = [
    router
    for router in USMOES + EXPERT_CHOICES
    if plain(router) is router and router.pool == "sequence" and "softmax_tokens" not in str(router)
]


@pytest.mark.parametrize("router", OF_A_SEQUENCE, ids=str)
@given(batch=batches(padded=False))
@laws
def test_the_cut_of_a_pool_serves_as_its_threshold(router: Any, batch: Batch):
    """A pair is chosen when its score >= the cut: one cut a pool, and for expert choice one a pool and expert."""
    logits, router = batch.logits, fit(router, batch.logits.shape[-1])
    routing = usmoe.route(logits, router)
    assert routing.cut is not None
    mask, weight = grids(routing, logits)
    for b, cut in enumerate(routing.cut.tolist()):
        tau = tuple(cut) if isinstance(cut, list) else cut
        served = type(router)(**{**vars(router), "k": None, "pool": "threshold", "threshold": tau})
        assert_same(whole(served, logits[b : b + 1]), (mask[b : b + 1], weight[b : b + 1]))
