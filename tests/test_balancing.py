"""What adapts in training: the bias of each expert, the moving average of the cut, the penalty of ReLU choice."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import usmoe
from rounding import assert_leaks, assert_to_rounding
from small_layer import VALID, B, D, E, F, L, gradients, layer, tokens
from usmoe import BoundedChoice, ExpertChoice, MoE, ReLUChoice, RouterOutput, TokenChoice, USMoE, route
from usmoe.layers.sparsity import SparsityController
from usmoe.layers.threshold_form import threshold_form
from usmoe.routing import ROUTE
from usmoe.routing.gates import BiasGate

HEEDING: list[Any] = [
    TokenChoice(k=2),
    TokenChoice(k=1, normalize="chosen"),
    USMoE(k=1.5),
    USMoE(k=1.5, pool="batch", alpha=0.0),
    USMoE(k=1.5, pool="prefix"),
    BoundedChoice(k=1.5, per_expert=None),
]
"""Routers that rank by the score of the gate."""


def batch(seed: int, size: int = 8, length: int = 32) -> Tensor:
    return torch.randn(size, length, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- a bias an expert (auxiliary-loss-free balancing)


def balanced(router: Any, rate: float = 0.05) -> tuple[MoE, BiasGate]:
    moe = layer(router, gate=BiasGate(D, E, rate=rate))
    assert isinstance(moe.gate, BiasGate)
    return moe, moe.gate


def test_one_step_by_hand():
    """Loads 4, 2, 2, 0 of a mean of 2: over, even, even, under."""
    gate = BiasGate(D, E, rate=0.1)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0]]).bool()
    gate.observe(usmoe.Routing.from_dense(mask.double(), mask))
    assert gate.bias.tolist() == pytest.approx([-0.1, 0, 0, 0.1])
    gate.observe(usmoe.Routing.from_dense(mask.double(), mask))
    assert gate.bias.tolist() == pytest.approx([-0.2, 0, 0, 0.2])


@pytest.mark.parametrize("router", HEEDING, ids=str)
def test_the_bias_evens_the_load(router: Any):
    moe, gate = balanced(router)

    with torch.no_grad():
        gate.weight.mul_(0.2)
        moe.eval()
        shift = torch.linalg.lstsq(gate.weight, torch.tensor([2.0, 0.5, 0.0, -1.0], dtype=torch.float64)).solution
        before = moe(batch(99) + shift)[1].routing.load.double().std().item()
        moe.train()
        for step in range(60):
            moe(batch(step) + shift)
        moe.eval()
        after = moe(batch(99) + shift)[1].routing.load.double().std().item()
    assert after < 0.35 * before


@pytest.mark.parametrize("router", HEEDING, ids=str)
def test_the_bias_ranks_and_does_not_weigh(router: Any):
    """The layer routes as the router does under a host with that bias; weights of pairs are unbiased scores."""
    moe, gate = balanced(router)
    gate.bias += torch.tensor([0.4, -0.3, 0.2, -0.4])
    moe.eval()
    x = tokens()
    _, out = moe(x, valid=VALID)
    logits = (x * VALID.unsqueeze(-1)) @ gate.weight.T
    host = dataclasses.replace(ROUTE, score="sigmoid", bias=gate.bias)
    expected = router(logits, VALID, host=host)
    assert out.routing.pair.tolist() == expected.pair.tolist()
    free = router(logits, VALID, host=dataclasses.replace(host, bias=None))
    assert out.routing.pair.tolist() != free.pair.tolist()
    if getattr(router, "normalize", None) is None and isinstance(router, TokenChoice):
        torch.testing.assert_close(out.routing.weight, logits.flatten().sigmoid()[out.routing.pair])


def test_the_bias_has_no_gradient_moves_in_training_alone_and_is_saved():
    moe, gate = balanced(TokenChoice(k=1))
    assert "gate.bias" in moe.state_dict()
    assert "gate.bias" not in dict(moe.named_parameters())
    moe.eval()(tokens())
    assert not gate.bias.any()
    moe.train()(tokens())
    assert gate.bias.any()
    fresh, fresh_gate = balanced(TokenChoice(k=1))
    fresh.load_state_dict(moe.state_dict())
    assert torch.equal(fresh_gate.bias, gate.bias)


def test_small_steps_survive_a_narrow_dtype():
    gate = copy.deepcopy(BiasGate(D, E)).to(torch.bfloat16)
    assert gate.weight.dtype == torch.bfloat16
    assert gate.bias.dtype == torch.float32
    assert BiasGate(D, E).double().bias.dtype == torch.float64


IGNORING = [
    TokenChoice(k=2, score="softmax"),
    TokenChoice(k=2, score_order="topk_then_score"),
    USMoE(k=1.5, token_score="sigmoid"),
    USMoE(k=1.5, alpha=1.0),
    ExpertChoice(k=1),
]


@pytest.mark.parametrize("router", IGNORING, ids=str)
def test_a_router_that_would_ignore_the_bias_is_refused(router: Any):
    """And it would: under a host with a bias it routes as it does without."""
    with pytest.raises(ValueError, match="would not heed the bias that the gate balances by"):
        MoE(D, F, E, router, gate="bias")
    with pytest.raises(ValueError, match="would not heed the bias"):
        balanced(TokenChoice(k=1))[0].reroute(router)
    logits = tokens()[..., :E]
    host = dataclasses.replace(ROUTE, bias=torch.tensor([3.0, -3.0, 2.0, -2.0]))
    assert router(logits, host=host).pair.tolist() == router(logits).pair.tolist()


def test_a_callable_of_ones_own_is_refused_too():
    def mine(logits: Tensor, valid: Tensor | None = None, **_: Any) -> usmoe.Routing:
        return usmoe.Routing.from_dense(logits.softmax(-1), logits > 0)

    with pytest.raises(ValueError, match="would not heed the bias"):
        MoE(D, F, E, mine, gate="bias")


@pytest.mark.parametrize(("given", "says"), [({"rate": 0}, "rate=0 would not balance"), ({"score": "tanh"}, "'tanh'")])
def test_a_bias_that_cannot_be_is_refused(given: Any, says: str):
    with pytest.raises(ValueError, match=says):
        BiasGate(D, E, **given)


# ---- routing by the moving average of the cut (Expert Threshold, and USMoE's moving-average threshold)

MOVING: list[Any] = [
    USMoE(k=1.5),
    USMoE(k=1, pool="batch", alpha=0.3),
    ExpertChoice(k=1, pool="batch"),
    BoundedChoice(k=1.5, per_token=(1, 3)),
]


@pytest.mark.portable
@pytest.mark.parametrize("router", MOVING, ids=str)
def test_the_second_batch_is_routed_by_the_average_of_the_first(router: Any):
    moe, plain = layer(router, moving=True), layer(router)
    _, first = moe(batch(0))
    _, like = plain(batch(0))
    assert first.routing.pair.tolist() == like.routing.pair.tolist()  # there is no average yet
    average = moe.cut.average.tolist()
    assert average == plain.cut.average.tolist()
    _, second = moe(batch(1))
    threshold = tuple(average) if isinstance(average, list) else average
    expected = route(second.logits, threshold_form(router, threshold))
    assert second.routing.pair.tolist() == expected.pair.tolist()
    assert torch.equal(second.routing.weight, expected.weight)
    _, look_ahead = plain(batch(1))
    assert second.routing.pair.tolist() != look_ahead.routing.pair.tolist()
    assert moe.cut.average.tolist() == plain.cut.average.tolist()  # what is tracked is where the router's own cut fell


@pytest.mark.portable
@pytest.mark.parametrize("router", MOVING, ids=str)
def test_a_moving_layer_is_causal_in_evaluation_and_spends_its_budget_on_average(router: Any):
    moe = layer(router, moving=True)
    with torch.no_grad():
        for step in range(30):
            moe(batch(step))
        moe.eval()
        x, changed = batch(50), batch(50)
        changed[:, -8:] = 7.0
        changed[1:] = 3.0
        (one, said), (other, after) = moe(x), moe(changed)
        earlier = x.shape[1] - 8
        assert after.routing.mask()[:earlier].tolist() == said.routing.mask()[:earlier].tolist()
        assert_to_rounding(other[0, :earlier], one[0, :earlier])  # the experts have other numbers of rows
        ahead = layer(router).eval()
        assert_leaks(ahead(changed)[0][0, :earlier], ahead(x)[0][0, :earlier])
        spent = [moe(batch(seed))[1].routing.experts_per_token.double().mean().item() for seed in range(100, 108)]
    assert sum(spent) / len(spent) == pytest.approx(router.k, rel=0.07)
    still = moe.cut.average.tolist()
    moe(batch(1))
    assert moe.cut.average.tolist() == still


@pytest.mark.portable
@pytest.mark.parametrize("router", MOVING, ids=str)
def test_a_moving_layer_is_served_by_the_same_threshold(router: Any):
    moe = layer(router, moving=True)
    with torch.no_grad():
        for step in range(3):
            moe(batch(step))
        moe.eval()
        before = moe(batch(9))[0]
        assert torch.equal(usmoe.to_causal(moe)(batch(9))[0], before)
        assert moe.router.pool == "threshold"
        assert torch.equal(moe.train()(batch(9))[0], before)


@pytest.mark.portable
def test_the_average_of_a_checkpoint_serves_and_goes_on():
    moe = layer(USMoE(k=1.5), moving=True)
    moe(batch(0))
    fresh = layer(USMoE(k=1.5), moving=True, seed=3)
    fresh.load_state_dict(moe.state_dict())
    assert torch.equal(fresh.eval()(batch(1))[0], moe.eval()(batch(1))[0])
    assert torch.equal(fresh.train()(batch(1))[0], moe.train()(batch(1))[0])
    assert fresh.cut.average == moe.cut.average


def test_an_average_of_another_router_does_not_route():
    moe = layer(USMoE(k=1.5), moving=True)
    moe(batch(0))
    moe.reroute(USMoE(k=3))
    with pytest.raises(ValueError, match=r"cut of usmoe\(k=3\), and has tracked none yet"):
        moe.eval()(batch(1))
    _, out = moe.train()(batch(1))
    assert len(out.routing.token) == 3 * 8 * 32  # its own cut first
    assert moe.eval()(batch(1))[1].routing.cut is not None


def test_weights_of_a_moving_layer_have_gradients_and_the_tracking_none():
    moe, x, factors = layer(USMoE(k=1.5), moving=True), tokens().requires_grad_(), tokens(seed=2)
    moe(x)
    threshold = moe.cut.average.item()
    fixed = layer(USMoE(k=1.5, pool="threshold", threshold=threshold))
    ours, theirs = (gradients(one(x)[0], x, one, factors) for one in (moe, fixed))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-12)
    assert not moe.cut.total.requires_grad


def mine(logits: Tensor, valid: Tensor | None = None, **_: Any) -> usmoe.Routing:
    return usmoe.Routing.from_dense(logits.softmax(-1), logits > 0)


@pytest.mark.parametrize(
    ("router", "says"),
    [
        (mine, "cannot turn into a threshold"),
        (USMoE(k=1, expert_score="softmax_tokens"), "softmax_tokens needs a pool"),
        (ExpertChoice(k=1, score="softmax_tokens"), "softmax_tokens needs a pool"),
        (TokenChoice(k=1), "is causal as it is: moving=True has no meaning"),
        (USMoE(k=1.5, pool="prefix"), "is causal as it is"),
    ],
    ids=str,
)
def test_routers_that_cannot_move_are_refused(router: Any, says: str):
    with pytest.raises(ValueError, match=says):
        MoE(D, F, E, router, moving=True)


def test_a_moving_layer_says_so():
    assert "moving=True" in repr(layer(moving=True))


# ---- ReLU choice and its controller (ReMoE)


def relu_outputs(valid: Tensor | None = None) -> list[RouterOutput]:
    """Two layers, with gradients."""
    every = [tokens(seed)[..., :E].requires_grad_() for seed in (1, 2)]
    return [RouterOutput(routing=route(x, ReLUChoice(), valid=valid), logits=x) for x in every]


def test_relu_choice_by_hand():
    logits = torch.tensor([[[1.5, -1.0, 0.0], [-2.0, 0.25, 3.0], [-1.0, -1.0, -torch.inf]]], requires_grad=True)
    routing = route(logits, ReLUChoice())
    found = zip(routing.token.tolist(), routing.expert.tolist(), routing.weight.tolist(), strict=True)
    assert list(found) == [(0, 0, 1.5), (1, 1, 0.25), (1, 2, 3.0)]
    routing.weight.sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[[1, 0, 0], [0, 1, 1], [0, 0, 0]]]
    assert route(logits, ReLUChoice(k=2)).pair.tolist() == routing.pair.tolist()  # k is an aim, not a budget
    with pytest.raises(ValueError, match="k=4 experts per token is impossible with 3"):
        route(logits, ReLUChoice(k=4))


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("valid", [None, VALID], ids=["whole", "padded"])
def test_the_penalty_and_its_gradient_equal_the_loops(valid: Tensor | None, balance: bool):
    control, said = SparsityController(k=1.5, initial=0.3, balance=balance), relu_outputs(valid)
    expected: Any = 0.0
    for one in said:
        flat = one.logits.flatten(0, 1)
        real = [t for t in range(B * L) if valid is None or valid.flatten()[t]]
        for e in range(E):
            taken = sum(flat[t, e].item() > 0 for t in real)
            f = E / (1.5 * len(real)) * taken if balance else 1.0
            expected = expected + 0.3 * f * sum(flat[t, e].clamp(min=0) for t in real) / len(real) / len(said)
    loss = control.loss(said)
    torch.testing.assert_close(loss, expected)
    inputs = [one.logits for one in said]
    ours, theirs = (torch.autograd.grad(x, inputs) for x in (loss, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_lambda_rises_while_too_many_are_chosen_and_falls_while_too_few():
    said = relu_outputs()
    mean = sum(len(one.routing.token) for one in said) / (2 * B * L)
    many, few, even = (SparsityController(k) for k in (mean - 0.2, mean + 0.2, mean))
    for control in (many, few, even):
        for _ in range(3):
            control.update(said)
    found = [control.coefficient.item() for control in (many, few, even)]
    assert found == pytest.approx([1e-8 * 1.2**3, 1e-8 / 1.2**3, 1e-8])


def test_padding_does_not_count_as_idle_and_nothing_moves_nothing():
    said = relu_outputs(VALID)
    mean = sum(len(one.routing.token) for one in said) / (2 * int(VALID.sum()))
    for k, rises in ((mean - 0.1, 1), (mean + 0.1, -1)):
        control = SparsityController(k)
        control.update(said)
        assert control.rises == rises
    nothing = relu_outputs(torch.zeros(B, L, dtype=torch.bool))
    control.update(nothing)
    control.update([])
    assert control.rises == -1
    assert control.loss(nothing) == control.loss([]) == 0


def test_lambda_travels_exactly_whatever_the_dtype():
    control = SparsityController(k=1)
    for _ in range(90):
        control.update(relu_outputs())
    fresh = SparsityController(k=1).to(torch.bfloat16)
    fresh.load_state_dict(control.state_dict())
    assert fresh.coefficient == control.coefficient
    assert control.coefficient.item() == pytest.approx(1e-8 * 1.2**90)


@pytest.mark.parametrize("k", [0.75, 2])
def test_the_controller_holds_what_is_trained_at_k_and_evens_its_load(k: float):
    """Logits that a task pulls to values of their own, most of them positive: the penalty decides which stay so."""
    wanted = torch.randn(1, 200, E, generator=torch.Generator().manual_seed(0)) + torch.tensor([2.0, 1.0, 1.0, 0.0])

    def trained(balance: bool) -> Tensor:
        """The load of each expert a token, over the last 100 steps."""
        logits, loads = wanted.clone().requires_grad_(), []
        control = SparsityController(k, initial=1e-3, alpha=1.05, balance=balance)
        for _ in range(400):
            said = [RouterOutput(routing=route(logits, ReLUChoice()), logits=logits)]
            task = 0.5 * (logits - wanted).square().sum() / 200
            (gradient,) = torch.autograd.grad(task + control.loss(said), logits)
            logits = (logits - 40 * gradient).detach().requires_grad_()
            control.update(said)
            loads.append(said[0].routing.load / 200)
        assert loads[0].sum() > 2.5
        return torch.stack(loads[-100:]).mean(0)

    balanced, plain = trained(True), trained(False)
    for load in (balanced, plain):
        assert load.sum().item() == pytest.approx(k, abs=0.1)
    assert balanced.std() < 0.7 * plain.std()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"k": 0}, "k=0 controls nothing"),
        ({"k": 1, "alpha": 1.0}, "alpha=1.0 controls"),
        ({"k": 1, "initial": -1}, "initial=-1"),
    ],
    ids=str,
)
def test_a_controller_that_cannot_be_is_refused(given: Any, says: str):
    with pytest.raises(ValueError, match=says):
        SparsityController(**given)


def test_a_controller_of_a_router_needs_its_k():
    assert SparsityController.of(ReLUChoice(k=2)).k == 2
    with pytest.raises(ValueError, match="does not say how many experts a token to aim at"):
        SparsityController.of(ReLUChoice())
    with pytest.raises(ValueError, match=r"belongs to relu_choice, and the router is usmoe\(k=2\)\. Leave it out"):
        SparsityController.of(USMoE(k=2))  # pyright: ignore[reportArgumentType]


# ---- compilation


@pytest.mark.portable
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own, at a break
@pytest.mark.parametrize("given", [{"moving": True}, {"gate": "bias"}], ids=str)
def test_compiled_layers_equal_eager_ones_step_after_step(given: Any):
    torch.compiler.reset()
    moe, plain = layer(USMoE(k=1.5), **given), layer(USMoE(k=1.5), **given)
    compiled = torch.compile(moe, backend="aot_eager")
    for seed in range(4):
        torch.testing.assert_close(compiled(batch(seed, B, L))[0], plain(batch(seed, B, L))[0], rtol=0, atol=1e-12)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(moe.state_dict()[name], value, rtol=0, atol=1e-12)
