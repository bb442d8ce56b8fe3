"""The baselines of the paper, each by what distinguishes it; and the losses and noises that any router may have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
from rounding import assert_to_rounding
from small_layer import VALID, B, D, E, F, L, gradients, layer, tokens
from usmoe import ExpertChoice, MoE, TokenChoice, USMoE, route
from usmoe.layers.losses import distillation_loss
from usmoe.routing import Host
from usmoe.routing.gates import CosineGate, StableGate

WORDS = 5
IDS = torch.tensor([[0, 1, 2, 3, 4], [2, 2, 0, 4, 1]])
"""Token ids (B, L)."""

TOKEN_CHOICE = TokenChoice(k=1, score_order="topk_then_score")


def descend(moe: MoE, steps: int, *, rate: float = 0.02, distil: float = 0.0, optimizer: Any = None) -> None:
    """Some steps of AdamW, with weight decay, towards outputs of 1."""
    chosen = torch.optim.AdamW(moe.parameters(), lr=rate, weight_decay=0.1) if optimizer is None else optimizer
    for step in range(steps):
        y, out = moe(tokens(step, moe.up.dtype), tokens=IDS)
        chosen.zero_grad(set_to_none=False)  # a gradient of 0 still decays a parameter: the harder case
        ((y - 1).square().mean() + distil * distillation_loss([out])).backward()
        chosen.step()


def kept(moe: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in moe.state_dict().items()}


# ---- SMoE-Dropout


def test_the_frozen_gate_does_not_move_and_the_experts_do():
    moe = layer(TOKEN_CHOICE, gate="frozen")
    before = kept(moe)
    descend(moe, 5)
    after = kept(moe)
    assert torch.equal(after["gate.weight"], before["gate.weight"])
    assert not torch.equal(after["up"], before["up"])
    moving = layer(TOKEN_CHOICE)  # the control
    before = kept(moving)
    descend(moving, 5)
    assert not torch.equal(kept(moving)["gate.weight"], before["gate.weight"])


def test_k_grows_by_rerouting():
    moe = layer(TokenChoice(k=1), gate="frozen")
    for k in (1, 2, 4):
        moe.reroute(TokenChoice(k=k))
        assert len(moe(tokens())[1].routing.token) == k * B * L


# ---- XMoE


def test_the_cosine_gate_projects_to_half_the_experts_and_learns_its_temperature():
    assert CosineGate(D, 16).projection.shape == (8, D)
    moe = layer(TOKEN_CHOICE, gate="cosine")
    before = kept(moe)["gate.log_temperature"]
    descend(moe, 3)
    assert kept(moe)["gate.log_temperature"] != before


def test_a_cosine_gated_route_ignores_the_scale_of_each_token_and_of_each_expert():
    moe, x = layer(TokenChoice(k=2), gate="cosine"), tokens()
    scales = torch.rand(B, L, 1, generator=torch.Generator().manual_seed(0), dtype=x.dtype) * 9 + 0.1
    one, other = moe(x)[1], moe(x * scales)[1]
    torch.testing.assert_close(other.logits, one.logits, rtol=0, atol=1e-12)
    assert other.routing.pair.tolist() == one.routing.pair.tolist()
    assert isinstance(moe.gate, CosineGate)
    with torch.no_grad():
        moe.gate.experts.mul_(torch.tensor([[2.0], [0.1], [7.0], [1.0]]))
    torch.testing.assert_close(moe(x)[1].logits, one.logits, rtol=0, atol=1e-12)
    linear = layer(TokenChoice(k=2))
    assert not torch.allclose(linear(x)[1].logits, linear(x * scales)[1].logits)


# ---- StableMoE


def stable(router: Any = TOKEN_CHOICE, **given: Any) -> tuple[MoE, StableGate]:
    moe = layer(router, gate="stable", vocabulary=WORDS, **given)
    assert isinstance(moe.gate, StableGate)
    return moe, moe.gate


def test_stage_one_ranks_by_affinity_and_weighs_by_its_sigmoid():
    moe, gate = stable(TokenChoice(k=2))
    x = tokens()
    _, out = moe(x, tokens=IDS)
    affinity = x @ gate.weight.T
    torch.testing.assert_close(out.logits, affinity)
    expected = route(affinity, TokenChoice(k=2))
    assert out.routing.pair.tolist() == expected.pair.tolist()
    torch.testing.assert_close(out.routing.weight, affinity.flatten().sigmoid()[expected.pair])
    assert out.distilled is not None
    torch.testing.assert_close(out.distilled, gate.words[IDS] @ gate.experts.T)


def test_the_light_router_learns_the_route_of_token_ids():
    """Hidden states that are a function of the id, as those of a first layer: then the route can be learnt whole."""
    moe, gate = stable()
    embedding = torch.randn(WORDS, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ids = torch.arange(WORDS).repeat(2, 1)

    def agreement() -> float:
        _, out = moe(embedding[ids], tokens=ids)
        assert out.distilled is not None
        return (out.distilled.argmax(-1) == out.logits.argmax(-1)).double().mean().item()

    with torch.no_grad():
        gate.experts.copy_(-gate.experts)
    before = agreement()
    optimizer = torch.optim.AdamW(gate.parameters(), lr=0.05)
    weight = gate.weight.clone()
    for _ in range(60):
        optimizer.zero_grad()
        distillation_loss([moe(embedding[ids], tokens=ids)[1]]).backward()
        assert gate.weight.grad is None  # the route teaches; it does not learn
        optimizer.step()
    assert torch.equal(gate.weight, weight)
    assert before < 1
    assert agreement() == 1


def test_stage_two_keeps_the_route_while_the_rest_trains_on():
    moe, gate = stable(TokenChoice(k=2))
    optimizer = torch.optim.AdamW(moe.parameters(), lr=0.02, weight_decay=0.1)
    descend(moe, 5, distil=1.0, optimizer=optimizer)  # the optimiser has momenta, and zeroed gradients, by now
    gate.freeze()
    before, (_, first) = kept(moe), moe(tokens(), tokens=IDS)
    descend(moe, 5, distil=1.0, optimizer=optimizer)
    after, (_, last) = kept(moe), moe(tokens(), tokens=IDS)
    same = {name for name in before if torch.equal(before[name], after[name])} - {"cut.total", "cut.weight"}
    assert same == {"gate.words", "gate.experts", "gate.frozen"}
    assert torch.equal(last.logits, first.logits)
    assert last.routing.pair.tolist() == first.routing.pair.tolist()
    assert not torch.equal(last.routing.weight, first.routing.weight)
    torch.testing.assert_close(
        last.routing.weight, (tokens() @ gate.weight.T).flatten().sigmoid()[last.routing.pair], rtol=0, atol=1e-12
    )


def test_stage_one_moves_the_route():
    """The positive control of the test above."""
    moe, _ = stable(TokenChoice(k=2))
    _, first = moe(tokens(), tokens=IDS)
    descend(moe, 20, rate=0.2)
    assert moe(tokens(), tokens=IDS)[1].routing.pair.tolist() != first.routing.pair.tolist()


@pytest.mark.portable
def test_in_stage_two_an_id_has_one_route_whatever_its_hidden_state():
    moe, gate = stable(TokenChoice(k=2))
    gate.freeze()
    one, other = moe(tokens(1), tokens=IDS)[1], moe(tokens(2), tokens=IDS)[1]
    assert torch.equal(one.logits, other.logits)
    assert_to_rounding(one.logits[0, 0], one.logits[1, 2])  # both have id 0
    assert one.distilled is None
    assert not one.logits.requires_grad
    assert distillation_loss([one]) == 0


@pytest.mark.portable
def test_the_stage_travels_with_the_checkpoint():
    moe, gate = stable()
    first_stage = kept(moe)
    gate.freeze()
    fresh, fresh_gate = stable(seed=9)
    fresh.load_state_dict(moe.state_dict())
    y, out = fresh(tokens(), tokens=IDS)
    assert torch.equal(y, moe(tokens(), tokens=IDS)[0])
    assert out.distilled is None
    assert not fresh_gate.words.requires_grad
    descend(fresh, 2)
    assert torch.equal(fresh_gate.words, gate.words)
    fresh.load_state_dict(first_stage)  # and back to the stage that was saved
    assert fresh(tokens(), tokens=IDS)[1].distilled is not None
    assert fresh_gate.words.requires_grad


def test_the_gradient_of_stage_one_reaches_affinities_by_the_weights():
    """y = sigmoid(x W)[t, e] * expert_e(x_t), in the loops of the reference."""
    moe, gate = stable(TokenChoice(k=2))
    x, factors = tokens().requires_grad_(), tokens(seed=2)
    y, out = moe(x, tokens=IDS)
    flat = x.flatten(0, 1)
    pairs = zip(out.routing.token.tolist(), out.routing.expert.tolist(), strict=True)
    answer = reference.Answer({(t, e): (gate.weight[e] @ flat[t]).sigmoid() for t, e in pairs})
    expected = reference.moe(flat, moe, answer).view_as(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    ours, theirs = gradients(y, x, moe, factors), gradients(expected, x, moe, factors)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-11)


# ---- token ids


def test_a_gate_that_reads_ids_is_refused_without_them():
    moe, _ = stable()
    with pytest.raises(ValueError, match=r"was given none\. Call the layer with tokens=\(2, 5\) ids"):
        moe(tokens())
    with pytest.raises(ValueError, match=r"given those of shape \(2, 3\)"):
        moe(tokens(), tokens=IDS[:, :3])


@pytest.mark.parametrize("gate", ["linear", "cosine", "frozen"])
def test_other_gates_never_see_token_ids(gate: str):
    moe = layer(gate=gate)
    assert torch.equal(moe(tokens(), tokens=IDS)[0], moe(tokens())[0])


def test_ids_of_padding_need_be_no_ids():
    moe, _ = stable(USMoE(k=1.5))
    strange = IDS.where(VALID, -100)
    y, out = moe(tokens(), tokens=strange, valid=VALID)
    assert torch.equal(y, moe(tokens(), tokens=IDS, valid=VALID)[0])
    assert not out.routing.mask()[~VALID.flatten()].any()


class Watching(nn.Module):
    """A gate of the user's own that counts what was routed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :E]

    def observe(self, routing: Any) -> None:
        self.seen.append(len(routing.token))


