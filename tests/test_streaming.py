"""Streaming routers by hand: the prefix pool, the bucket, the floor, the state, and what is refused.

That chunks equal the whole, that no prefix overspends, that prefixes do not look ahead: tests/test_laws.py, for all.
"""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import usmoe
from every_router import assert_same, grids, whole
from small_layer import layer, tokens
from usmoe import USMoE
from usmoe.routing import Host
from usmoe.routing.streaming import Stream

pytestmark = pytest.mark.portable

# Scores are sigmoids of these logits (alpha=1), so the logits rank. Two experts, four tokens:
#
#            e0   e1      floor(k*t + 0.5) at k=1   the best so far              token t takes
#   t=1       3    2      1                         3                            e0
#   t=2       1    0      2                         3 2                          nothing: 1 is third
#   t=3       4   -1      3                         4 3 2                        e0
#   t=4       5    6      4                         6 5 4 3                      e0, e1
#
# The sequence pool would take 6 5 4 3 of the whole: the same here, but for t=1, which it would not know of yet.
BY_HAND = torch.tensor([[[3.0, 2.0], [1.0, 0.0], [4.0, -1.0], [5.0, 6.0]]])
PREFIX = USMoE(k=1, alpha=1.0, pool="prefix")


def chosen(router: Any, logits: Tensor, **given: Any) -> list[list[int]]:
    """The experts of each token of the first sequence."""
    mask = usmoe.route(logits, router, **given).mask().view(logits.shape)[0]
    return [row.nonzero().flatten().tolist() for row in mask]


def test_prefix_by_hand():
    assert chosen(PREFIX, BY_HAND) == [[0], [], [0], [0, 1]]


def test_a_decision_is_never_revoked_so_the_budget_is_met_on_average_alone():
    falling = torch.tensor([[[4.0, 4.0], [3.0, 3.0], [2.0, 2.0], [1.0, 1.0]]])
    assert chosen(PREFIX, falling) == [[0], [], [], []]  # (1, e1) is second of two, (2, e0) third of two, ...
    assert chosen(PREFIX, falling.flip(1)) == [[0], [0, 1], [0, 1], [0, 1]]


def test_half_an_expert_a_token():
    """floor(t/2 + 0.5) = 1, 1, 2, 2."""
    assert chosen(dataclasses.replace(PREFIX, k=0.5), BY_HAND) == [[0], [], [0], [0, 1]]
    assert chosen(dataclasses.replace(PREFIX, k=0.5), BY_HAND.flip(1)) == [[1], [], [], []]


def test_the_earlier_token_wins_a_tie():
    assert chosen(PREFIX, torch.zeros(1, 4, 2)) == [[0], [], [], []]  # the two of token 1 are the two best for ever
    assert chosen(dataclasses.replace(PREFIX, k=2), torch.zeros(1, 3, 2)) == [[0, 1]] * 3


def test_the_cut_of_a_prefix_pool_is_that_of_its_last_token():
    routing = usmoe.route(BY_HAND, PREFIX)
    assert routing.cut is not None
    (cut,) = routing.cut.tolist()
    assert torch.tensor([2.0, 3.0]).sigmoid().mean().item() == pytest.approx(cut)  # 6 5 4 3 | 2
    assert usmoe.route(BY_HAND, USMoE(k=1, alpha=1.0)).cut == pytest.approx(cut)


#            e0   e1      wants (>= sigmoid(0))   k*t + burst, k=1, burst=1    may spend    takes
#   t=1       3    2      2                       2                            2            e0, e1
#   t=2       1    5      2                       3                            1            e1, its best
#   t=3      -1   -2      0                       4                            1            nothing
#   t=4       5    6      2                       5                            2            e0, e1
BUCKET = torch.tensor([[[3.0, 2.0], [1.0, 5.0], [-1.0, -2.0], [5.0, 6.0]]])
THRESHOLD = USMoE(k=1, alpha=1.0, expert_score="sigmoid", pool="threshold", threshold=0.5, burst=1)


def test_the_bucket_by_hand():
    assert chosen(THRESHOLD, BUCKET) == [[0, 1], [1], [], [0, 1]]
    assert chosen(dataclasses.replace(THRESHOLD, burst=None), BUCKET) == [[0, 1], [0, 1], [], [0, 1]]
    assert chosen(dataclasses.replace(THRESHOLD, burst=0), BUCKET) == [[0], [1], [], [0, 1]]


def test_the_floor_outranks_the_threshold():
    assert chosen(dataclasses.replace(THRESHOLD, min_experts=1), BUCKET) == [[0, 1], [1], [0], [1]]
    assert chosen(dataclasses.replace(THRESHOLD, min_experts=1, burst=None), BUCKET) == [[0, 1], [0, 1], [0], [0, 1]]


