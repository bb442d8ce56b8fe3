"""Routers as values: their text, their refusals, their defaults, and routers of the user's own."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from typing import Any

import pytest
import torch

import usmoe
from every_router import ALL_ROUTERS, assert_same, pairs, plain, whole
from usmoe import ExpertChoice, OwnChoice, Promises, Routing, TokenChoice, USMoE, parse_router
from usmoe.routing import Host
from usmoe.types import LOOK_AHEAD, promises_of

LOGITS = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)) * 2


# ---- text and dictionaries

TEXTS = [
    (USMoE(k=1.5, alpha=0.5), "usmoe(k=1.5, alpha=0.5)"),
    (USMoE(), "usmoe"),
    (USMoE(k="0.75x", pool="batch", mask_padding=False), "usmoe(k=0.75x, pool=batch, mask_padding=False)"),
    (USMoE(pool="threshold", threshold=-0.25), "usmoe(pool=threshold, threshold=-0.25)"),
    (USMoE(pool="threshold", threshold=1e-07), "usmoe(pool=threshold, threshold=1e-07)"),
    (TokenChoice(k=2, score_order="topk_then_score"), "token_choice(k=2, score_order=topk_then_score)"),
    (ExpertChoice(pool="threshold", threshold=(0.5, -1.0)), "expert_choice(pool=threshold, threshold=(0.5, -1.0))"),
    (ExpertChoice(pool="threshold", threshold=(0.5,)), "expert_choice(pool=threshold, threshold=(0.5,))"),
    (OwnChoice(k=1), "own_choice(k=1)"),
]


@pytest.mark.parametrize(("router", "text"), TEXTS, ids=lambda x: str(x))
def test_the_text_of_a_router_names_the_fields_that_were_given(router: Any, text: str):
    assert str(router) == text
    assert parse_router(text) == router


@pytest.mark.parametrize("router", [plain(r) for r in ALL_ROUTERS] + [r for r, _ in TEXTS], ids=str)
def test_text_json_and_pickle_come_back_equal(router: Any):
    assert parse_router(str(router)) == router
    assert parse_router(json.loads(json.dumps(router.to_dict()))) == router
    assert pickle.loads(pickle.dumps(router)) == router
    assert hash(parse_router(str(router))) == hash(router)


@pytest.mark.parametrize("threshold", [math.inf, -math.inf])
def test_an_infinite_threshold_comes_back_too(threshold: float):
    """The cut of a pool that takes all, or nothing, is one: a router made of it survives its own text."""
    one, each = USMoE(pool="threshold", threshold=threshold), ExpertChoice(pool="threshold", threshold=(threshold, 0.5))
    for router in (one, each):
        assert parse_router(str(router)) == router


def test_text_may_be_written_by_hand():
    assert parse_router("  usmoe( k = 2 ,pool='batch', )") == USMoE(k=2, pool="batch")
    assert parse_router("USMoE(k=2)") == USMoE(k=2)
    assert parse_router("expert_choice(threshold=[0.1, 0.2], pool=threshold)").threshold == (0.1, 0.2)
    assert parse_router("math:sqrt") is math.sqrt


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("usmo(k=2)", "Did you mean 'usmoe'.*Known: token_choice, expert_choice, usmoe, bounded_choice, own_choice"),
        ("usmoe(k=2, alpa=0.5)", "usmoe has no field 'alpa'. Did you mean 'alpha'"),
        ("usmoe(k=2, k=3)", "gives k twice"),
        ("usmoe(2)", "cannot be read from '2' on. Write field=value"),
        ("usmoe(k=2", "is not a router"),
        ("usmoe(k=)", "cannot be read"),
        ("usmoe(k=__import__('os'))", "cannot be read|not a budget"),
        ("no.such.module:router", "cannot be imported.*Write package.module:name"),
        ("math:no_such_name", "cannot be imported"),
        ("math:pi", "is a float, not a router"),
        ("", "is not a router"),
    ],
)
def test_text_that_is_no_router_is_refused(text: str, says: str):
    with pytest.raises(ValueError, match=says):
        parse_router(text)


# ---- refusals at construction

REFUSED: list[tuple[Any, dict, str]] = [
    (USMoE, {"k": 0}, "k=0 experts per token is impossible"),
    (USMoE, {"k": -1}, "k=-1"),
    (USMoE, {"k": math.inf}, "k=inf"),
    (USMoE, {"k": math.nan}, "k=nan"),
    (USMoE, {"k": True}, "k=True"),
    (USMoE, {"k": "lots"}, "'lots'.*0.75x"),
    (USMoE, {"k": "0x"}, "'0x'"),
    (USMoE, {"alpha": 1.1}, "alpha=1.1.*0 <= alpha <= 1"),
    (USMoE, {"alpha": -0.1}, "alpha=-0.1"),
    (USMoE, {"alpha": math.nan}, "alpha=nan"),
    (USMoE, {"alpha": "half"}, "alpha='?half"),
    (USMoE, {"pool": "sequences"}, "pool='sequences'.*Choose one of: sequence, batch, time_step, token, threshold"),
    (USMoE, {"token_score": "tanh"}, "token_score='tanh'.*softmax, sigmoid"),
    (USMoE, {"expert_score": "softmax"}, "expert_score='softmax'.*scaled_sigmoid, sigmoid, softmax_tokens"),
    (USMoE, {"normalize": "row"}, "normalize='row'.*none, all, chosen"),
    (USMoE, {"mask_padding": "no"}, "mask_padding='no'"),
    (USMoE, {"threshold": 0.1}, "threshold=0.1 has no meaning with pool=sequence"),
    (USMoE, {"pool": "threshold", "threshold": math.nan}, "threshold=nan"),
    (USMoE, {"pool": "threshold", "threshold": "low"}, "threshold='?low"),
    (USMoE, {"k": 1.5, "pool": "token"}, "k=1.5 is impossible. Choose a whole k"),
    (USMoE, {"pool": "token", "expert_score": "softmax_tokens"}, "softmax_tokens needs a pool"),
    (USMoE, {"pool": "threshold", "expert_score": "softmax_tokens"}, "softmax_tokens needs a pool"),
    (TokenChoice, {"k": 1.5}, "k=1.5 is impossible. Choose a whole k"),
    (TokenChoice, {"k": 2, "score_order": "score"}, "score_order='score'.*score_then_topk, topk_then_score"),
    (OwnChoice, {"k": 0.5}, "k=0.5 is impossible"),
    (ExpertChoice, {"score": "softmax"}, "score='softmax'.*sigmoid, softmax_tokens, softmax_experts"),
    (ExpertChoice, {"pool": "token"}, "pool='token'.*sequence, batch, threshold"),
    (ExpertChoice, {"pool": "threshold", "score": "softmax_tokens"}, "softmax_tokens needs a pool"),
    (ExpertChoice, {"threshold": (0.1,)}, "no meaning with pool=sequence"),
    (ExpertChoice, {"pool": "threshold", "threshold": 0.1}, "threshold=0.1"),
    (ExpertChoice, {"pool": "threshold", "threshold": (0.1, math.nan)}, "threshold=.*nan"),
]


@pytest.mark.parametrize(("router", "fields", "says"), REFUSED, ids=lambda x: str(x)[:60])
def test_a_field_that_cannot_be_is_refused_when_the_router_is_made(router: Any, fields: dict, says: str):
    with pytest.raises(ValueError, match=says):
        router(**fields)


def test_fields_are_keyword_only_and_frozen():
    with pytest.raises(TypeError):
        USMoE(2)  # pyright: ignore[reportCallIssue]
    with pytest.raises(dataclasses.FrozenInstanceError):
        USMoE(k=2).k = 3  # pyright: ignore[reportAttributeAccessIssue]


# ---- refusals by route()


@pytest.mark.parametrize(
    ("router", "says"),
    [
        (USMoE(k=5), "k=5 experts per token is impossible with 4 experts. Choose k with 0 < k <= 4"),
        (TokenChoice(k=5), "0 < k <= 4"),
        (ExpertChoice(k=4.5), "0 < k <= 4"),
        (USMoE(), "k is missing"),
        (USMoE(k="0.75x"), "0.75x"),
        (USMoE(pool="threshold"), "has no threshold yet"),
        (ExpertChoice(pool="threshold"), "has no threshold yet"),
        (ExpertChoice(pool="threshold", threshold=(0.1, 0.2)), "2 thresholds for 4 experts"),
        (OwnChoice(), "there is no model here"),
    ],
    ids=str,
)
def test_a_router_that_cannot_route_here_is_refused(router: Any, says: str):
    with pytest.raises(ValueError, match=says):
        usmoe.route(LOGITS, router)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"logits": LOGITS[0]}, r"logits are \(5, 4\)"),
        ({"logits": LOGITS.long()}, "torch.int64"),
        ({"logits": LOGITS.tolist()}, "list"),
        ({"logits": LOGITS[..., :0]}, "no experts"),
        ({"valid": torch.ones(2, 4, dtype=torch.bool)}, r"valid is \(2, 4\).*bool tensor \(2, 5\)"),
        ({"valid": torch.ones(2, 5, dtype=torch.long)}, "attention_mask.bool"),
        ({"segments": torch.zeros(2, 4, dtype=torch.long)}, r"segments are \(2, 4\)"),
        ({"segments": torch.zeros(2, 5)}, "int tensor"),
        ({"state": object()}, "keeps no state"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_inputs_that_do_not_fit_are_refused(given: dict, says: str):
    with pytest.raises(ValueError, match=says):
        usmoe.route(**({"logits": LOGITS, "router": USMoE(k=1)} | given))


# ---- defaults


def test_what_is_not_given_is_the_rule_of_route():
    """softmax, alpha 0.5, no normalisation."""
    said = USMoE(k=2, alpha=0.5, token_score="softmax", normalize="none", expert_score="scaled_sigmoid")
    assert_same(whole(USMoE(k=2), LOGITS), whole(said, LOGITS), tolerance=0)
    said = TokenChoice(k=2, score="softmax", normalize="none")
    assert_same(whole(TokenChoice(k=2), LOGITS), whole(said, LOGITS), tolerance=0)


def test_what_is_not_given_is_the_rule_of_the_host():
    host = Host(k=2, score="sigmoid", normalize="chosen", scale=3.0, alpha=0.0)
    own = OwnChoice()(LOGITS, host=host)
    named = usmoe.route(LOGITS, TokenChoice(k=2, score="sigmoid", normalize="chosen"))
    assert pairs(own) == pairs(named)
    torch.testing.assert_close(own.weight, named.weight * 3)
    fewer = USMoE(k="0.75x")(LOGITS, host=host)  # floor(1.5*5 + .5) pairs a sequence
    assert len(fewer.token) == 2 * 8


def test_alpha_0_is_not_token_choice():
    assert pairs(usmoe.route(LOGITS, USMoE(k=2, alpha=0.0))) != pairs(usmoe.route(LOGITS, TokenChoice(k=2)))


# ---- the promises that design.md pins


def test_promises():
    def told(router: Any) -> tuple[bool, bool, bool]:
        return router.promises.causal, router.promises.batch_independent, router.promises.streamable

    assert told(TokenChoice(k=1)) == told(USMoE(pool="token")) == told(USMoE(pool="threshold")) == (True, True, True)
    assert told(USMoE(k=1)) == told(ExpertChoice(k=1)) == (False, True, False)
    assert told(USMoE(k=1, pool="batch")) == told(ExpertChoice(k=1, pool="batch")) == (False, False, False)
    assert told(USMoE(k=1, pool="time_step"))[:2] == (True, False)
    assert not USMoE(k=1, mask_padding=False).promises.padding_independent


# ---- routers of the user's own


def first_expert(logits: torch.Tensor, valid: torch.Tensor | None = None, **given: Any) -> Routing:
    """Every token goes to expert 0, with weight 1."""
    mask = torch.zeros_like(logits, dtype=torch.bool)
    mask[..., 0] = True
    return Routing.from_dense(torch.ones_like(logits), mask, valid=valid)


def test_a_router_of_the_users_own():
    routing = usmoe.route(LOGITS, first_expert)
    assert (routing.load.tolist(), routing.sequences) == ([10, 0, 0, 0], 2)
    assert promises_of(first_expert) == LOOK_AHEAD  # which promises nothing
    mine = Promises(causal=True, batch_independent=True, padding_independent=True, streamable=True, budget="none")
    first_expert.promises = mine  # pyright: ignore[reportFunctionMemberAccess]
    assert promises_of(first_expert) is mine


def test_a_router_of_the_users_own_must_return_a_routing():
    with pytest.raises(TypeError, match=r"returned a Tensor.*from_dense"):
        usmoe.route(LOGITS, lambda logits, valid: logits)


def test_from_dense_reads_the_mask_alone_and_sorts_by_expert():
    """
    weights  .5   9   .2     mask  x . x      pairs, by expert: (0, 0) .5, (1, 0) 0, (1, 1) .7, (0, 2) .2
              0  .7    9           x x .      a weight of 0 is a pair all the same
    """
    weights = torch.tensor([[0.5, 9.0, 0.2], [0.0, 0.7, 9.0]], requires_grad=True)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    routing = Routing.from_dense(weights, mask)
    assert pairs(routing) == [(0, 0), (1, 0), (1, 1), (0, 2)]
    assert routing.weight.tolist() == pytest.approx([0.5, 0.0, 0.7, 0.2])
    assert routing.pair.tolist() == [0, 3, 4, 2]
    routing.dense().sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == mask.float().tolist()
    with pytest.raises(ValueError, match="one shape"):
        Routing.from_dense(weights, mask[:1])
    with pytest.raises(ValueError, match="boolean"):
        Routing.from_dense(weights, mask.float())