def test_a_gate_may_observe_the_route_in_training():
    gate = Watching()
    moe = MoE(D, F, E, TokenChoice(k=2), gate=gate).double()
    moe(tokens())
    moe.eval()(tokens())
    assert gate.seen == [2 * B * L]


# ---- Expert Race

RACE = USMoE(pool="batch", alpha=1.0, expert_score="identity", k=1)


def test_expert_race_takes_the_best_logits_of_the_batch_and_weighs_by_them():
    """Two sequences of two tokens, three experts, four pairs: the fourth best logit is negative.

    token 0 |  3   -1   -5
    token 1 | -1  -.5   -2
          2 |  2   -3   -1
          3 | -4   .5   -6
    """
    logits = torch.tensor([[[3.0, -1.0, -5.0], [-1.0, -0.5, -2.0]], [[2.0, -3.0, -1.0], [-4.0, 0.5, -6.0]]])
    routing = route(logits, RACE)
    found = zip(routing.token.tolist(), routing.expert.tolist(), routing.weight.tolist(), strict=True)
    assert list(found) == [(0, 0, 3.0), (2, 0, 2.0), (1, 1, -0.5), (3, 1, 0.5)]
    assert routing.cut is not None
    assert routing.cut.tolist() == [-0.75]


def test_logits_are_not_made_to_sum_to_1():
    with pytest.raises(ValueError, match="may be negative, which normalize=chosen cannot make sum to 1"):
        USMoE(k=1, expert_score="identity", normalize="chosen")
    with pytest.raises(ValueError, match="normalize=all cannot"):
        RACE(tokens()[..., :E], host=Host(normalize="all"))


