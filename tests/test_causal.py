"""From training to serving: the moving average of the cut, and the thresholds that to_causal makes of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import usmoe
from every_router import fit, those
from small_layer import E, layer, tokens
from tiny import tiny
from tiny import tokens as ids
from usmoe import BoundedChoice, ExpertChoice, TokenChoice, USMoE
from usmoe.hf.patch import patch_of
from usmoe.layers.cut import MovingCut
from usmoe.types import is_causal, promises_of

TRAINED: list[Any] = [
    USMoE(k=1.5),
    USMoE(k=1.5, pool="batch", alpha=0.3),
    USMoE(k=1, pool="time_step"),
    ExpertChoice(k=2),
    ExpertChoice(k=1, score="softmax_experts", pool="batch"),
    BoundedChoice(k=1.5, per_token=(1, 3)),
]


def batch(seed: int, size: int = 16, length: int = 32) -> Tensor:
    return torch.randn(size, length, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(router: Any, steps: int = 30) -> Any:
    """A layer that has seen some batches in training mode."""
    moe = layer(router)
    with torch.no_grad():
        moe.gate.weight.mul_(0.5)
        for step in range(steps):
            moe(batch(step))
    return moe.eval()


# ---- the average


def test_the_average_by_hand():
    """0.99 of the past and 0.01 of the batch's mean, over the same sum of weights."""
    cut = MovingCut()
    assert not cut.seen
    cut.update(torch.tensor([1.0, 3.0]))
    assert cut.average.item() == pytest.approx(2)  # the first batch alone, not 0.02 of the way from 0
    cut.update(torch.tensor([5.0]))
    assert cut.average.item() == pytest.approx((0.99 * 2 + 5) / 1.99)


def test_cuts_of_pools_that_took_all_or_nothing_do_not_count():
    cut = MovingCut()
    cut.update(torch.tensor([torch.inf, -torch.inf]))
    cut.update(None)
    assert not cut.seen
    cut.update(torch.tensor([torch.inf, 4.0]))
    assert cut.average.item() == 4
    each = MovingCut((2,))
    each.update(torch.tensor([[1.0, torch.inf], [3.0, 5.0]]))
    assert each.average.tolist() == [2, 5]


def test_the_layer_tracks_in_training_alone():
    moe = layer(USMoE(k=1.5)).eval()
    moe(tokens())
    assert not moe.cut.seen
    _, out = moe.train()(tokens())
    assert moe.cut.average.item() == pytest.approx(out.routing.cut.mean().item())


def test_a_causal_router_needs_no_average():
    for router in (TokenChoice(k=2), USMoE(k=1.5, pool="prefix"), USMoE(pool="threshold", threshold=0.2)):
        moe = layer(router).train()
        moe(tokens())
        assert not moe.cut.seen


def test_the_average_travels_with_the_layer_and_keeps_its_precision():
    moe = trained(ExpertChoice(k=2))
    assert {"cut.total", "cut.weight"} <= set(moe.state_dict())
    fresh = layer(USMoE(k=1))  # another kind of router: one number, not one an expert
    fresh.load_state_dict(moe.state_dict())
    assert fresh.cut.average.tolist() == moe.cut.average.tolist()
    half = copy.deepcopy(moe).to(torch.bfloat16)
    assert half.up.dtype == torch.bfloat16
    assert half.cut.average.tolist() == moe.cut.average.tolist()


# ---- to_causal, of layers


@pytest.mark.parametrize("router", TRAINED, ids=str)
def test_thresholds_spend_the_budget_on_new_text(router: Any):
    moe = usmoe.to_causal(trained(router))
    assert is_causal(moe.router)
    assert moe.router.pool == "threshold"
    counts = [len(moe(batch(seed))[1].routing.token) / 512 for seed in range(100, 108)]
    assert sum(counts) / len(counts) == pytest.approx(router.k, rel=0.05)


def test_scores_and_floor_are_kept():
    assert usmoe.to_causal(trained(USMoE(k=1.5, alpha=0.3, normalize="chosen"))).router == USMoE(
        k=1.5,
        alpha=0.3,
        normalize="chosen",
        pool="threshold",
        threshold=trained(USMoE(k=1.5, alpha=0.3, normalize="chosen")).cut.average.item(),
    )
    served = usmoe.to_causal(trained(BoundedChoice(k=1.5, per_token=(1, 3), token_score="sigmoid"))).router
    assert (served.min_experts, served.token_score, len(served.threshold)) == (1, "sigmoid", E)


def test_prices_of_bounded_choice_go_on_balancing_the_load():
    """A threshold an expert is its price: the load stays near its cap where one threshold for all would collapse."""

    def fullest(router: Any) -> float:
        moe = layer(router)
        with torch.no_grad():
            moe.gate.weight.mul_(0.3)
            moe.gate.weight[0] += 0.8
            for step in range(30):
                moe(batch(step) + 0.7)
        usmoe.to_causal(moe.eval())
        load = moe(batch(99, 64) + 0.7)[1].routing.load.double()
        return (load.max() / load.mean()).item()

    assert fullest(BoundedChoice(k=1.5, per_token=(0, 4))) < 1.4
    assert fullest(BoundedChoice(k=1.5, per_token=(0, 3))) < 1.4
    assert fullest(USMoE(k=1.5)) > 1.7


