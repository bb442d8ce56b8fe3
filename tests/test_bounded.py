"""Bounded choice: by hand, its special cases, its promise that no token is dropped and no expert overloaded.

That it equals scipy's HiGHS on every law's input: tests/test_laws.py. The solver itself: tests/test_lp.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given

import usmoe
from every_router import Batch, assert_same, batches, laws, pairs, whole
from usmoe import BoundedChoice, ExpertChoice, TokenChoice, USMoE

# Scores (sigmoids, alpha=1). Three tokens, two experts, k=1: three pairs.
#
#          e0   e1     USMoE takes 9 8 7;   per_token=(1, 1): 9 8 6;   and per_expert=(0, 1): at most ceil(1.5) = 2 each
#   t0     .9   .7     t0: e0 e1            t0: e0                    t0: e0
#   t1     .8   .1     t1: e0               t1: e0                    t1: e0
#   t2     .6   .5     t2: -                t2: e0, three for e0      t2: e1 (.1 less; from t0 it would be .2)
BY_HAND = torch.tensor([[[0.9, 0.7], [0.8, 0.1], [0.6, 0.5]]], dtype=torch.float64).logit()


def chosen(router: Any) -> list[tuple[int, int]]:
    return sorted(pairs(usmoe.route(BY_HAND, router)))


def test_bounded_choice_by_hand():
    one = {"k": 1, "alpha": 1.0, "expert_score": "sigmoid"}
    assert chosen(BoundedChoice(**one, per_token=None, per_expert=None)) == [(0, 0), (0, 1), (1, 0)]
    assert chosen(BoundedChoice(**one, per_token=(1, 1), per_expert=None)) == [(0, 0), (1, 0), (2, 0)]
    assert chosen(BoundedChoice(**one, per_token=(1, 1), per_expert=(0, 1))) == [(0, 0), (1, 0), (2, 1)]
    assert chosen(BoundedChoice(**one, per_token=(0, 2), per_expert=(0, 1))) == [(0, 0), (0, 1), (1, 0)]


@given(batch=batches())
@laws
def test_token_choice_is_a_special_case(batch: Batch):
    k = min(2, batch.logits.shape[-1])
    bounded = BoundedChoice(k=k, alpha=0.0, per_token=(k, k), per_expert=None)
    assert_same(whole(bounded, batch.logits, batch.valid), whole(TokenChoice(k=k), batch.logits, batch.valid))


@given(batch=batches(least=2))
@laws
def test_expert_choice_is_a_special_case_where_shares_are_whole(batch: Batch):
    experts = batch.logits.shape[-1]
    logits = batch.normal(2, 2 * experts, experts)  # k*S/E = 3
    bounded = BoundedChoice(k=1.5, alpha=1.0, expert_score="sigmoid", per_token=None, per_expert=(1, 1))
    assert_same(whole(bounded, logits), whole(ExpertChoice(k=1.5, score="sigmoid"), logits))


@given(batch=batches())
@laws
def test_usmoe_is_the_case_without_bounds(batch: Batch):
    k = min(1.3, batch.logits.shape[-1])
    for pool in ("sequence", "batch", "time_step"):
        bounded = BoundedChoice(k=k, per_token=None, per_expert=None, pool=pool)
        assert_same(whole(bounded, batch.logits, batch.valid), whole(USMoE(k=k, pool=pool), batch.logits, batch.valid))


@given(batch=batches(padded=False, length=12, experts=6, least=4))
@laws
def test_no_token_is_dropped_and_no_expert_is_loaded_beyond_its_cap(batch: Batch):
    """On logits of a collapsed router."""
    logits = batch.logits + 4 * torch.eye(batch.logits.shape[-1])[0]
    size, experts = logits.shape[1:]
    routing = usmoe.route(logits, BoundedChoice(k=2))
    most = math.ceil(1.25 * 2 * size / experts)
    masks = routing.mask().view(logits.shape)
    assert masks.sum(2).min() >= 1
    assert masks.sum(2).max() <= 4
    assert masks.sum(1).max() <= most
    assert masks.sum((1, 2)).tolist() == [2 * size] * len(logits)


def test_usmoe_does_drop_tokens_and_load_experts_beyond_that_cap():
    """The positive control of the law above."""
    logits = torch.randn(1, 64, 6, generator=torch.Generator().manual_seed(0)) * 2 + 4 * torch.eye(6)[0]
    for router, free in ((BoundedChoice(k=1), False), (USMoE(k=1), True)):
        mask = usmoe.route(logits * 0.3, router).mask()
        assert bool(mask.sum(1).min() == 0) is free
        assert bool(mask.sum(0).max() > math.ceil(1.25 * 64 / 6)) is free


def test_it_costs_less_than_a_quota_for_everyone():
    """Between the unconstrained optimum and the tightest quotas, by value."""
    scores = (torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * 2).softmax(-1)
    rows = {row.name: row for row in usmoe.lp.compare(scores, k=1)}
    assert list(rows) == ["none", "tokens", "experts", "tokens and experts", "no drop, capped"]
    assert rows["none"].given_away == 0
    for name in ("tokens", "experts"):
        assert 0 < rows[name].given_away < rows["tokens and experts"].given_away
    assert 0 < rows["no drop, capped"].given_away < rows["tokens and experts"].given_away
    assert rows["tokens"].dropped == rows["no drop, capped"].dropped == 0 < rows["none"].dropped
    assert rows["experts"].most == 1
    assert rows["none"].most > rows["no drop, capped"].most
    assert rows["no drop, capped"].most <= 1.25
    assert rows["tokens"].value == pytest.approx(scores.amax(1).sum().item())
    assert usmoe.lp.compare(scores)[1].value == pytest.approx(scores.topk(2).values.sum().item())  # k=2


def test_compare_takes_a_fractional_k_and_refuses_one_that_cannot_be():
    scores = torch.rand(10, 4, generator=torch.Generator().manual_seed(0))
    by_name = {row.name: row for row in usmoe.lp.compare(scores, k=1.5)}
    assert by_name["tokens"].per_token == (1, 2)
    assert by_name["experts"].per_expert == (3, 4)
    with pytest.raises(ValueError, match="k=5 experts per token is impossible with 4 experts"):
        usmoe.lp.compare(scores, k=5)
    with pytest.raises(ValueError, match="k='2' is not a budget"):
        usmoe.lp.compare(scores, k="2")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="scores are a list"):
        usmoe.lp.compare([[1.0, 2.0]])  # pyright: ignore[reportArgumentType]
    assert usmoe.lp.compare(torch.zeros(0, 4))[0].dropped == 0


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"k": 5}, r"k=5 experts per token lie outside of per_token=\(1, 4\)"),
        ({"k": 0.5}, r"k=0.5 experts per token lie outside of per_token=\(1, 4\)"),
        ({"k": 1, "per_token": (2, 1)}, "floor above its cap"),
        ({"k": 1, "per_token": (0.5, 2)}, r"per_token=\(0.5, 2\) counts experts"),
        ({"k": 1, "per_token": 2}, "per_token=2 is no pair"),
        ({"k": 1, "per_token": (-1, 2)}, "no pair"),
        ({"k": 1, "per_expert": (0, 0.9)}, r"per_expert=\(0, 0.9\).*lo <= 1 <= hi"),
        ({"k": 1, "per_expert": (1.1, 2)}, "lo <= 1 <= hi"),
        ({"k": 1, "per_expert": (0, float("nan"))}, "no pair"),
        ({"k": 1.5, "pool": "token"}, "k=1.5 is impossible"),
        ({"k": 1, "pool": "prefix"}, "pool='prefix'.*sequence, batch, time_step, token"),
        ({"k": 1, "pool": "token", "expert_score": "softmax_tokens"}, "softmax_tokens needs a pool"),
    ],
    ids=str,
)
def test_bounds_that_cannot_be_are_refused(fields: dict, says: str):
    with pytest.raises(ValueError, match=says):
        BoundedChoice(**fields)


def test_k_of_the_host_must_lie_within_the_bounds():
    with pytest.raises(ValueError, match=r"k=8 .*per_token=\(1, 4\)"):
        BoundedChoice()(torch.zeros(1, 2, 16), host=usmoe.routing.Host(k=8))


@pytest.mark.parametrize("pool", ["sequence", "batch"])
def test_any_number_of_tokens_is_feasible(pool: Any):
    """floor and ceil of a share that is no whole number, down to no token at all."""
    for length in range(13):
        for router in (
            BoundedChoice(k=1.7, per_token=(1, 2), per_expert=(1, 1), pool=pool),
            BoundedChoice(k=2, per_token=(2, 2), per_expert=(0.9, 1.1), pool=pool),
            BoundedChoice(k=0.4, per_token=(0, 1), per_expert=(1, 3), pool=pool),
        ):
            logits = torch.randn(2, length, 5, generator=torch.Generator().manual_seed(length))
            routing = usmoe.route(logits, router)
            pools = 2 if pool == "sequence" else 1
            assert len(routing.token) == pools * math.floor(router.k * 2 / pools * length + 0.5)
