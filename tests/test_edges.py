"""Edges that every router meets: ties, dtypes, nothing to route, one of everything, -inf, NaN, and gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import usmoe
from every_router import (
    ALL_ROUTERS,
    Batch,
    Hosted,
    assert_same,
    batches,
    fit,
    grids,
    laws,
    oracle,
    pairs,
    plain,
    whole,
)
from usmoe import ExpertChoice, Routing, TokenChoice, USMoE

every = pytest.mark.parametrize("router", ALL_ROUTERS, ids=str)


# ---- ties: the lower flat index wins


BOUND_ON_BOTH_SIDES = [r for r in ALL_ROUTERS if getattr(plain(r), "per_token", None) and plain(r).per_expert]
"""Of equal optima one of low indices, which need not be what a greedy selection would say."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("router", [r for r in ALL_ROUTERS if r not in BOUND_ON_BOTH_SIDES], ids=str)
@given(seed=st.integers(0, 2**20), length=st.integers(2, 9), experts=st.integers(1, 6))
@laws
def test_the_lower_flat_index_wins_a_tie(router: Any, dtype: torch.dtype, seed: int, length: int, experts: int):
    """Three values fill the logits; the oracle sums exactly, so equal rows and columns have equal scores there."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(3, generator=random) * 2
    logits = values[torch.randint(3, (2, length, experts), generator=random)].to(dtype)
    router = fit(router, experts)
    assert pairs(usmoe.route(logits, router)) == oracle(router, logits.double()).pairs


@pytest.mark.parametrize("size", [(12, 17), (23, 7), (64, 3)])
@pytest.mark.parametrize("expert_score", ["scaled_sigmoid", "sigmoid"])
def test_equal_logits_have_equal_scores_wherever_they_stand(expert_score: Any, size: tuple[int, int]):
    """One value everywhere: the budget goes to the first pairs. Vectorised kernels round their last elements apart."""
    router = USMoE(k=0.5, alpha=1.0, expert_score=expert_score)
    for seed in range(40):
        logits = torch.randn((), generator=torch.Generator().manual_seed(seed)).expand(1, *size)
        routing = usmoe.route(logits, router)
        assert len(routing.weight.unique()) == 1
        assert sorted(routing.pair.tolist()) == list(range(round(size[0] / 2)))


# ---- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every
def test_half_precision_logits_are_routed_as_their_float32_values(router: Any, dtype: torch.dtype):
    logits = (torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(3)) * 2).to(dtype)
    router = fit(router, 5)
    routing = usmoe.route(logits, router)
    assert routing.weight.dtype == torch.float32
    assert_same(grids(routing, logits), whole(router, logits.float()), tolerance=0)


@every
def test_float32_agrees_with_float64(router: Any):
    logits = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(5)) * 2
    router = fit(router, 5)
    (mask, weight), (exact_mask, exact) = whole(router, logits), whole(router, logits.double())
    assert (weight.dtype, exact.dtype) == (torch.float32, torch.float64)
    assert_same((mask, weight.double()), (exact_mask, exact), tolerance=1e-6)


# ---- nothing to route, one of everything


@pytest.mark.parametrize(("sequences", "length"), [(0, 4), (2, 0), (0, 0)])
@every
def test_an_empty_batch_routes_nothing(router: Any, sequences: int, length: int):
    logits = torch.randn(sequences, length, 5, requires_grad=True)
    router = fit(router, 5)
    routing = usmoe.route(logits, router, valid=torch.ones(sequences, length, dtype=torch.bool))
    assert (len(routing.token), routing.num_tokens, routing.sequences) == (0, 0, sequences)
    assert routing.load.tolist() == [0] * 5
    segments = torch.zeros(sequences, length, dtype=torch.long)
    assert len(usmoe.route(logits, router, segments=segments).token) == 0
    routing.weight.sum().backward()
    assert logits.grad is not None
    assert logits.grad.shape == logits.shape


@every
def test_a_fully_padded_sequence_gets_nothing_and_takes_nothing(router: Any):
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    valid = torch.tensor([[True] * 4, [False] * 4, [True, True, False, True]])
    router = fit(router, 5)
    mask, weight = whole(router, logits, valid)
    if getattr(plain(router), "mask_padding", True):
        assert not mask[1].any()
        assert_same((mask[[0, 2]], weight[[0, 2]]), whole(router, logits[[0, 2]], valid[[0, 2]]))
        nothing = whole(router, logits, torch.zeros_like(valid))
        assert not nothing[0].any()
    else:  # the released code: padding competes
        assert_same((mask, weight), whole(router, logits))


@every
@given(batch=batches(length=1, experts=1))
@laws
def test_one_token_and_one_expert(router: Any, batch: Batch):
    router = fit(router, 1)
    routing = usmoe.route(batch.logits, router, valid=batch.valid)
    assert pairs(routing) == oracle(router, batch.logits, batch.valid).pairs
    assert torch.isfinite(routing.weight).all()


CHOOSES_BY_K = [
    router
    for router in ALL_ROUTERS
    if getattr(plain(router), "threshold", None) is None
    and plain(router).name != "relu_choice"
    and (getattr(plain(router), "per_token", None) or (0, 3))[1] >= 3
]


@pytest.mark.parametrize("router", CHOOSES_BY_K, ids=str)
def test_k_of_all_experts_chooses_every_real_pair(router: Any):
    logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(2))
    valid = torch.tensor([[True, True, True, False], [True, True, True, True]])
    if isinstance(router, Hosted):
        router = Hosted(replace(router.router, k=3), replace(router.host, bias=None))
    else:
        router = replace(router, k=3)
    mask, weight = whole(router, logits, valid)
    counted = valid if getattr(plain(router), "mask_padding", True) else torch.ones_like(valid)
    assert mask.tolist() == counted[..., None].expand_as(mask).tolist()
    assert torch.isfinite(weight).all()


# ---- -inf, NaN, +inf


def _never(shape: tuple[int, ...], case: str, random: torch.Generator) -> Tensor:
    """Which logits are -inf: some, whole tokens, whole experts, all but one, or all."""
    if case == "some":
        return torch.rand(shape, generator=random) < 0.4
    never = torch.zeros(shape, dtype=torch.bool)
    if case == "tokens":
        never[:, ::2] = True
    elif case == "experts":
        never[..., 1:] = True
    else:
        never[:] = True
        never.view(-1)[-1] = case == "all"
    return never


@pytest.mark.parametrize("case", ["some", "tokens", "experts", "all but one", "all"])
@every
def test_a_logit_of_minus_infinity_is_never_chosen(router: Any, case: str):
    random = torch.Generator().manual_seed(8)
    logits = torch.randn(2, 4, 5, generator=random, dtype=torch.float64) * 2
    never = _never(logits.shape, case, random)
    logits = logits.masked_fill(never, -torch.inf).requires_grad_()
    router = fit(router, 5)
    routing = usmoe.route(logits, router)
    assert not (routing.mask().view_as(never) & never).any()
    assert torch.isfinite(routing.weight).all()
    answer = oracle(router, logits)
    assert pairs(routing) == answer.pairs
    assert routing.weight.tolist() == pytest.approx([answer.weight[p] for p in answer.pairs], abs=1e-12)
    routing.weight.square().sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[never].any()


@pytest.mark.parametrize(("value", "name"), [(math.nan, "NaN"), (math.inf, r"\+inf")])
@every
def test_nan_and_plus_infinity_are_refused_by_name(router: Any, value: float, name: str):
    logits = torch.randn(2, 3, 5)
    logits[1, 2, 3] = value
    with pytest.raises(ValueError, match=rf"1 of 30 logits are {name}\..*finite"):
        usmoe.route(logits, fit(router, 5))


def test_nan_in_padding_is_refused_only_where_padding_competes():
    logits, valid = torch.randn(1, 3, 4), torch.tensor([[True, True, False]])
    logits[0, 2] = math.nan
    assert usmoe.route(logits, USMoE(k=1), valid=valid).token.max() < 2
    with pytest.raises(ValueError, match="4 of 12 logits are NaN"):
        usmoe.route(logits, USMoE(k=1, mask_padding=False), valid=valid)


# ---- gradients


@every
@given(batch=batches(length=4, experts=4))
@laws
def test_weights_have_the_gradient_of_the_oracle(router: Any, batch: Batch):
    router = fit(router, batch.logits.shape[-1])
    leaf = batch.logits.clone().requires_grad_()
    ours = usmoe.route(leaf, router, valid=batch.valid)
    factors = batch.normal(len(ours.weight))
    (gradient,) = torch.autograd.grad((ours.weight * factors).sum() + 0 * leaf.sum(), leaf)

    leaf = batch.logits.clone().requires_grad_()
    answer = oracle(router, [[list(row) for row in sequence] for sequence in leaf], batch.valid)
    total = sum((answer.weight[p] * f for p, f in zip(answer.pairs, factors, strict=True)), 0 * leaf.sum())
    (expected,) = torch.autograd.grad(total, leaf)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


def test_padding_has_no_gradient_even_where_it_holds_nan():
    logits = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0))
    logits[0, 0] = math.nan
    valid = torch.tensor([[False, True, True, True]])
    for router in (USMoE(k=2, expert_score="softmax_tokens"), ExpertChoice(k=1), TokenChoice(k=2, normalize="chosen")):
        leaf = logits.clone().requires_grad_()
        usmoe.route(leaf, router, valid=valid).weight.sum().backward()
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()
        assert not leaf.grad[0, 0].any()


# ---- matrices


@every
@given(batch=batches())
@laws
def test_dense_and_back(router: Any, batch: Batch):
    router = fit(router, batch.logits.shape[-1])
    routing = usmoe.route(batch.logits, router, valid=batch.valid)
    back = Routing.from_dense(routing.dense(), routing.mask())
    assert pairs(back) == pairs(routing)
    assert back.weight.tolist() == routing.weight.tolist()
    assert routing.load.tolist() == routing.mask().sum(0).tolist()
    assert routing.experts_per_token.tolist() == routing.mask().sum(1).tolist()