def test_all_layers_or_none():
    model = nn.ModuleDict({"one": trained(USMoE(k=1)), "two": layer(USMoE(k=1)), "three": trained(TokenChoice(k=2))})
    with pytest.raises(ValueError, match=r"two has tracked no cut of usmoe\(k=1\)"):
        usmoe.to_causal(model)
    assert model["one"].router == USMoE(k=1)
    model["two"] = trained(USMoE(k=1))
    assert usmoe.to_causal(model) is model
    assert [model[name].router.pool for name in ("one", "two")] == ["threshold"] * 2
    assert model["three"].router == TokenChoice(k=2)  # causal already


def test_what_cannot_be_served_is_refused():
    with pytest.raises(ValueError, match="Linear has no layer with a router of usmoe"):
        usmoe.to_causal(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="softmax_tokens needs a pool"):
        usmoe.to_causal(trained(USMoE(k=1, expert_score="softmax_tokens")))

    def mine(logits: Tensor, valid: Tensor | None = None, **_: Any) -> usmoe.Routing:
        return usmoe.Routing.from_dense(logits.softmax(-1), logits > 0)

    with pytest.raises(ValueError, match="cannot turn into a threshold"):
        usmoe.to_causal(layer(mine))


@pytest.mark.parametrize("router", those(lambda promises: promises.causal and promises.batch_independent), ids=str)
def test_every_causal_router_stays(router: Any):
    assert promises_of(router).causal
    moe = layer(usmoe.USMoE(k=1))
    router = fit(router, E)
    moe.router = router
    assert usmoe.to_causal(moe).router is router


# ---- to_causal, of a patched model


def test_a_patched_model_tracks_its_cuts_in_training_and_is_served_by_them():
    model = usmoe.patch(tiny(), USMoE(k=1.5))
    model.eval()(ids(4, 32))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp has tracked no cut"):
        usmoe.to_causal(model)
    model.train()
    for seed in range(20):
        model(ids(8, 64, seed))
    keys = set(model.state_dict())
    usmoe.to_causal(model)
    assert set(model.state_dict()) == keys == set(tiny().state_dict())
    with usmoe.record(model.eval()) as trace, torch.no_grad():
        model(ids(16, 64, 99))
    for said in trace.last.values():
        assert len(said.routing.token) / 1024 == pytest.approx(1.5, rel=0.05)
    assert all(is_causal(router) for router in patch_of(model).routers)


def test_an_evaluation_in_between_forgets_nothing():
    model = usmoe.patch(tiny(), USMoE(k=1.5)).train()
    model(ids(4, 32))
    before = [cut.average.item() for cut in patch_of(model).cuts]
    with usmoe.patched(model, TokenChoice(k=2)):
        model(ids(4, 32, 5))
    assert [cut.average.item() for cut in patch_of(model).cuts] == before


def test_a_patched_model_inside_of_another_module():
    inner = usmoe.patch(tiny(), USMoE(k=1.5)).train()
    inner(ids(4, 32))
    usmoe.to_causal(nn.ModuleDict({"lm": inner, "head": trained(USMoE(k=1))}))
    assert all(is_causal(router) for router in patch_of(inner).routers)


@pytest.mark.parametrize("per_token", [(1, 4), (2, 2), (2, 4), (0, 2)])
def test_bounded_choice_is_served_at_its_budget_however_tight_its_bounds(per_token: Any):
    moe = usmoe.to_causal(trained(BoundedChoice(k=2, per_token=per_token)))
    counts = [moe(batch(seed))[1].routing.experts_per_token.double().mean().item() for seed in range(100, 108)]
    assert sum(counts) / len(counts) == pytest.approx(2, rel=0.05)
    assert moe.router.min_experts == per_token[0]


def test_the_cut_of_bounded_choice_serves_the_pool_that_it_fell_in():
    """Where caps of tokens do not bind, the pairs of the pool, but for one or two at the edge of a price."""
    logits = torch.randn(1, 96, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    routing = usmoe.route(logits, BoundedChoice(k=2, per_token=(1, 8), per_expert=(0.5, 1.1)))
    assert routing.cut is not None
    served = USMoE(pool="threshold", threshold=tuple(routing.cut[0].tolist()), min_experts=1)
    again = usmoe.route(logits, served)
    assert abs(len(again.token) - 192) <= 2
    assert usmoe.metrics.overlap(again, routing) > 0.97
    assert usmoe.metrics.overlap(usmoe.route(logits, USMoE(k=2)), routing) < 0.97  # without its prices


def test_cuts_of_another_router_are_not_served():
    moe = trained(USMoE(k=2)).train()
    moe.router = USMoE(k=3, alpha=0.0)
    with pytest.raises(ValueError, match="those of another router"):
        usmoe.to_causal(moe)
    moe(batch(0))  # one batch of its own: the average begins anew
    assert usmoe.to_causal(moe).router.k == 3
    other = layer(ExpertChoice(k=2))
    other.load_state_dict(trained(USMoE(k=2)).state_dict())
    with pytest.raises(ValueError, match="those of another router"):
        usmoe.to_causal(other)


@pytest.mark.parametrize("router", [USMoE(k=1.5), ExpertChoice(k=2), BoundedChoice(k=1.5)], ids=str)
def test_compiled_layers_track_their_cuts_too(router: Any):
    torch.compiler.reset()
    moe, plain = layer(router).train(), layer(router).train()
    compiled = torch.compile(moe, backend="aot_eager")
    with torch.no_grad():
        for seed in range(3):
            compiled(batch(seed, 2, 8))
            plain(batch(seed, 2, 8))
    assert moe.cut.weight.max().item() == pytest.approx(1 - 0.99**3)
    assert moe.cut.average.tolist() == pytest.approx(plain.cut.average.tolist())
