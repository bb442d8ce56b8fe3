"""MoE and SoftMoE against the loops: outputs, every gradient, dtypes, checkpointing, compilation, padding, memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import reference
from small_layer import VALID, B, D, E, F, Float32Gate, L, by_loops, gradients, layer, tokens
from usmoe import ExpertChoice, Routing, SoftMoE, TokenChoice, USMoE, route
from usmoe.experts import experts_by_loop, experts_by_pairs

SHAPES: list[Any] = [
    pytest.param(router, given, id=f"{router}-{given}")
    for router, given in [
        (USMoE(k=2), {}),
        (USMoE(k=1.5, expert_score="softmax_tokens", normalize="chosen"), {"activation": "relu"}),
        (USMoE(k=0.5, alpha=0.0), {"bias": True}),  # drops tokens
        (USMoE(k=1, alpha=1.0, pool="batch"), {"activation": "relu", "bias": True, "shared_experts": 2}),
        (USMoE(pool="threshold", threshold=0.6), {"shared_experts": 1}),  # leaves experts without tokens
        (USMoE(pool="threshold", threshold=9.0), {"bias": True}),  # chooses nothing
        (USMoE(k=1, mask_padding=False), {}),  # the gate sees what the padding holds
        (ExpertChoice(k=1, score="softmax_experts"), {"bias": True, "shared_experts": 1}),
        (TokenChoice(k=1), {"activation": "relu", "bias": True}),
        (TokenChoice(k=2, score_order="topk_then_score"), {}),
    ]
]


@pytest.mark.portable
@pytest.mark.parametrize("valid", [None, VALID], ids=["whole", "padded"])
@pytest.mark.parametrize(("router", "given"), SHAPES)
def test_output_and_gradients_equal_the_loops(router: Any, given: dict, valid: Tensor | None):
    moe, x = layer(router, **given), tokens().requires_grad_()
    factors = tokens(seed=2)
    y, out = moe(x, valid=valid)
    expected = by_loops(moe, x, valid)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    assert y.shape == x.shape
    assert out.logits.shape == (B, L, E)
    assert isinstance(out.routing, Routing)
    ours, theirs = gradients(y, x, moe, factors), gradients(expected, x, moe, factors)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_dropped_tokens_get_zero_and_idle_experts_no_gradient():
    moe, x = layer(USMoE(k=0.5, alpha=0.0)), tokens().requires_grad_()
    y, out = moe(x)
    dropped = out.routing.experts_per_token == 0
    assert dropped.any()
    assert not y.flatten(0, 1)[dropped].any()
    moe = layer(USMoE(pool="threshold", threshold=0.6))
    y, out = moe(x)
    idle = out.routing.load == 0
    assert idle.any()
    assert not idle.all()
    y.sum().backward()
    assert moe.up.grad is not None
    assert not moe.up.grad[idle].any()
    assert moe.up.grad[~idle].any()


@pytest.mark.portable
def test_the_two_ways_to_compute_experts_agree():
    moe = layer(USMoE(k=1.5), activation="relu", bias=True)
    routing = route(tokens(seed=4)[..., :E], USMoE(k=1.5))
    given = (tokens().flatten(0, 1), routing, moe.up, moe.down, nn.functional.relu, moe.up_bias, moe.down_bias)
    torch.testing.assert_close(experts_by_pairs(*given), experts_by_loop(*given), rtol=0, atol=1e-12)


# ---- packed sequences, padding, nothing


def test_segments_reach_the_router():
    moe, x = layer(USMoE(k=1, expert_score="softmax_tokens")), tokens()
    y, _ = moe(x, segments=torch.tensor([[0, 0, 1, 1, 1]] * B))
    assert not torch.allclose(y, moe(x)[0])
    apart = torch.cat([moe(x[:, :2])[0], moe(x[:, 2:])[0]], 1)
    torch.testing.assert_close(y, apart, rtol=0, atol=1e-12)


@pytest.mark.portable
@pytest.mark.parametrize("garbage", [0.0, 1e30, math.nan])
@pytest.mark.parametrize("kind", ["moe", "soft"])
def test_padding_changes_nothing_for_real_tokens(kind: str, garbage: float):
    """Neither outputs nor the gradients of the parameters, whatever the padding holds."""
    moe = layer(USMoE(k=1.5), bias=True) if kind == "moe" else SoftMoE(D, F, E, 2, bias=True).double()
    x = tokens()[:1, :3]
    padded = torch.full((1, L, D), garbage, dtype=torch.float64)
    padded[:, 1:4] = x
    valid = torch.tensor([[False, True, True, True, False]])
    y, _ = moe(x)
    beside, _ = moe(padded, valid=valid)
    torch.testing.assert_close(beside[:, 1:4], y, rtol=0, atol=1e-12)
    assert not beside[~valid].any()
    alone = torch.autograd.grad(y.square().sum(), list(moe.parameters()))
    among = torch.autograd.grad(beside[:, 1:4].square().sum(), list(moe.parameters()))
    for one, other in zip(alone, among, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("moe", [layer(), SoftMoE(D, F, E).double()], ids=["moe", "soft"])
def test_nothing_but_padding_and_nothing_at_all(moe: nn.Module):
    x = tokens().requires_grad_()
    y, out = moe(x, valid=torch.zeros(B, L, dtype=torch.bool))
    assert not y.any()
    assert len(out.routing.token) == 0
    y.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in moe.parameters())
    for shape in ((0, L, D), (B, 0, D)):
        assert moe(torch.zeros(shape, dtype=torch.float64))[0].shape == shape


# ---- dtypes


@pytest.mark.parametrize("given", [{}, {"bias": True, "activation": "relu", "shared_experts": 1}], ids=str)
def test_bfloat16_is_close_to_float32(given: dict):
    half = layer(USMoE(k=1.5), gate=Float32Gate(), dtype=torch.bfloat16, **given)
    full = layer(USMoE(k=1.5), gate=Float32Gate(), dtype=torch.float32, **given)
    full.load_state_dict(half.state_dict())
    x = tokens(dtype=torch.bfloat16).requires_grad_()
    y, out = half(x)
    exact, _ = full(x.detach().float())
    assert y.dtype == torch.bfloat16
    assert out.routing.weight.dtype == torch.float32
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)
    y.float().square().sum().backward()
    exact.square().sum().backward()
    for (name, one), other in zip(half.named_parameters(), full.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        scale = other.grad.abs().max().item()
        torch.testing.assert_close(one.grad.float() / scale, other.grad / scale, rtol=0, atol=0.06, msg=name)


@pytest.mark.parametrize("kind", ["moe", "soft"])
@pytest.mark.parametrize("bias", [False, True])
def test_autocast(kind: str, bias: bool):
    """Products in bfloat16, parameters and their gradients in float32."""
    given = {"bias": bias, "dtype": torch.float32}
    moe = layer(USMoE(k=2), gate=Float32Gate(), **given) if kind == "moe" else SoftMoE(D, F, E, bias=bias)
    x = tokens(dtype=torch.float32)
    exact, _ = moe(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = moe(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.15)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in moe.parameters())


# ---- checkpointing, compilation, memory


@pytest.mark.portable
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant: bool):
    moe, x, factors = layer(USMoE(k=1.5), bias=True), tokens().requires_grad_(), tokens(seed=2)
    plain = gradients(moe(x)[0], x, moe, factors)
    again = checkpoint(lambda x: moe(x)[0], x, use_reentrant=reentrant)
    (again * factors).sum().backward()  # pyright: ignore
    for name, value in (dict(moe.named_parameters()) | {"x": x}).items():
        assert value.grad is not None
        assert torch.equal(value.grad, plain[name]), name


@pytest.mark.portable
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own, at a break
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(backend: str):
    torch.compiler.reset()
    moe = layer(USMoE(k=1.5), bias=True, shared_experts=1)
    compiled = torch.compile(moe, backend=backend)
    for seed in (1, 5):  # other loads: the counts of an expert are data, not constants
        x, factors = tokens(seed).requires_grad_(), tokens(seed + 1)
        y, out = moe(x, valid=VALID)
        fast, compiled_out = compiled(x, valid=VALID)
        torch.testing.assert_close(fast, y, rtol=0, atol=1e-12)
        assert compiled_out.routing.pair.tolist() == out.routing.pair.tolist()
        ours, theirs = gradients(fast, x, moe, factors), gradients(y, x, moe, factors)
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-11)


class Buffers(TorchDispatchMode):
    """Counts the fresh tensors of one shape that operations return."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.fresh, self.seen = shape, 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.shape == self.shape and out.data_ptr() not in self.seen:
            self.seen.add(out.data_ptr())
            self.fresh += not func.is_view
            self.keep = [*getattr(self, "keep", []), out]  # or its address would serve again
        return out


