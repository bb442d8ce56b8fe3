"""Laws: what every router keeps, whatever the logits. A new router joins ALL_ROUTERS and meets all of them.

Promises are held to their word, and where a router promises nothing, a search finds the counterexample: that is the
positive control, without which a law that cannot fail would look like one that holds.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given

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
from usmoe import USMoE
from violations import (
    GARBAGE,
    before_and_after_a_change,
    beside_others,
    beside_padding,
    in_chunks,
    search,
    with_padding,
)

every = pytest.mark.parametrize("router", ALL_ROUTERS, ids=str)


def every_one(holds: Any) -> pytest.MarkDecorator:
    """Every router whose promises are such."""
    return pytest.mark.parametrize("router", those(holds), ids=str)


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
        elif plain(router).name == "expert_choice" and router.promises.budget == "none":
            assert mask[pool].sum(0).tolist() == [max(1, math.floor(k * len(pool) / experts + 0.5))] * experts


@pytest.mark.parametrize("router", [r for r in ALL_ROUTERS if getattr(r, "burst", None) is not None], ids=str)
@given(batch=batches(length=12))
@laws
def test_no_prefix_spends_more_than_its_bucket_holds(router: Any, batch: Batch):
    """capped: used(t) <= k*t + burst, t counting the real tokens of a segment from 1."""
    router = fit(router, batch.logits.shape[-1])
    counted = batch.valid if batch.valid is not None and router.mask_padding else torch.ones(batch.logits.shape[:2])
    segments = (torch.rand(batch.logits.shape[:2], generator=batch.random) < 0.2).cumsum(1)
    routing = usmoe.route(batch.logits, router, valid=batch.valid, segments=segments)
    counts = routing.experts_per_token.view_as(segments)
    for row, here, ids in zip(counts, counted.bool(), segments, strict=True):
        for segment in ids.unique():
            own = here & (ids == segment)
            used = row[own].cumsum(0).tolist()
            assert all(spent <= router.k * t + router.burst for t, spent in enumerate(used, 1))
            assert all(count >= router.min_experts for count in row[own])  # min_experts <= k always fits


def test_without_a_bucket_prefixes_do_spend_more():
    """The positive control of the law above: sharp tokens after dull ones."""
    logits = torch.cat([torch.zeros(1, 6, 4), torch.tensor([9.0, 9.0, 9.0, -9.0]).expand(1, 6, 4)], 1)
    for free in (USMoE(k=1, pool="prefix"), USMoE(k=1, pool="threshold", threshold=0.25)):
        used = usmoe.route(logits, free).experts_per_token.cumsum(0)
        assert any(spent > t for t, spent in enumerate(used.tolist(), 1))


NESTED = [
    router
    for router in USMOES
    if plain(router) is router and router.burst is None and router.pool != "token" and router.k is not None
]


@pytest.mark.parametrize("router", NESTED, ids=str)
@given(batch=batches(least=2))
@laws
def test_a_higher_k_chooses_what_a_lower_one_does_and_more(router: Any, batch: Batch):
    experts = batch.logits.shape[-1]
    router = fit(router, experts)
    low, high = sorted(0.3 + (experts - 0.3) * torch.rand(2, generator=batch.random).numpy())
    low, high = max(low, router.min_experts), max(high, router.min_experts)
    masks = [whole(replace(router, k=float(k)), batch.logits, batch.valid)[0] for k in (low, high)]
    assert not (masks[0] & ~masks[1]).any()


def test_a_bucket_breaks_the_nesting():
    """The positive control: what a higher k spends early is missing later."""

    def nested(batch: Batch) -> bool:
        masks = [whole(USMoE(k=k, pool="prefix", burst=0), batch.logits)[0] for k in (1.0, 1.5)]
        return bool((masks[0] & ~masks[1]).any())

    assert search(nested)


@every
@given(batch=batches(padded=False))
@laws
def test_follows_a_permutation_of_the_tokens_of_a_pool(router: Any, batch: Batch):
    logits = batch.logits
    router = fit(router, logits.shape[-1])
    order = torch.arange(logits.shape[0] * logits.shape[1])
    pools = oracle(router, logits).pools
    if reference.remembers(plain(router)):  # the order of its tokens is the sequence: let sequences change places
        order, pools = order.view(logits.shape[:2])[torch.randperm(len(logits), generator=batch.random)].flatten(), []
    elif max(map(len, pools)) == 1:
        pools = [order.tolist()]
    for pool in pools:
        order[pool] = torch.tensor(pool)[torch.randperm(len(pool), generator=batch.random)]
    mask, weight = (x.flatten(0, 1) for x in whole(router, logits))
    shuffled = logits.flatten(0, 1)[order].view_as(logits)
    assert_same(whole(router, shuffled), (mask[order].view_as(logits), weight[order].view_as(logits)))


@every_one(lambda promises: promises.batch_independent)
@given(batch=batches())
@laws
def test_other_sequences_do_not_matter_if_promised(router: Any, batch: Batch):
    router = fit(router, batch.logits.shape[-1])
    assert_same(*beside_others(router, batch))


@every_one(lambda promises: not promises.batch_independent)
def test_other_sequences_matter_if_not_promised(router: Any):
    router = fit(router, 4)
    assert search(lambda batch: differ(*beside_others(router, batch)))


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


@every_one(lambda promises: promises.padding_independent)
@given(batch=batches(padded=False))
@laws
def test_padding_does_not_matter_if_promised(router: Any, batch: Batch):
    router = fit(router, batch.logits.shape[-1])
    masked = getattr(router, "mask_padding", True)  # where padding competes, NaN and +inf in it are refused
    assert_same(*beside_padding(router, batch, GARBAGE if masked else [1e30, -1e30, -math.inf]))


@every_one(lambda promises: not promises.padding_independent)
def test_padding_matters_if_not_promised(router: Any):
    router = fit(router, 4)
    assert search(lambda batch: differ(*beside_padding(router, batch, [0.0, 3.0])))


@every
@given(batch=batches(padded=False))
@laws
def test_masked_padding_takes_no_pair_and_its_content_never_matters(router: Any, batch: Batch):
    router = fit(router, batch.logits.shape[-1])
    if getattr(router, "mask_padding", True):
        padded, valid = with_padding(batch, GARBAGE)
        routing = usmoe.route(padded, router, valid=valid)
        assert not routing.mask()[~valid.flatten()].any()
        assert_same(grids(routing, padded), whole(router, padded.where(valid[..., None], 1.0), valid))


@every_one(lambda promises: promises.causal)
@given(batch=batches(padded=False))
@laws
def test_later_tokens_do_not_matter_to_a_causal_router(router: Any, batch: Batch):
    router = fit(router, batch.logits.shape[-1])
    t = batch.below(batch.logits.shape[1]) + 1
    assert_same(*before_and_after_a_change(router, batch, t))
    mask, weight = whole(router, batch.logits)
    assert_same(whole(router, batch.logits[:, :t]), (mask[:, :t], weight[:, :t]))


@every_one(lambda promises: not promises.causal)
def test_later_tokens_matter_to_a_router_that_is_not_causal(router: Any):
    router = fit(router, 4)
    assert search(lambda batch: differ(*before_and_after_a_change(router, batch, 5)))


@every_one(lambda promises: promises.streamable)
@given(batch=batches())
@laws
def test_chunks_equal_the_whole_for_a_streamable_router(router: Any, batch: Batch):
    router = fit(router, batch.logits.shape[-1])
    segments = None
    if batch.below(2):  # segments, also such as go on in the next chunk
        segments = (torch.rand(batch.logits.shape[:2], generator=batch.random) < 0.3).cumsum(1) + 5
    routing = usmoe.route(batch.logits, router, valid=batch.valid, segments=segments)
    assert_same(in_chunks(router, batch, segments), grids(routing, batch.logits))


@pytest.mark.parametrize("router", [r for r in ALL_ROUTERS if reference.remembers(plain(r))], ids=str)
def test_without_the_state_chunks_differ_from_the_whole(router: Any):
    """The positive control: what is handed on matters. (k pairs a token never empty the bucket of pool=token.)"""
    router = fit(router, 4)
    found = search(lambda b: differ(in_chunks(router, b, None, hand_on=False), whole(router, b.logits)))
    assert found == (router.pool != "token" if hasattr(router, "pool") else True)


@every_one(lambda promises: not promises.streamable)
def test_chunks_differ_from_the_whole_if_not_promised(router: Any):
    router = fit(router, 4)
    assert search(lambda batch: differ(in_chunks(router, batch, None), whole(router, batch.logits)))


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