# ---- noise and dropout


@pytest.mark.parametrize("router", [USMoE(k=1.5), ExpertChoice(k=1), TokenChoice(k=2)], ids=str)
def test_router_noise_is_there_in_training_alone(router: Any):
    moe, x = layer(router, noise=0.5), tokens()
    clean = x @ moe.gate.weight.T  # pyright: ignore
    assert not torch.equal(moe(x)[1].logits, moe(x)[1].logits)
    moe.eval()
    torch.testing.assert_close(moe(x)[1].logits, clean, rtol=0, atol=1e-12)


def test_noise_leaves_the_route_of_stage_two_alone():
    moe, gate = stable(TokenChoice(k=2), noise=0.5)
    first, second = (moe(tokens(), tokens=IDS)[1] for _ in range(2))
    assert not torch.equal(first.logits, second.logits)
    gate.freeze()
    first, second = (moe(tokens(), tokens=IDS)[1] for _ in range(2))
    assert torch.equal(first.logits, second.logits)


def test_router_noise_has_its_deviation():
    moe = MoE(D, F, E, TokenChoice(k=1), noise=0.25).double()
    x = torch.randn(50, 100, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    noise = moe(x)[1].logits - moe.gate(x)
    assert noise.std().item() == pytest.approx(0.25, rel=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=0.01)


def test_dropout_is_there_in_training_alone_and_keeps_the_mean():
    moe, plain = layer(dropout=0.4, activation="relu", shared_experts=1), layer(activation="relu", shared_experts=1)
    x = tokens()
    assert not torch.equal(moe(x)[0], moe(x)[0])
    with torch.no_grad():
        mean = sum(moe(x)[0] for _ in range(4000)) / 4000
        torch.testing.assert_close(mean, plain(x)[0], rtol=0, atol=0.5)
    moe.eval()
    assert torch.equal(moe(x)[0], plain.eval()(x)[0])


def test_dropout_falls_on_the_hidden_units():
    """With one hidden unit of every two dropped and one unit an expert, an expert's output is 0 or twice itself."""
    moe = MoE(D, 1, E, TokenChoice(k=1), activation="relu", dropout=0.5).double()
    with torch.no_grad():
        x = torch.randn(20, 50, D, dtype=torch.float64)
        exact, _ = moe.eval()(x)
        y, _ = moe.train()(x)
    dropped, alive = (y == 0).all(-1), (exact != 0).any(-1)
    assert (dropped & alive).any()
    torch.testing.assert_close(y[~dropped], 2 * exact[~dropped])


def test_what_is_not_0_is_shown():
    assert "noise=0.5, dropout=0.1" in repr(layer(noise=0.5, dropout=0.1))
    assert "noise" not in repr(layer())
    assert "dropout" not in repr(layer())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own, at a break
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_layers_of_a_stable_gate_with_noise_and_dropout():
    torch.compiler.reset()
    moe, gate = stable(TokenChoice(k=2), noise=0.1, dropout=0.1)
    compiled = torch.compile(moe, backend="aot_eager")
    y, out = compiled(tokens(), tokens=IDS)
    (y.square().sum() + distillation_loss([out])).backward()
    assert all(p.grad is not None for p in moe.parameters())
    gate.freeze()
    moe.eval()
    y, out = compiled(tokens(), tokens=IDS)
    torch.testing.assert_close(y, moe(tokens(), tokens=IDS)[0], rtol=0, atol=1e-12)
    assert out.distilled is None
