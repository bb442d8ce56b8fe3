"""Routing under what torch does to functions and modules: further derivatives, torch.func, tracing, export, the meta
device, another dtype, copies and hashes."""

import copy
import dataclasses
import io
import pickle

import joblib
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jvp, vjp, vmap

import small_layer
import usmoe
from small_layer import layer
from tiny import tiny
from tiny import tokens as ids
from usmoe import ExpertChoice, MoE, TokenChoice, USMoE
from usmoe.experts.grouped import grouped_linear
from usmoe.layers.mode import DATA
from usmoe.types import is_causal

ROUTERS = {
    "token choice": TokenChoice(k=2),
    "pool over the sequence": USMoE(k=1.5),
    "threshold": USMoE(pool="threshold", threshold=0.2),
    "expert choice": ExpertChoice(k=1.5),
    "prefix": USMoE(k=1.5, pool="prefix"),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # torch.func itself loads torch.jit.script
    pytest.mark.filterwarnings("ignore:`is_gradient:FutureWarning"),  # torch.jit.trace reads every attribute
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),  # dynamo looks at what lies at a break
]
NAMES = ["olmoe", "mixtral", "qwen2_moe"]
routers = pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
families = pytest.mark.parametrize("name", NAMES)
COUNTS = (2, 0, 3, 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Halves:
    """Weights (E, F, D) that exist one expert at a time, as packed ones do."""

    weight: Tensor

    @property
    def shape(self):
        return self.weight.shape

    @property
    def dtype(self):
        return self.weight.dtype

    def __getitem__(self, expert: int) -> Tensor:
        return self.weight[expert]

    def transpose(self, one: int, other: int) -> "Halves":
        return Halves(self.weight.transpose(one, other))

    def to(self, dtype) -> "Halves":
        return Halves(self.weight.to(dtype))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product() -> tuple[Tensor, Tensor, Tensor]:
    """Rows, weights and biases of a grouped product."""
    return drawn(6, 3), drawn(4, 5, 3, seed=1), drawn(4, 5, seed=2)


def smooth(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A grouped product into another, with something between that has a second derivative."""
    hidden = grouped_linear(x, weight, COUNTS, bias).tanh()
    return grouped_linear(hidden, weight.transpose(1, 2), COUNTS)


def test_a_grouped_product_has_two_derivatives_forward_and_backward():
    given = [one.requires_grad_() for one in product()]
    assert gradcheck(smooth, given, check_forward_ad=True)
    assert gradgradcheck(smooth, given, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_packed_weights_have_the_second_derivative_of_plain_ones():
    x, weight, _ = product()
    x.requires_grad_()

    def packed(x: Tensor) -> Tensor:
        return grouped_linear(x**3, Halves(weight), COUNTS).tanh()

    assert gradcheck(packed, [x], check_forward_ad=True)
    assert gradgradcheck(packed, [x], check_fwd_over_rev=True)
    plain = hessian(lambda x: grouped_linear(x**3, weight, COUNTS).tanh().sum())(x)
    torch.testing.assert_close(hessian(lambda x: packed(x).sum())(x), plain)
    assert plain.abs().max() > 0.1


def test_a_grouped_product_is_mapped_over_a_batch():
    x, weight, bias = product()
    rows = torch.stack([x, 2 * x, x.flip(0)])
    apart = torch.stack([smooth(one, weight, bias) for one in rows])
    torch.testing.assert_close(vmap(smooth, (0, None, None))(rows, weight, bias), apart)
    weights = torch.stack([weight, weight.flip(0)], 1)
    apart = torch.stack([smooth(x, one, bias) for one in weights.unbind(1)])
    torch.testing.assert_close(vmap(smooth, (None, 1, None))(x, weights, bias), apart)


@routers
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_a_layer_has_two_derivatives_forward_and_backward(router, activation):
    moe = layer(router, activation=activation).eval()
    x = small_layer.tokens().requires_grad_()

    def output(x: Tensor, up: Tensor, gate: Tensor) -> Tensor:
        return functional_call(moe, {"up": up, "gate.weight": gate}, (x,))[0]

    given = [x, moe.up, moe.gate.weight]
    assert gradcheck(output, given, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(output, given, check_fwd_over_rev=True, fast_mode=True)


def moe_function(router, training: bool):
    """Loss of the weights of a layer, the weights, and the layer."""
    bias = isinstance(router, TokenChoice)
    moe = layer(router, gate="bias" if bias else "linear").train(training)
    x = small_layer.tokens()
    return lambda weights: functional_call(moe, weights, (x,))[0].square().sum(), dict(moe.named_parameters()), moe


def model_function(name: str, router, training: bool):
    """Loss of the weights of a patched model, the weights, and the model."""
    model = usmoe.patch(tiny(name).double(), router).train(training)
    model.set_attn_implementation("eager")  # torch's fused attention has no forward-mode gradient
    given = dict(input_ids=ids(2, 6))
    return (
        lambda weights: functional_call(model, weights, (), given).logits.square().sum(),
        dict(model.named_parameters()),
        model,
    )


FUNCTIONS = {f"MoE under {name}": lambda training, r=r: moe_function(r, training) for name, r in ROUTERS.items()} | {
    name: lambda training, name=name: model_function(name, USMoE(k=1.5), training) for name in NAMES
}


def tracked(module) -> dict[str, Tensor]:
    """What a layer or a patched model learns outside of gradients."""
    patch = module.__dict__.get("_usmoe_patch")
    buffers = dict(module.named_buffers())
    for index, cut in enumerate(() if patch is None else patch.cuts):
        buffers |= {f"cuts.{index}.{name}": value for name, value in cut.named_buffers()}
    return {name: value.clone() for name, value in buffers.items()}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("made", FUNCTIONS.values(), ids=FUNCTIONS)
def test_torch_func_gives_the_gradients_of_autograd_and_changes_nothing_outside(made, training):
    loss, weights, module = made(training)
    before = tracked(module)
    by_func = grad(loss)(weights)
    tangents = {name: torch.full_like(value, 0.1) for name, value in weights.items()}
    value, forward = jvp(loss, (weights,), (tangents,))
    _, pulled = vjp(loss, weights)
    (by_vjp,) = pulled(torch.tensor(2.0, dtype=value.dtype))
    after = tracked(module)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], one) for name, one in before.items())

    plain = loss(weights)
    found = torch.autograd.grad(plain, list(weights.values()), allow_unused=True)
    by_autograd = {
        name: torch.zeros_like(weights[name]) if one is None else one for name, one in zip(weights, found, strict=True)
    }
    torch.testing.assert_close(value, plain.detach())
    torch.testing.assert_close(by_func, by_autograd)
    torch.testing.assert_close(by_vjp, {name: 2 * one for name, one in by_autograd.items()})
    # the models compute their norms in float32
    rtol = 1e-7 if isinstance(module, MoE) else 1e-5
    torch.testing.assert_close(forward, sum((0.1 * one).sum() for one in by_autograd.values()), rtol=rtol, atol=1e-7)
    assert forward.abs() > 1e-3
    tracks = any(name.endswith(("cut.weight", "bias")) or name.startswith("cuts.") for name in before)
    looks_ahead = module.__dict__.get("_usmoe_patch") is not None or not is_causal(module.router)
    if training and tracks and looks_ahead:  # the plain call did learn
        assert any(not torch.equal(tracked(module)[name], one) for name, one in before.items())


@routers
def test_a_layer_has_the_hessian_of_autograd(router):
    moe = layer(router).eval()
    x = small_layer.tokens()[:1, :3]

    def loss(x: Tensor) -> Tensor:
        return moe(x)[0].square().sum()

    twice = torch.autograd.functional.hessian(loss, x)
    torch.testing.assert_close(hessian(loss)(x), twice)
    assert twice.abs().max() > 0.01


@routers
def test_no_batch_is_mapped_over_in_silence(router):
    """Either torch stops where the pairs are data, or what comes is right; here torch stops."""
    moe = layer(router).eval()
    with pytest.raises(RuntimeError, match=r"vmap|data-dependent|functorch"):
        vmap(lambda x: moe(x)[0])(small_layer.tokens().unsqueeze(1))


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_has_one_derivative_and_refuses_a_second():
    x, weight, _ = product()
    x.requires_grad_(), weight.requires_grad_()

    def output(x: Tensor, weight: Tensor) -> Tensor:
        return grouped_linear(x, weight, torch.tensor(COUNTS)).tanh()

    compiled = torch.compile(output, backend="aot_eager")
    one = torch.autograd.grad(output(x, weight).sum(), (x, weight))
    other = torch.autograd.grad(compiled(x, weight).sum(), (x, weight), create_graph=True)
    torch.testing.assert_close(other, one)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(other[0].square().sum() + other[1].square().sum(), (x, weight))


@pytest.mark.usefixtures("fresh_compiler")
@routers
def test_a_compiled_layer_equals_the_plain_one(router):
    moe = layer(router).eval()
    x = small_layer.tokens()
    torch.testing.assert_close(torch.compile(moe, backend="eager")(x)[0], moe(x)[0])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("made", [lambda: layer(), lambda: usmoe.patch(tiny(), USMoE(k=1.5))], ids=["MoE", "olmoe"])
def test_a_full_graph_is_refused_with_the_reason(made):
    module = made()
    given = small_layer.tokens() if isinstance(module, MoE) else ids()
    with pytest.raises(torch._dynamo.exc.Unsupported) as refused:
        torch.compile(module, backend="eager", fullgraph=True)(given)
    assert DATA in str(refused.value)


RECORDED = {"MoE": lambda: (layer().eval(), small_layer.tokens())} | {
    f"{name} under {router}": lambda name=name, router=router: (usmoe.patch(tiny(name), router), ids())
    for name in NAMES
    for router in (USMoE(k=1.5), TokenChoice(k=2), usmoe.OwnChoice())
}


@pytest.mark.parametrize("made", RECORDED.values(), ids=RECORDED)
def test_what_records_the_route_of_one_batch_is_refused_in_a_sentence(made):
    module, given = made()
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace would write down") as refused:
        torch.jit.trace(module, (given,), check_trace=False, strict=False)
    assert "Use torch.compile" in str(refused.value)
    for strict in (False, True):
        with pytest.raises(Exception, match=r"torch\.export would write down"):
            torch.export.export(module, (given,), strict=strict)


@routers
def test_a_layer_is_made_on_the_meta_device_and_takes_its_weights(router):
    source = layer(router).float().eval()
    with torch.device("meta"):
        moe = MoE(small_layer.D, small_layer.F, small_layer.E, router).eval()
        with pytest.raises(ValueError, match="no values"):
            moe(torch.empty(2, 5, small_layer.D))
    moe.load_state_dict(source.state_dict(), assign=True)
    x = small_layer.tokens(dtype=torch.float32)
    assert torch.equal(moe(x)[0], source(x)[0])
    moe.train()(x)  # the tracked cut has a device, too
    assert moe.cut.total.device.type == "cpu"


@families
@pytest.mark.parametrize("router", [USMoE(k=1.5), usmoe.OwnChoice()], ids=["USMoE", "own"])
def test_a_patched_model_on_the_meta_device_gives_shapes(name, router):
    model = usmoe.patch(tiny(name), router).to("meta")
    out = model(input_ids=ids().to("meta"))
    assert out.logits.is_meta
    assert out.logits.shape == (2, 12, 96)
    with torch.device("meta"):
        empty = tiny(name)
    with pytest.raises(ValueError, match="meta device"):
        usmoe.patch(empty, router)


@torch.no_grad()
@families
def test_a_patched_model_moved_to_float64_is_the_plain_one_there(name):
    model = usmoe.patch(tiny(name), usmoe.OwnChoice()).to(torch.float64)
    plain = tiny(name).double()
    plain.set_experts_implementation("eager")
    ours, theirs = model(input_ids=ids()).logits, plain(input_ids=ids()).logits
    assert ours.dtype is torch.float64
    # these routers round their softmax to float32 themselves
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@torch.no_grad()
def logits(model) -> Tensor:
    return model(input_ids=ids()).logits


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": saved}


@families
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_of_a_patched_model_routes_alike_and_is_unpatched_by_itself(name, copied):
    plain, model = logits(tiny(name)), usmoe.patch(tiny(name), USMoE(k=1.5))
    routed = logits(model)
    other = copied(model)
    assert torch.equal(logits(other), routed)
    assert not torch.equal(routed, plain)
    usmoe.unpatch(other)
    assert torch.equal(logits(other), plain)
    assert torch.equal(logits(model), routed)
    again = copied(model)
    usmoe.unpatch(model)
    assert torch.equal(logits(model), plain)
    assert torch.equal(logits(again), routed)


@families
def test_a_patched_model_is_hashed_and_remembered_by_joblib(name, tmp_path):
    model = usmoe.patch(tiny(name), USMoE(k=1.5))
    assert joblib.hash(model) == joblib.hash(model)
    assert joblib.hash(model) != joblib.hash(usmoe.patch(tiny(name), TokenChoice(k=2)))
    remembered = joblib.Memory(tmp_path, verbose=0).cache(logits)
    assert torch.equal(remembered(model), logits(model))
    assert remembered.check_call_in_cache(model)


@families
def test_another_backend_of_the_experts_waits_until_the_patch_is_gone(name):
    model = usmoe.patch(tiny(name), USMoE(k=1.5))
    routed = logits(model)
    model.set_experts_implementation("eager")
    assert torch.equal(logits(model), routed)
    usmoe.unpatch(model)
    plain = tiny(name)
    plain.set_experts_implementation("eager")
    assert torch.equal(logits(model), logits(plain))
    assert {m.config._experts_implementation for m in model.modules() if hasattr(m, "gate_up_proj")} == {"eager"}