def test_no_gradient_buffer_an_expert():
    """The backward pass makes one gradient of `up`. The loop, as a control, makes one an expert that has tokens."""
    moe, x = layer(TokenChoice(k=2), activation="relu"), tokens()
    with Buffers(moe.up.shape) as fast:
        moe(x)[0].sum().backward()
    assert fast.fresh <= 2
    routing = moe(x)[1].routing
    with Buffers(moe.up.shape) as slow:
        experts_by_loop(x.flatten(0, 1), routing, moe.up, moe.down, nn.functional.relu).sum().backward()
    assert slow.fresh >= int((routing.load > 0).sum()) > 2


# ---- SoftMoE


@pytest.mark.parametrize("given", [{}, {"bias": True, "activation": "relu"}, {"normalize": False}], ids=str)
@pytest.mark.parametrize("slots", [1, 3])
def test_soft_moe_equals_the_loops(slots: int, given: dict):
    torch.manual_seed(3)
    moe = SoftMoE(D, F, E, slots, **given).double()
    with torch.no_grad():
        for value in moe.parameters():
            value.normal_(std=0.7)
    x, factors = tokens().requires_grad_(), tokens(seed=2)
    y, out = moe(x, valid=VALID)
    expected = torch.stack([reference.soft_moe(x[b], moe, VALID[b].tolist()) for b in range(B)])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    ours, theirs = gradients(y, x, moe, factors), gradients(expected, x, moe, factors)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    assert out.routing.load.tolist() == [int(VALID.sum())] * E  # every real token has every expert
    shares = out.routing.dense().sum(1)
    torch.testing.assert_close(shares, VALID.flatten().double(), rtol=0, atol=1e-12)
