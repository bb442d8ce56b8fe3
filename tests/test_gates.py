"""Gates, and the layers that cannot be: what MoE and SoftMoE refuse, and what they take where nothing is said."""

from __future__ import annotations

import math

import pytest
import torch

from small_layer import VALID, B, D, E, F, L, layer, tokens
from usmoe import MoE, OwnChoice, SoftMoE, USMoE
from usmoe.layers.losses import distillation_loss
from usmoe.routing.gates import GATES, CosineGate, FrozenGate


@pytest.mark.parametrize("gate", list(GATES))
def test_every_gate_makes_a_layer_that_learns(gate: str):
    torch.manual_seed(0)
    moe = MoE(D, F, E, USMoE(k=2), gate=gate, vocabulary=7)
    y, out = moe(tokens(dtype=torch.float32), tokens=torch.arange(B * L).view(B, L) % 7)
    assert out.logits.shape == (B, L, E)
    (y.square().sum() + distillation_loss([out])).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in moe.parameters())
    assert any(p.grad.any() for p in moe.gate.parameters()) or gate == "frozen"  # pyright: ignore


def test_the_cosine_gate_ignores_the_scale_of_a_token_and_keeps_float64():
    gate, x = CosineGate(D, E).double(), tokens()
    torch.testing.assert_close(gate(x * 7), gate(x), rtol=0, atol=1e-12)
    assert gate(x).abs().max() <= 1 / 0.07 + 1e-9
    # by hand: cos of the projection and the expert, over the temperature
    seen, expert = gate.projection @ x[0, 0], gate.experts[2]
    cosine = (seen @ expert) / seen.norm() / expert.norm()
    assert gate(x)[0, 0, 2].item() == pytest.approx((cosine / gate.log_temperature.exp()).item(), abs=1e-12)


@pytest.mark.parametrize("gate", list(GATES))
def test_autocast_does_not_round_logits(gate: str):
    torch.manual_seed(0)
    moe, x, ids = MoE(D, F, E, USMoE(k=2), gate=gate, vocabulary=7).eval(), tokens(dtype=torch.float32), {}
    ids["tokens"] = torch.arange(B * L).view(B, L) % 7
    plain = moe(x, **ids)[1].logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, out = moe(x, **ids)
    assert out.logits.dtype == torch.float32
    torch.testing.assert_close(out.logits, plain, rtol=1e-6, atol=1e-6)


def test_the_frozen_gate_has_no_parameter_and_is_saved():
    gate = FrozenGate(D, E)
    assert not list(gate.parameters())
    assert list(gate.state_dict()) == ["weight"]
    moe = layer(gate="frozen")
    assert not any(name.startswith("gate") for name, _ in moe.named_parameters())


def test_the_noisy_gate_is_noisy_in_training_alone():
    moe, x = layer(gate="noisy"), tokens()
    assert not torch.equal(moe(x)[1].logits, moe(x)[1].logits)
    moe.eval()
    assert torch.equal(moe(x)[1].logits, moe(x)[1].logits)
    torch.testing.assert_close(moe(x)[1].logits, x @ moe.gate.weight.T)  # pyright: ignore


# ---- refusals


def test_debug_checks_what_route_checks():
    x = tokens()
    x[0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="4 of 40 logits are NaN"):
        layer(debug=True)(x)
    with pytest.raises(ValueError, match="valid is"):
        layer(debug=True)(tokens(), valid=VALID.long())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"d_model": 0}, "d_model=0 is impossible. Give at least 1"),
        ({"d_ff": -1}, "d_ff=-1"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"shared_experts": -1}, "shared_experts=-1"),
        ({"activation": "gelu"}, "no activation 'gelu'. Known: swiglu, relu"),
        ({"gate": "lineal"}, "no gate 'lineal'. Known: linear, cosine, noisy, frozen, stable, bias"),
        ({"gate": "stable"}, "'stable' routes by token ids and needs their number. Give vocabulary="),
        ({"gate": "stable", "vocabulary": 0}, "vocabulary=0 is impossible"),
        ({"noise": -0.1}, "noise=-0.1 is no standard deviation"),
        ({"noise": math.nan}, "noise=nan"),
        ({"dropout": 1.0}, "dropout=1.0 is no share of hidden units. Choose 0 <= dropout < 1"),
        ({"router": USMoE(k=5)}, "k=5 experts per token is impossible with 4"),
        ({"router": USMoE()}, "k is missing"),
        ({"router": OwnChoice()}, "pretrained model's own rule"),
        ({"router": USMoE(pool="threshold")}, "has no threshold yet"),
    ],
    ids=str,
)
def test_a_layer_that_cannot_be_is_refused(given: dict, says: str):
    with pytest.raises(ValueError, match=says):
        MoE(**({"d_model": D, "d_ff": F, "num_experts": E} | given))  # pyright: ignore[reportArgumentType]


def test_other_refusals():
    with pytest.raises(TypeError, match="The router is a text, 'usmoe'"):
        MoE(D, F, E, "usmoe")
    with pytest.raises(ValueError, match="slots_per_expert=0"):
        SoftMoE(D, F, E, 0)
    with pytest.raises(ValueError, match="no activation 'gelu'"):
        SoftMoE(D, F, E, activation="gelu")  # pyright: ignore[reportArgumentType]
    assert MoE(D, F, 1).router == USMoE(k=1)
    assert MoE(D, F, 3).router == USMoE(k=2)