def test_padding_fills_no_bucket():
    padded = torch.cat([BUCKET[:, :1], torch.full((1, 5, 2), 9.0), BUCKET[:, 1:]], 1)
    valid = torch.tensor([[True] + [False] * 5 + [True] * 3])
    assert chosen(THRESHOLD, padded, valid=valid) == [[0, 1], *[[]] * 5, [1], [], [0, 1]]


def test_a_new_segment_begins_with_a_full_bucket():
    segments = torch.tensor([[7, 8, 8, 8]])
    assert chosen(THRESHOLD, BUCKET, segments=segments) == [[0, 1], [0, 1], [], [0, 1]]
    first = usmoe.route(BUCKET[:, :1], THRESHOLD, segments=segments[:, :1])
    for ids, takes in ((7, [1]), (8, [0, 1])):  # in the next chunk: the same segment goes on, or a new one begins
        routing = usmoe.route(BUCKET[:, 1:2], THRESHOLD, segments=torch.tensor([[ids]]), state=first.state)
        assert routing.expert.tolist() == takes


# ---- the state


def test_a_sequence_token_by_token():
    for router in (PREFIX, dataclasses.replace(PREFIX, burst=0), THRESHOLD):
        state, rows = None, []
        for t in range(4):
            routing = usmoe.route(BY_HAND[:, t : t + 1], router, state=state)
            rows.append(routing.expert.tolist())
            state = routing.state
        assert rows == chosen(router, BY_HAND)


def test_the_state_holds_what_it_says():
    """Three integers a sequence; under prefix, the scores of all pairs that could be chosen."""
    logits, valid = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0)), torch.ones(3, 7, dtype=torch.bool)
    logits[0, 0, :] = -torch.inf
    valid[1, 2:5] = False
    valid[2] = False
    routing = usmoe.route(logits.requires_grad_(), USMoE(k=1.5, pool="prefix"), valid=valid)
    state = routing.state
    assert state.tokens.tolist() == [7, 4, 0]
    assert state.used.tolist() == routing.experts_per_token.view(3, 7).sum(1).tolist()
    assert (state.scores > -torch.inf).sum(1).tolist() == [24, 16, 0]
    assert state.scores.shape == (3, 24)
    assert not state.scores.requires_grad
    assert usmoe.route(logits, THRESHOLD, valid=valid).state.scores is None
    assert usmoe.route(logits, USMoE(pool="threshold", threshold=0.1)).state is None  # remembers nothing


def test_the_state_of_a_bucket_does_not_grow():
    state, sizes = None, set()
    for _ in range(5):
        state = usmoe.route(torch.randn(2, 50, 4), THRESHOLD, state=state).state
        sizes.add(len(pickle.dumps(state)))
    assert len(sizes) == 1


def test_a_chunk_without_a_token_changes_nothing():
    first = usmoe.route(BY_HAND[:, :2], PREFIX)
    for nothing, valid in ((BY_HAND[:, :0], None), (BY_HAND[:, 2:], torch.zeros(1, 2, dtype=torch.bool))):
        between = usmoe.route(nothing, PREFIX, valid=valid, state=first.state)
        assert len(between.token) == 0
        assert_same(
            grids(usmoe.route(BY_HAND[:, 2:], PREFIX, state=between.state), BY_HAND[:, 2:]),
            grids(usmoe.route(BY_HAND[:, 2:], PREFIX, state=first.state), BY_HAND[:, 2:]),
        )


def test_a_smaller_budget_waits_until_it_has_caught_up():
    """The state of k=2 handed to k=1: 4 used after 2 tokens, so nothing before 1*t > 4."""
    free = dataclasses.replace(THRESHOLD, k=2, threshold=0.0)
    state = usmoe.route(torch.zeros(1, 2, 2), free).state
    less = dataclasses.replace(THRESHOLD, threshold=0.0, burst=0)
    assert usmoe.route(torch.zeros(1, 4, 2), less, state=state).experts_per_token.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("router", [PREFIX, THRESHOLD], ids=str)
def test_a_state_that_does_not_fit_is_refused(router: Any):
    state = usmoe.route(BY_HAND, router).state
    with pytest.raises(ValueError, match="state is that of 1 sequences, and this chunk has 2"):
        usmoe.route(BY_HAND.repeat(2, 1, 1), router, state=state)
    with pytest.raises(TypeError, match=r"a dict\. Give routing\.state"):
        usmoe.route(BY_HAND, router, state={})
    with pytest.raises(ValueError, match="comes from another router"):
        usmoe.route(BY_HAND, THRESHOLD if router is PREFIX else PREFIX, state=state)
    with pytest.raises(ValueError, match="keeps no state"):
        usmoe.route(BY_HAND, USMoE(k=1), state=state)


