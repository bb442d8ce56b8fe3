"""Golden cases in float64: each rule once by hand, and the grid of all options against the loops of reference.py.

By hand: logits are the logarithms of A, so that softmax is a row over its sum and sigmoid is a / (1 + a).

         A, B=2, L=3, E=3     softmax over experts      sigmoid
    t0    6   3   1           .60    .30    .10         6/7    3/4     1/2
    t1    2   7  11           .10    .35    .55         2/3    7/8    11/12
    t2    9   1   2           3/4    1/12   1/6         9/10   1/2     2/3
    t3   45   3   2           .90    .06    .04         45/46  3/4     2/3
    t4   42  33  25           .42    .33    .25         42/43  33/34  25/26
    t5   45  34  21           .45    .34    .21         45/46  34/35  21/22

    Over the tokens of t0 t1 t2, the columns sum to 17, 11, 14.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
import usmoe
from every_router import oracle, pairs
from usmoe import ExpertChoice, TokenChoice, USMoE

A = [[[6, 3, 1], [2, 7, 11], [9, 1, 2]], [[45, 3, 2], [42, 33, 25], [45, 34, 21]]]
LOGITS = torch.tensor(A, dtype=torch.float64).log()
FIRST = LOGITS[:1]

# The unified scores of t0 t1 t2 at alpha = 1/2: the mean of the token's softmax and
#   sigmoid             2/3 sigmoid (E=3)       softmax over the tokens
#   .7286 .5250 .3000   .5857 .4000 .2167       .4765 .2864 .0857
#   .3833 .6125 .7333   .2722 .4667 .5806       .1088 .4932 .6679
#   .8250 .2917 .4167   .6750 .2083 .3056       .6397 .0871 .1548
ALGORITHM_1 = {
    (0, 0): (6 / 10 + 6 / 7) / 2,
    (0, 1): (3 / 10 + 3 / 4) / 2,
    (1, 1): (7 / 20 + 7 / 8) / 2,
    (1, 2): (11 / 20 + 11 / 12) / 2,
    (2, 0): (9 / 12 + 9 / 10) / 2,
}
SCALED = {
    (0, 0): (6 / 10 + 4 / 7) / 2,
    (0, 1): (3 / 10 + 1 / 2) / 2,
    (1, 1): (7 / 20 + 7 / 12) / 2,
    (1, 2): (11 / 20 + 11 / 18) / 2,
    (2, 0): (9 / 12 + 3 / 5) / 2,
}
DEFINITION_3_2 = {
    (0, 0): (6 / 10 + 6 / 17) / 2,
    (1, 1): (7 / 20 + 7 / 11) / 2,
    (1, 2): (11 / 20 + 11 / 14) / 2,
    (2, 0): (9 / 12 + 9 / 17) / 2,
}
# alpha = 0, k = 1.5: the softmax alone. A sequence has floor(1.5*3 + .5) = 5 pairs, the batch floor(9.5) = 9, a time
# step of two tokens 3. Ranks: sequence 0 .75 .6 .55 .35 .3 | .1667, sequence 1 .9 .45 .42 .34 .33 | .25;
# batch .9 .75 .6 .55 .45 .42 .35 .34 .33 | .3; steps .9 .6 .3 | .1, .55 .42 .35 | .33, .75 .45 .34 | .21.
OF_BOTH = {(0, 0): 0.6, (1, 1): 0.35, (1, 2): 0.55, (2, 0): 0.75, (3, 0): 0.9, (4, 0): 0.42, (5, 0): 0.45, (5, 1): 0.34}
OF_SEQUENCES = OF_BOTH | {(0, 1): 0.3, (4, 1): 0.33}
OF_THE_BATCH = OF_BOTH | {(4, 1): 0.33}
OF_TIME_STEPS = OF_BOTH | {(0, 1): 0.3}

BY_HAND: list[tuple[Any, Tensor, dict]] = [
    (USMoE(k=1.5, expert_score="sigmoid"), FIRST, ALGORITHM_1),
    (USMoE(k=1.5), FIRST, SCALED),
    (USMoE(k=4 / 3, expert_score="softmax_tokens"), FIRST, DEFINITION_3_2),  # floor(4.5) = 4 pairs
    (USMoE(k=0.5, alpha=0.0), FIRST, {(0, 0): 0.6, (2, 0): 0.75}),  # floor(1.5 + .5) = 2: a half is rounded up
    (USMoE(k=1, alpha=1.0, expert_score="sigmoid"), FIRST, {(1, 1): 7 / 8, (1, 2): 11 / 12, (2, 0): 9 / 10}),
    (USMoE(k=1.5, alpha=0.0), LOGITS, OF_SEQUENCES),
    (USMoE(k=1.5, alpha=0.0, pool="batch"), LOGITS, OF_THE_BATCH),
    (USMoE(k=1.5, alpha=0.0, pool="time_step"), LOGITS, OF_TIME_STEPS),
    (USMoE(k=1, alpha=0.0, pool="token"), FIRST, {(0, 0): 0.6, (1, 2): 0.55, (2, 0): 0.75}),
    (USMoE(alpha=0.0, pool="threshold", threshold=0.32), FIRST, {k: OF_BOTH[k] for k in OF_BOTH if k[0] < 3}),
    # the chosen scores of t0 sum to .9, of t1 to .9, of t2 to .75
    (
        USMoE(k=1.5, alpha=0.0, normalize="chosen"),
        FIRST,
        {(0, 0): 6 / 9, (0, 1): 3 / 9, (1, 1): 35 / 90, (1, 2): 55 / 90, (2, 0): 1.0},
    ),
    # all scores of t1 (sigmoid alone): 2/3 + 7/8 + 11/12 = 59/24; of t2: 9/10 + 1/2 + 2/3 = 31/15
    (
        USMoE(k=1, alpha=1.0, expert_score="sigmoid", normalize="all"),
        FIRST,
        {(1, 1): 21 / 59, (1, 2): 22 / 59, (2, 0): 27 / 62},
    ),
    (TokenChoice(k=1), FIRST, {(0, 0): 0.6, (1, 2): 0.55, (2, 0): 0.75}),
    (
        TokenChoice(k=2),
        FIRST,
        {(0, 0): 0.6, (0, 1): 0.3, (1, 1): 0.35, (1, 2): 0.55, (2, 0): 3 / 4, (2, 2): 1 / 6},
    ),
    (  # the softmax of the two chosen logits: 6:3, 7:11, 9:2
        TokenChoice(k=2, score_order="topk_then_score"),
        FIRST,
        {(0, 0): 6 / 9, (0, 1): 3 / 9, (1, 1): 7 / 18, (1, 2): 11 / 18, (2, 0): 9 / 11, (2, 2): 2 / 11},
    ),
    (TokenChoice(k=1, score="sigmoid", normalize="chosen"), FIRST, {(0, 0): 1.0, (1, 2): 1.0, (2, 0): 1.0}),
    # expert choice: floor(1*3/3 + .5) = 1 token an expert, the largest of its column
    (ExpertChoice(k=1), FIRST, {(2, 0): 9 / 10, (1, 1): 7 / 8, (1, 2): 11 / 12}),
    (ExpertChoice(k=1, score="softmax_tokens"), FIRST, {(2, 0): 9 / 17, (1, 1): 7 / 11, (1, 2): 11 / 14}),
    (ExpertChoice(k=1, score="softmax_experts"), FIRST, {(2, 0): 0.75, (1, 1): 0.35, (1, 2): 0.55}),
    # per batch floor(.5*6/3 + .5) = 1 token: of column 0 the first 45 (t3 and t5 tie), of the others 34 and 25
    (ExpertChoice(k=0.5, pool="batch"), LOGITS, {(3, 0): 45 / 46, (5, 1): 34 / 35, (4, 2): 25 / 26}),
    # 45/46 = .978 and 42/43 = .977; 34/35 = .971 and 33/34 = .9706; 25/26 = .962 and 21/22 = .955
    (
        ExpertChoice(pool="threshold", threshold=(0.9775, 0.971, 0.9)),
        LOGITS,
        {(3, 0): 45 / 46, (5, 0): 45 / 46, (5, 1): 34 / 35, (1, 2): 11 / 12, (4, 2): 25 / 26, (5, 2): 21 / 22},
    ),
]


def assert_routes(routing: usmoe.Routing, expected: dict[tuple[int, int], float]):
    assert pairs(routing) == sorted(expected, key=lambda pair: (pair[1], pair[0]))
    assert routing.weight.tolist() == pytest.approx([expected[pair] for pair in pairs(routing)], rel=0, abs=1e-12)


@pytest.mark.parametrize(("router", "logits", "expected"), BY_HAND, ids=lambda x: str(x) if callable(x) else "")
def test_by_hand(router: Any, logits: Tensor, expected: dict):
    assert_routes(usmoe.route(logits, router), expected)
    assert oracle(router, logits).weight == pytest.approx(expected, abs=1e-12)


def test_by_hand_the_sixth_pair_tells_the_raw_sigmoid_from_the_scaled():
    """k = 2: the sixth best of nine. Raw .4167 at (2, 2); column softmax .1548 at (2, 2) too; scaled .3056."""
    for score, weight in (("sigmoid", 5 / 12), ("scaled_sigmoid", 11 / 36), ("softmax_tokens", 13 / 84)):
        routing = usmoe.route(FIRST, USMoE(k=2, expert_score=score))
        assert routing.dense()[2, 2].item() == pytest.approx(weight, abs=1e-12)


def test_by_hand_padding_is_masked_or_competes():
    """t2 is padding. Masked: floor(1.5*2 + .5) = 3 pairs of t0 and t1: .6 .55 .35. As released: as if it were real."""
    valid = torch.tensor([[True, True, False]])
    masked = usmoe.route(FIRST, USMoE(k=1.5, alpha=0.0), valid=valid)
    assert_routes(masked, {(0, 0): 0.6, (1, 1): 0.35, (1, 2): 0.55})
    released = usmoe.route(FIRST, USMoE(k=1.5, alpha=0.0, mask_padding=False), valid=valid)
    assert_routes(released, {(0, 0): 0.6, (0, 1): 0.3, (1, 1): 0.35, (1, 2): 0.55, (2, 0): 0.75})
    columns = usmoe.route(FIRST, ExpertChoice(k=1, score="softmax_tokens"), valid=valid)  # of t0 and t1 alone
    assert_routes(columns, {(0, 0): 6 / 8, (1, 1): 7 / 10, (1, 2): 11 / 12})


def test_by_hand_the_order_of_token_choice_shows_where_the_softmax_underflows():
    """In float32 exp(-200) and exp(-190) are both 0: as scores they tie (the lower expert), as logits they do not."""
    logits = torch.tensor([[[0.0, -200.0, -190.0]]])
    assert pairs(usmoe.route(logits, TokenChoice(k=2))) == [(0, 0), (0, 1)]
    assert pairs(usmoe.route(logits, TokenChoice(k=2, score_order="topk_then_score"))) == [(0, 0), (0, 2)]


def test_by_hand_each_expert_takes_at_least_one_token():
    """k = 0.5, S = 3, E = 3: floor(.5 + .5) = 1. k = 0.1: floor(.6) = 0, but an expert never goes without."""
    for k in (0.5, 0.1):
        assert usmoe.route(FIRST, ExpertChoice(k=k)).load.tolist() == [1, 1, 1]


def test_by_hand_the_cut_lies_midway():
    """alpha = 0, k = 1.5: between .3 and 1/6 in sequence 0, between .33 and .25 in sequence 1."""
    cut = usmoe.route(LOGITS, USMoE(k=1.5, alpha=0.0)).cut
    assert cut is not None
    assert cut.tolist() == pytest.approx([(0.3 + 1 / 6) / 2, 0.29], abs=1e-12)
    cut = usmoe.route(LOGITS, USMoE(k=3)).cut  # all were chosen
    assert cut is not None
    assert cut.tolist() == [-torch.inf, -torch.inf]
    cut = usmoe.route(LOGITS, USMoE(k=0.1)).cut  # none was
    assert cut is not None
    assert cut.tolist() == [torch.inf, torch.inf]
    cut = usmoe.route(FIRST, ExpertChoice(k=1, score="softmax_experts")).cut  # .75|.6, .35|.3, .55|.1667
    assert cut is not None
    assert cut.tolist() == [pytest.approx([0.675, 0.325, (0.55 + 1 / 6) / 2], abs=1e-12)]


def test_by_hand_segments():
    """t0 alone and t1 t2 together, k = 0.5: floor(1) = 1 pair and floor(1.5) = 1 pair, where one pool has 2."""
    segments = torch.tensor([[7, 3, 3]])
    assert_routes(usmoe.route(FIRST, USMoE(k=0.5, alpha=0.0), segments=segments), {(0, 0): 0.6, (2, 0): 0.75})
    by_experts = usmoe.route(FIRST, ExpertChoice(k=1), segments=segments)  # max(1, .) token an expert of each
    assert_routes(
        by_experts, {(0, 0): 6 / 7, (0, 1): 3 / 4, (0, 2): 1 / 2, (2, 0): 9 / 10, (1, 1): 7 / 8, (1, 2): 11 / 12}
    )


# ---- the grid against the loops

FIXED = torch.tensor(
    [
        [
            [1.62, -0.71, 0.33, 2.05, -1.48],
            [-0.27, 3.14, -2.20, 0.58, 0.91],
            [0.46, 0.12, -0.95, 1.37, 2.66],
            [-3.01, 1.19, 0.77, -0.64, 0.05],
        ],
        [
            [2.41, 2.09, -1.16, -0.38, 0.83],
            [0.24, -1.85, 4.02, 1.03, -0.52],
            [-0.09, 0.68, 1.51, -2.73, 3.37],
            [1.94, -0.16, -0.87, 2.79, 1.25],
        ],
    ],
    dtype=torch.float64,
)
PADDING = torch.tensor([[False, True, True, True], [True, True, False, False]])

POOLS = ("sequence", "batch", "time_step")
GRID: list[Any] = [
    *(
        USMoE(k=k, alpha=alpha, expert_score=score, pool=pool, mask_padding=masked)
        for k, alpha, score, pool, masked in itertools.product(
            (0.75, 1.5, 2, 3.3), (0, 0.3, 0.7, 1), ("sigmoid", "scaled_sigmoid", "softmax_tokens"), POOLS, (True, False)
        )
    ),
    *(
        USMoE(k=1.5, expert_score=score, pool=pool, normalize=normalize, token_score=token_score)
        for score, pool, normalize, token_score in itertools.product(
            ("sigmoid", "scaled_sigmoid", "softmax_tokens"), POOLS, ("none", "all", "chosen"), ("softmax", "sigmoid")
        )
    ),
    *(
        ExpertChoice(k=k, score=score, pool=pool)
        for k, score, pool in itertools.product(
            (0.5, 1, 1.5, 4), ("sigmoid", "softmax_tokens", "softmax_experts"), ("sequence", "batch")
        )
    ),
    *(
        TokenChoice(k=k, score=score, normalize=normalize, score_order=order)
        for k, score, normalize, order in itertools.product(
            (1, 2, 4), ("softmax", "sigmoid"), ("none", "all", "chosen"), ("score_then_topk", "topk_then_score")
        )
    ),
    *(USMoE(alpha=a, pool="threshold", threshold=tau) for a, tau in itertools.product((0, 0.5, 1), (0.05, 0.2, 0.36))),
]


@pytest.mark.parametrize("valid", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("router", GRID, ids=str)
def test_the_grid_equals_the_loops(router: Any, valid: Tensor | None):
    assert_routes(usmoe.route(FIXED, router, valid=valid), oracle(router, FIXED, valid).weight)


def test_the_budget_of_the_loops_is_that_of_the_paper_and_of_its_code():
    """n = k*L of the code, rounded half up where k is fractional."""
    assert [reference.budget(k, 4) for k in (1, 2, 1.5, 0.75, 3.3, 0.1, 0.125)] == [4, 8, 6, 3, 13, 0, 1]
