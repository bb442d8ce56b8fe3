"""Patched models inside of what torch and accelerate put around them, and models that change after the patch."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

import usmoe
from families import FAMILIES, build
from tiny import tiny, tokens
from usmoe.hf.layers import moe_layers

ONE, OTHER = usmoe.USMoE(k=1.5), usmoe.TokenChoice(k=1)
NAMES = ["model.layers.0.mlp", "model.layers.1.mlp"]


def logits(model) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def routed(router=None) -> Tensor:
    """What the plain tiny model answers under a router."""
    return logits(tiny() if router is None else usmoe.patch(tiny(), router))


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def shallow(router=None):
    """One layer, to spare the compiler."""
    model = tiny(num_hidden_layers=1)
    return model if router is None else usmoe.patch(model, router)


BACKENDS = ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_follows_every_patch_and_unpatch_of_its_original(backend):
    model = shallow()
    compiled = torch.compile(model, backend=backend)
    assert close(logits(compiled), logits(shallow()))
    for router in (ONE, OTHER):
        usmoe.patch(model, router)
        assert close(logits(compiled), logits(shallow(router)))
        assert torch.equal(logits(model), logits(shallow(router)))
    usmoe.unpatch(model)
    assert close(logits(compiled), logits(shallow()))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_is_patched_itself_before_it_runs():
    compiled = torch.compile(shallow(OTHER), backend="eager")
    assert usmoe.patch(compiled, ONE) is compiled
    with usmoe.record(compiled) as trace:
        assert close(logits(compiled), logits(shallow(ONE)))
    assert [len(said.routing.token) for said in trace["model.layers.0.mlp"]] == [36]
    assert usmoe.unpatch(compiled) is compiled
    assert close(logits(compiled), logits(shallow()))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_a_model_that_is_compiled_in_place_follows_a_patch():
    model = shallow()
    model.compile(backend="eager")
    assert close(logits(model), logits(shallow()))
    assert close(logits(usmoe.patch(model, ONE)), logits(shallow(ONE)))
    assert close(logits(usmoe.unpatch(model)), logits(shallow()))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_single_layer_that_is_compiled_follows_a_patch_and_keeps_its_name(backend, in_place):
    model = tiny()
    if in_place:
        model.model.layers[0].mlp.compile(backend=backend)
    else:
        model.model.layers[0].mlp = torch.compile(model.model.layers[0].mlp, backend=backend)
    assert [layer.name for layer in moe_layers(model)] == NAMES
    assert close(logits(model), routed())
    usmoe.patch(model, {NAMES[0]: OTHER, NAMES[1]: ONE})
    assert close(logits(model), routed([OTHER, ONE]))
    assert close(logits(usmoe.unpatch(model)), routed())


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo reads it
def test_a_compiled_model_has_the_same_gradients():
    results = []
    for compiled in (False, True):
        model = shallow(ONE).train()
        run = torch.compile(model, backend="aot_eager") if compiled else model
        run(input_ids=tokens(), labels=tokens()).loss.backward()
        results.append([parameter.grad for parameter in model.parameters()])
    assert all(gradient.abs().sum() > 0 for gradient in results[0])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one)


@pytest.fixture(scope="module")
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrapper", [nn.DataParallel, nn.parallel.DistributedDataParallel])
def test_patched_through_the_wrapper_of_data_parallel_training(wrapper):
    model, plain = tiny(), usmoe.patch(tiny(), ONE).train()
    wrapped = wrapper(model)
    own = logits(wrapped)
    assert usmoe.patch(wrapped, ONE) is wrapped
    assert [row.layer for row in usmoe.supported(wrapped)] == NAMES
    for _ in range(2):  # DDP notices in the second step what the first left unused
        for one in (wrapped.train(), plain):
            one.zero_grad()
            one(input_ids=tokens(), labels=tokens()).loss.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert theirs.grad.abs().sum() > 0
        torch.testing.assert_close(ours.grad, theirs.grad)
    wrapped.eval()
    assert torch.equal(logits(wrapped), routed(ONE))
    with usmoe.record(wrapped) as trace:
        logits(wrapped)
    assert list(trace) == NAMES
    assert torch.equal(logits(usmoe.unpatch(wrapped)), own)
    assert torch.equal(logits(wrapper(usmoe.patch(model, ONE))), routed(ONE))


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("patched_first", [False, True])
def test_offloaded_models(where, patched_first, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = tiny()
    if patched_first:
        usmoe.patch(model, ONE)
    if where == "memory":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert model.model.layers[0].mlp.gate.weight.device.type == "meta"
    if not patched_first:
        assert torch.equal(logits(model), routed())
        usmoe.patch(model, ONE)
    assert torch.equal(logits(model), routed(ONE))
    assert torch.equal(logits(usmoe.patch(model, OTHER)), routed(OTHER))
    assert torch.equal(logits(usmoe.unpatch(model)), routed())
    assert moe_layers(model)[0].flops_per_pair == moe_layers(tiny())[0].flops_per_pair


def test_another_dtype_after_the_patch():
    model = usmoe.patch(tiny(), usmoe.OwnChoice())
    x = tokens()
    assert torch.equal(logits(model.to(torch.float64)), logits(usmoe.patch(tiny().double(), usmoe.OwnChoice())))
    for dtype in (torch.bfloat16, torch.float16):
        theirs = logits(tiny().to(dtype))
        ours = logits(usmoe.patch(tiny(), usmoe.OwnChoice()).to(dtype))
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
        routed = usmoe.patch(tiny().to(dtype), ONE).train()
        routed(x, labels=x).loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in routed.parameters())
        assert all(parameter.grad.dtype == dtype for parameter in routed.parameters())


def test_a_model_without_weights_is_refused_in_a_sentence_and_a_patch_may_be_taken_off_it():
    for family in ("olmoe", "mixtral", "gpt_oss"):
        empty = tiny(family).to("meta")
        assert not any(row.supported for row in usmoe.supported(empty))
        with pytest.raises(ValueError, match=r"layers\.0\.mlp of .* cannot be patched: its router has no weights"):
            usmoe.patch(empty, ONE)
        assert not hasattr(empty, "_usmoe_patch")
    model = usmoe.patch(tiny(), ONE).to("meta")
    usmoe.unpatch(model).to_empty(device="cpu").load_state_dict(tiny().state_dict())
    model.model.rotary_emb = tiny().model.rotary_emb  # its frequencies are no part of the state
    assert torch.equal(logits(model), routed())


def test_weights_that_are_loaded_after_the_patch_are_routed_by():
    model = usmoe.patch(tiny(), ONE)
    other = tiny(seed=7)
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits(model), logits(usmoe.patch(other, ONE)))
    assert (logits(model) - routed(ONE)).abs().max() > 1e-3
    twin = usmoe.patch(tiny(), ONE)
    twin.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(logits(twin), logits(model))


@pytest.mark.parametrize("way", ["copied", "assigned", "moved in place", "another tensor"])
def test_a_correction_bias_that_changes_after_the_patch_is_honoured(way):
    family = FAMILIES["deepseek_v3"]
    model, other = build(family), build(family)
    for layer in moe_layers(other):
        layer.router.e_score_correction_bias.copy_(2 * torch.randn(8, generator=torch.Generator().manual_seed(5)))
    usmoe.patch(model, usmoe.OwnChoice(k=2))
    before = logits(model)
    if way in ("copied", "assigned"):
        model.load_state_dict(other.state_dict(), assign=way == "assigned")
    for ours, theirs in zip(moe_layers(model), moe_layers(other), strict=True):
        if way == "moved in place":
            ours.router.e_score_correction_bias.copy_(theirs.router.e_score_correction_bias)
        elif way == "another tensor":
            ours.router.e_score_correction_bias = theirs.router.e_score_correction_bias.clone()
    ours = logits(model)
    assert (ours - before).abs().max() > 1e-3
    torch.testing.assert_close(ours, logits(usmoe.patch(other, usmoe.OwnChoice(k=2))))


def test_a_router_that_is_replaced_after_the_patch_is_noticed():
    model = usmoe.patch(tiny(), ONE)
    block = model.model.layers[1].mlp
    fresh = copy.deepcopy(tiny().model.layers[1].mlp.gate)
    block.gate = fresh
    with pytest.raises(RuntimeError, match=r"ran where usmoe does not see it.* Patch the model again"):
        logits(model)
    assert torch.equal(logits(usmoe.patch(model, ONE)), routed(ONE))
    block.gate = copy.deepcopy(block.gate)  # a copy carries the hook along
    assert torch.equal(logits(model), routed(ONE))
    block.gate = fresh
    usmoe.patch(model, ONE)
    assert torch.equal(logits(usmoe.unpatch(model)), routed())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("router", [ONE, usmoe.OwnChoice(k=2)], ids=str)
def test_training_with_gradient_checkpointing(reentrant, router):
    x = tokens()
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    results = []
    for checkpointing in (False, True):
        model = usmoe.patch(tiny(), router).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(x, attention_mask=mask, labels=x, use_cache=False).loss.backward()
        results.append([parameter.grad for parameter in model.parameters()])
    assert all(gradient.abs().sum() > 0 for gradient in results[0])
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(again, plain)