def test_a_state_begins_empty():
    begun = Stream.begin(1, 2, torch.device("cpu"), torch.float32)
    assert_same(grids(usmoe.route(BY_HAND, PREFIX, state=begun), BY_HAND), whole(PREFIX, BY_HAND))


# ---- fields that cannot be


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"k": 1, "burst": 4}, "burst=4 has no meaning with pool=sequence.*token, threshold or prefix"),
        ({"k": 1, "pool": "batch", "min_experts": 1}, "min_experts=1 has no meaning with pool=batch"),
        ({"k": 1, "pool": "prefix", "burst": -1}, "burst=-1 is no size of a bucket"),
        ({"k": 1, "pool": "prefix", "burst": float("inf")}, "burst=inf"),
        ({"k": 1, "pool": "prefix", "burst": "8"}, "burst='8'"),
        ({"k": 1, "pool": "prefix", "min_experts": 2}, "min_experts=2 is more than the 1 experts"),
        ({"k": 1, "pool": "prefix", "min_experts": 0.5}, "min_experts=0.5 is no number"),
        ({"k": 1, "pool": "prefix", "min_experts": -1}, "min_experts=-1"),
        ({"k": 1, "pool": "prefix", "expert_score": "softmax_tokens"}, "softmax_tokens needs a pool"),
        ({"k": 1, "pool": "prefix", "threshold": 0.5}, "threshold=0.5 has no meaning with pool=prefix"),
    ],
    ids=lambda x: str(x)[:50],
)
def test_a_field_that_cannot_be_is_refused(fields: dict, says: str):
    with pytest.raises(ValueError, match=says):
        USMoE(**fields)


def test_what_only_the_host_can_tell_is_refused_at_the_call():
    with pytest.raises(ValueError, match="k is missing"):
        usmoe.route(BY_HAND, USMoE(pool="threshold", threshold=0.1, burst=4))
    with pytest.raises(ValueError, match="min_experts=3 is more than the 2 experts"):
        usmoe.route(BY_HAND, USMoE(pool="threshold", threshold=0.1, min_experts=3))
    with pytest.raises(ValueError, match="min_experts=2 is more than the 1 experts"):
        USMoE(pool="threshold", threshold=0.1, min_experts=2)(BY_HAND, host=Host(k=1))


# ---- in a layer


@pytest.mark.parametrize(
    "router", [USMoE(k=1.5, pool="prefix", burst=2), USMoE(k=1.5, pool="threshold", threshold=0.25)]
)
def test_a_layer_streams_with_gradients(router: Any):
    """Outputs, and the gradient of every parameter, in chunks as in one piece."""
    moe, x = layer(router), tokens()
    y, _ = moe(x)
    together = torch.autograd.grad(y.square().sum(), list(moe.parameters()))
    state, parts = None, []
    for part in x.split(2, 1):
        piece, out = moe(part, state=state)
        state = out.routing.state
        parts.append(piece)
    chunked = torch.cat(parts, 1)
    torch.testing.assert_close(chunked, y, rtol=0, atol=1e-12)
    pieces = torch.autograd.grad(chunked.square().sum(), list(moe.parameters()))
    for one, other in zip(pieces, together, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_an_ample_bucket_and_no_floor_change_nothing(seed: int):
    """Also with a threshold an expert, where a token's best pairs are those that lie highest above their threshold."""
    logits = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    for router in (
        USMoE(k=1, pool="threshold", threshold=(0.3, 0.1, 0.2, 0.4)),
        USMoE(k=1, pool="threshold", threshold=0.2),
        USMoE(k=1, pool="prefix"),
    ):
        free = whole(router, logits)
        assert_same(whole(dataclasses.replace(router, burst=1000), logits), free)
        floor = whole(dataclasses.replace(router, min_experts=1), logits)[0]
        served = free[0].any(-1)
        assert torch.equal(floor[served], free[0][served])
        assert (floor[~served].sum(-1) == 1).all()


def test_a_state_follows_the_dtype_of_the_chunk_and_not_the_number_of_experts():
    first = usmoe.route(BY_HAND[:, :2].double(), PREFIX)
    assert usmoe.route(BY_HAND[:, 2:], PREFIX, state=first.state).expert.tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="comes from another router"):
        usmoe.route(torch.zeros(1, 2, 3), PREFIX, state=first.state)
