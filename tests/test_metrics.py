"""Every metric by hand, on one routing of two sequences of three tokens over three experts.

      e0   e1   e2      experts   valid
t0    x    x    .       2         real
t1    .    .    .       0         real
t2    x    .    .       1         real
t3    x    x    x       3         real
t4    .    x    .       1         padding
t5    .    .    .       0         padding

load  3    3    1       of all tokens; 3 2 1 of the real ones
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from usmoe import Routing, metrics

MASK = torch.tensor(
    [[[1, 1, 0], [0, 0, 0], [1, 0, 0]], [[1, 1, 1], [0, 1, 0], [0, 0, 0]]],
    dtype=torch.bool,
)
VALID = torch.tensor([[True, True, True], [True, False, False]])
ALL = Routing.from_dense(torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(0)), MASK)
REAL = dataclasses.replace(ALL, valid=VALID.flatten())
NOTHING = Routing.from_dense(torch.zeros(2, 3, 3), torch.zeros_like(MASK))
NO_TOKEN = Routing.from_dense(torch.zeros(0, 3, 3), torch.zeros(0, 3, 3, dtype=torch.bool))
NO_REAL = dataclasses.replace(ALL, valid=torch.zeros(6, dtype=torch.bool))


def same(value: float, expected: float) -> bool:
    return value == pytest.approx(expected, rel=0, abs=1e-12, nan_ok=True)


def test_experts_per_token():
    assert metrics.experts_per_token(ALL).tolist() == [2, 0, 1, 3, 1, 0]
    assert metrics.experts_per_token(REAL).tolist() == [2, 0, 1, 3]


def test_valid_may_be_given_beside_a_routing_that_does_not_say():
    for metric in (metrics.dropped, metrics.load_cv, metrics.load_entropy, metrics.unique_experts):
        assert same(metric(ALL, VALID), metric(REAL))
    assert metrics.experts_per_token(ALL, VALID).tolist() == [2, 0, 1, 3]
    assert metrics.load(ALL, VALID).tolist() == [3, 2, 1]


def test_dropped_and_underserved():
    """Of all: t1 and t5 of six. Of the real: t1 of four; with fewer than two experts t1 and t2, than 2.5 t0 as well."""
    assert same(metrics.dropped(ALL), 2 / 6)
    assert same(metrics.dropped(REAL), 1 / 4)
    assert same(metrics.underserved(REAL, 2), 2 / 4)
    assert same(metrics.underserved(REAL, 2.5), 3 / 4)
    assert same(metrics.dropped(NOTHING), 1.0)
    assert math.isnan(metrics.dropped(NO_TOKEN))
    assert math.isnan(metrics.dropped(NO_REAL))


def test_load():
    assert metrics.load(ALL).tolist() == ALL.load.tolist() == [3, 3, 1]
    assert metrics.load(REAL).tolist() == [3, 2, 1]
    assert metrics.load(NO_REAL).tolist() == [0, 0, 0]


def test_load_cv():
    """3 3 1: mean 7/3, variance ((2/3)^2 * 2 + (4/3)^2) / 3 = 8/9. 3 2 1: mean 2, variance 2/3."""
    assert same(metrics.load_cv(ALL), math.sqrt(8 / 9) / (7 / 3))
    assert same(metrics.load_cv(REAL), math.sqrt(2 / 3) / 2)
    assert math.isnan(metrics.load_cv(NOTHING))


def test_load_entropy():
    """3 2 1 of 6: -(1/2 ln 1/2 + 1/3 ln 1/3 + 1/6 ln 1/6) / ln 3."""
    entropy = (math.log(2) / 2 + math.log(3) / 3 + math.log(6) / 6) / math.log(3)
    assert same(metrics.load_entropy(REAL), entropy)
    assert math.isnan(metrics.load_entropy(NOTHING))


@pytest.mark.parametrize("experts", [1, 2, 3, 5, 16, 64])
def test_the_ends_of_the_load_metrics(experts: int):
    """Perfect balance: 0 and 1. One expert that does it all: sqrt(E - 1) and 0."""
    balanced = Routing.from_dense(torch.eye(experts), torch.eye(experts, dtype=torch.bool))
    assert same(metrics.load_cv(balanced), 0.0)
    assert same(metrics.load_entropy(balanced), 1.0)
    mask = torch.zeros(4, experts, dtype=torch.bool)
    mask[:, 0] = True
    alone = Routing.from_dense(mask.float(), mask)
    assert same(metrics.load_cv(alone), math.sqrt(experts - 1))
    assert same(metrics.load_entropy(alone), 1.0 if experts == 1 else 0.0)


def test_unique_experts():
    """Sequence 0 uses e0 e1, sequence 1 all three. Without t3 the second has e1 alone; without t4 too, nobody real."""
    assert same(metrics.unique_experts(ALL), 2.5)
    assert same(metrics.unique_experts(REAL), 2.5)
    assert same(metrics.unique_experts(ALL, torch.tensor([[True] * 3, [False, True, True]])), 1.5)
    assert same(metrics.unique_experts(ALL, torch.tensor([[False, True, True], [False] * 3])), 1.0)
    assert same(metrics.unique_experts(NOTHING), 0.0)
    assert math.isnan(metrics.unique_experts(NO_TOKEN))
    assert math.isnan(metrics.unique_experts(NO_REAL))


def test_overlap():
    """Seven pairs and their own first five share five of seven; disjoint ones none; the weights do not matter."""
    fewer = MASK.clone()
    fewer[1, 0, 2] = fewer[1, 1, 1] = False
    other = Routing.from_dense(torch.zeros(2, 3, 3), fewer)
    assert same(metrics.overlap(ALL, other), 5 / 7)
    assert same(metrics.overlap(other, ALL), 5 / 7)
    assert same(metrics.overlap(ALL, ALL), 1.0)
    assert same(metrics.overlap(ALL, Routing.from_dense(torch.zeros(2, 3, 3), ~MASK)), 0.0)
    assert same(metrics.overlap(NOTHING, NOTHING), 1.0)
    with pytest.raises(ValueError, match="6x3 with 0x3"):
        metrics.overlap(ALL, NO_TOKEN)
