"""Experts in four bits: unpacked one at a time, and routed as if they were whole."""

import copy
import sys

import pytest
import torch
import transformers
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import usmoe
from tiny import tiny, tokens
from usmoe.hf.layers import Layer, moe_layers
from usmoe.hf.packed import packed_experts, shape_of, weights_of

pytestmark = pytest.mark.usefixtures("quiet_transformers")

FAMILIES = ["olmoe", "mixtral", "gpt_oss", "qwen2_moe"]
KINDS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]
WEIGHTS = ("gate_up_proj", "down_proj")


def whole(family: str = "olmoe", **changes):
    """A tiny model whose widths are multiples of 64, a block of bitsandbytes: its kernel for the CPU errs otherwise."""
    wide = dict(hidden_size=64, intermediate_size=128)
    if family == "qwen2_moe":
        wide["moe_intermediate_size"] = 128
    return tiny(family, **(wide | changes))


def in_four_bits(model, kind="nf4", double=True):
    pytest.importorskip("bitsandbytes")
    return usmoe.quantize_experts(model, kind, double=double)


def unpacked(model, twin):
    """The twin with the weights that bitsandbytes gives when it unpacks all of them at once."""
    with torch.no_grad():
        for ours, theirs in zip(experts_of(model), experts_of(twin), strict=True):
            for name in WEIGHTS:
                getattr(theirs, name).copy_(getattr(ours, name))
    return twin


def experts_of(model):
    return [layer.experts for layer in moe_layers(model)]


def distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_expert_by_expert_is_bit_for_bit_the_whole_unpacked(kind, double, dtype):
    plain = experts_of(whole().to(dtype))[0]
    experts = experts_of(in_four_bits(whole().to(dtype), kind, double))[0]
    for name in WEIGHTS:
        together, apart = getattr(experts, name), weights_of(experts, name)
        assert not isinstance(apart, Tensor)
        assert apart.shape == shape_of(experts, name) == together.shape
        assert apart.dtype == apart[0].dtype == dtype
        assert apart.transpose(1, 2).shape == together.transpose(1, 2).shape
        assert apart.to(torch.float64)[3].dtype == torch.float64
        for expert in range(8):
            assert torch.equal(apart[expert], together[expert])
            assert torch.equal(apart.transpose(1, 2)[expert], together[expert].T)
        original = getattr(plain, name).detach()
        assert (together - original).norm() < (0.1 if kind == "nf4" else 0.13) * original.norm()


@pytest.mark.parametrize("width", [40, 96])
def test_widths_that_are_no_multiple_of_a_block_are_unpacked_rightly_too(width):
    plain = experts_of(whole(hidden_size=width))[0]
    experts = experts_of(in_four_bits(whole(hidden_size=width)))[0]
    for name in WEIGHTS:
        original, apart = getattr(plain, name).detach(), weights_of(experts, name)
        for expert in range(8):  # bitsandbytes 0.50 on a CPU with AVX-512 is off by more than the weights themselves
            assert (apart[expert] - original[expert]).norm() < 0.1 * original[expert].norm()


def test_where_a_block_crosses_experts_all_are_unpacked_at_once():
    model = in_four_bits(tiny(hidden_size=8, intermediate_size=5))
    experts = experts_of(model)[0]
    assert all(isinstance(weights_of(experts, name), Tensor) for name in WEIGHTS)
    model.set_experts_implementation("eager")  # transformers' default asks for rows of 16 bytes
    x = tokens()
    before = model(x).logits
    with usmoe.patched(model, usmoe.OwnChoice()):
        assert distance(model(x).logits, before) < 2e-6


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_own_choice_equals_the_model_in_four_bits_and_another_route_differs_until_it_is_left(family):
    model = in_four_bits(whole(family))
    x, mask = tokens(), torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    real = mask.bool()
    before = model(x, attention_mask=mask).logits
    assert distance(before[real], whole(family)(x, attention_mask=mask).logits[real]) > 1e-3
    usmoe.patch(model, usmoe.OwnChoice())
    assert distance(model(x, attention_mask=mask).logits[real], before[real]) < 2e-6
    usmoe.patch(model, usmoe.USMoE(k="0.75x"))
    assert distance(model(x, attention_mask=mask).logits[real], before[real]) > 1e-3
    usmoe.unpatch(model)
    assert torch.equal(model(x, attention_mask=mask).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("router", [usmoe.OwnChoice(), usmoe.USMoE(k=1.5)], ids=str)
def test_gradients_to_the_input_and_the_router_are_those_of_the_whole_unpacked(family, router):
    model = in_four_bits(whole(family))
    results = []
    for one in (model, unpacked(model, whole(family))):
        usmoe.patch(one, router)
        random = torch.Generator().manual_seed(2)
        x = torch.randn(2, 7, 64, generator=random).requires_grad_()
        out = one(inputs_embeds=x).logits
        gate = next(moe_layers(one)[0].routers[0].parameters())
        gradients = torch.autograd.grad((out * torch.randn(out.shape, generator=random)).sum(), (x, gate))
        assert all(gradient.abs().sum() > 0 for gradient in gradients)
        results.append((out.detach(), *gradients))
    for ours, theirs in zip(*results, strict=True):
        assert distance(ours, theirs) < 1e-6
    assert not any(parameter.requires_grad for parameter in experts_of(model)[0].parametrizations.parameters())


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_no_more_than_one_expert_is_unpacked_at_a_time_and_only_those_that_have_tokens(family, monkeypatch):
    pytest.importorskip("bitsandbytes")
    from bitsandbytes import functional

    model = in_four_bits(whole(family, num_hidden_layers=1))
    usmoe.patch(model, usmoe.USMoE(k=0.5))
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    sizes, together, living, true = [], [], [], functional.dequantize_4bit

    def spy(*args, **kwargs):
        out = true(*args, **kwargs)
        living[:] = [one for one in living if not one.expired()] + [StorageWeakRef(out.untyped_storage())]
        sizes.append(out.numel())
        together.append(len(living))
        return out

    monkeypatch.setattr(functional, "dequantize_4bit", spy)
    with usmoe.record(model) as trace:
        out = model(inputs_embeds=x).logits
    used = int((trace["model.layers.0.mlp"][0].routing.load > 0).sum())
    assert 0 < used <= 2  # floor(0.5 * 3 + 0.5) pairs, of 8 experts
    assert sorted(sizes) == sorted([64 * 256, 128 * 64] * used)
    out.sum().backward()
    assert sorted(sizes) == sorted([64 * 256, 128 * 64] * 2 * used)
    assert set(together) == {1}
    assert all(one.expired() for one in living)


def test_patched_first_or_quantised_first_is_the_same():
    x = tokens()
    model = in_four_bits(whole())
    plain = model(x).logits
    after = usmoe.patch(model, usmoe.USMoE(k=1.5))(x).logits
    model = in_four_bits(usmoe.patch(whole(), usmoe.USMoE(k=1.5)))
    assert torch.equal(model(x).logits, after)
    assert torch.equal(usmoe.unpatch(model)(x).logits, plain)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_the_rest_may_go_to_another_dtype_after_packing(family):
    model = in_four_bits(whole(family)).double()
    before = model(tokens()).logits
    assert before.dtype == torch.float64
    assert distance(usmoe.patch(model, usmoe.OwnChoice())(tokens()).logits, before) < 2e-6  # experts stay in float32


def test_what_is_packed_stays_as_it_is():
    model = in_four_bits(whole(), "fp4")
    before = model(tokens()).logits
    assert usmoe.quantize_experts(model, "nf4") is model
    assert torch.equal(model(tokens()).logits, before)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_supported_says_what_the_experts_are_kept_in_and_unpacks_none(kind, monkeypatch):
    model = whole().to(torch.bfloat16)
    assert [row.weights for row in usmoe.supported(model)] == ["bfloat16"] * 2
    in_four_bits(model, kind)
    monkeypatch.delattr("bitsandbytes.functional.dequantize_4bit")
    rows = usmoe.supported(model)
    assert [row.weights for row in rows] == [kind] * 2
    assert all(row.supported and row.experts == 8 for row in rows)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_model_that_transformers_loads_in_four_bits_keeps_its_experts_as_they_are(dtype, tmp_path):
    pytest.importorskip("bitsandbytes")
    whole().to(dtype).save_pretrained(tmp_path)
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)
    model = usmoe.from_pretrained(tmp_path, usmoe.OwnChoice(), quantization_config=how, dtype=dtype)
    said = f"{str(dtype).removeprefix('torch.')} (the model's quantisation leaves experts as they are)"
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    for kept in (said, "nf4"):
        if kept == "nf4":
            in_four_bits(model)
        assert [row.weights for row in usmoe.supported(model)] == [kept] * 2
        patched = usmoe.patch(model, usmoe.OwnChoice())(tokens()).logits
        own = usmoe.unpatch(model)(tokens()).logits
        assert dtype != torch.float32 or distance(patched, own) < 2e-6  # bfloat16 flips pairs near the cut
        assert distance(usmoe.patch(model, usmoe.USMoE(k=1))(tokens()).logits, own) > 1e-3


def test_operations_are_counted_as_before_and_nothing_is_unpacked_for_it(monkeypatch):
    before, after = moe_layers(whole()), moe_layers(in_four_bits(whole()))
    monkeypatch.delattr("bitsandbytes.functional.dequantize_4bit")
    assert [layer.flops_per_pair for layer in after] == [2 * 64 * (256 + 128)] * 2
    for name in ("flops_per_pair", "flops_per_gate", "columns", "name"):
        assert [getattr(layer, name) for layer in after] == [getattr(layer, name) for layer in before]


@pytest.mark.parametrize(("double", "fewer"), [(True, 3.75), (False, 3.5)])
def test_the_experts_take_fewer_bytes(double, fewer):
    def taken(layer: Layer) -> int:
        state = layer.experts.state_dict()  # bitsandbytes writes its scales into it
        return sum(tensor.numel() * tensor.element_size() for tensor in state.values())

    model = whole().to(torch.bfloat16)
    rest = {name: tensor for name, tensor in model.state_dict().items() if "experts" not in name}
    before = sum(map(taken, moe_layers(model)))
    assert before == 2 * 2 * 8 * 64 * (256 + 128)  # 2 bytes, 2 layers, 8 experts
    model = in_four_bits(model, double=double)
    ratio = before / sum(map(taken, moe_layers(model)))
    assert fewer < ratio < fewer + 0.15  # 16 bits / (4 + 8 / 64), or / (4 + 32 / 64), and some tables
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in rest.items())


def test_a_deep_copy_is_packed_and_patched_like_its_original_and_apart_from_it():
    x = tokens()
    model = in_four_bits(whole())
    plain = model(x).logits
    patched = usmoe.patch(model, usmoe.USMoE(k=1.5))(x).logits
    twin = copy.deepcopy(model)
    usmoe.unpatch(model)
    assert torch.equal(twin(x).logits, patched)
    assert torch.equal(model(x).logits, plain)
    assert torch.equal(usmoe.unpatch(twin)(x).logits, plain)
    assert [row.weights for row in usmoe.supported(twin)] == ["nf4"] * 2


def test_generation_writes_what_the_whole_unpacked_writes():
    model = in_four_bits(whole())
    twin = unpacked(model, whole())
    router, x = usmoe.USMoE(pool="threshold", threshold=0.15, alpha=0.5), tokens(2, 5)
    given = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(x))
    ours, theirs = (usmoe.patch(one, router).generate(x, **given) for one in (model, twin))
    assert ours.shape == (2, 10)
    assert torch.equal(ours, theirs)
    with pytest.warns(UserWarning, match="For generation use thresholds"):
        usmoe.patch(model, usmoe.USMoE(k=1)).generate(x, **given)


def test_saving_is_refused_in_a_sentence_and_writes_nothing(tmp_path):
    model = usmoe.patch(in_four_bits(whole()), usmoe.USMoE(k=1.5))
    with pytest.raises(ValueError, match=r"experts of model\.layers\.0\.mlp\.experts are in 4 bits.* after loading"):
        model.save_pretrained(tmp_path / "here")
    assert not list(tmp_path.iterdir())
    assert not hasattr(model.config, "usmoe")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # which peft reads
def test_lora_on_packed_experts_is_refused_and_lora_beside_them_is_not():
    peft = pytest.importorskip("peft")
    x = tokens()
    model = in_four_bits(whole())
    names = [f"{name}.{weight}" for name in packed_experts(model) for weight in WEIGHTS]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[], target_parameters=names))
    with pytest.raises(ValueError, match=r"LoRA on experts that are in 4 bits.* Keep the experts in bfloat16"):
        usmoe.patch(adapted, usmoe.USMoE(k=1.5))
    assert not hasattr(model, "_usmoe_patch")
    model = in_four_bits(whole())
    usmoe.patch(model, usmoe.USMoE(k=1.5))
    ours = model(x).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    usmoe.patch(adapted, usmoe.USMoE(k=1.5))
    assert torch.equal(adapted(x).logits, ours)  # LoRA begins at 0


def test_bad_requests_are_refused_in_a_sentence():
    pytest.importorskip("bitsandbytes")
    model = whole()
    with pytest.raises(ValueError, match=r"There is no 4-bit type 'int4'\. Choose nf4 or fp4"):
        usmoe.quantize_experts(model, "int4")
    dense = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10, bos_token_id=1, eos_token_id=1)
    )
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no experts"):
        usmoe.quantize_experts(dense)
    with pytest.raises(TypeError, match="not a transformers model"):
        usmoe.quantize_experts(torch.nn.Linear(2, 2))
    assert not packed_experts(model)


def test_without_bitsandbytes_the_refusal_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"4-bit experts need bitsandbytes.* pip install 'usmoe\[quant\]'"):
        usmoe.quantize_experts(tiny())


class Int8Rows(Tensor):
    """Weights as torchao keeps them: a tensor of its own kind, 8 bits a weight and a scale a row."""

    def __new__(cls, values: Tensor, scale: Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values: Tensor, scale: Tensor):
        self.values_, self.scale_ = values, scale

    @classmethod
    def of(cls, weight: Tensor) -> "Int8Rows":
        scale = weight.abs().amax(-1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    unpacked: list[tuple[int, ...]] = []  # noqa: RUF012  the shapes that were dequantised

    def dequantize(self) -> Tensor:
        self.unpacked.append(tuple(self.shape))
        return self.values_ * self.scale_

    def __tensor_flatten__(self):
        return ["values_", "scale_"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, size, stride):
        return cls(inner["values_"], inner["scale_"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.select.int, torch.ops.aten.clone.default):
            one, *rest = args
            return cls(func(one.values_, *rest, **(kwargs or {})), func(one.scale_, *rest, **(kwargs or {})))
        whole = [one.dequantize() if isinstance(one, cls) else one for one in args]
        return func(*whole, **(kwargs or {}))


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_tensors_that_dequantise_are_unpacked_by_expert(family):
    model, twin, x = whole(family), whole(family), tokens()
    for ours, theirs in zip(experts_of(model), experts_of(twin), strict=True):
        for name in WEIGHTS:
            packed = Int8Rows.of(getattr(ours, name).detach())
            setattr(ours, name, torch.nn.Parameter(packed, requires_grad=False))
            getattr(theirs, name).data = packed.dequantize()
    assert [row.weights for row in usmoe.supported(model)] == ["Int8Rows"] * 2
    assert moe_layers(model)[0].flops_per_pair == 2 * 64 * (256 + 128)
    for router in (usmoe.OwnChoice(), usmoe.USMoE(k=1.5)):
        Int8Rows.unpacked.clear()
        logits = usmoe.patch(model, router)(x).logits
        assert {len(shape) for shape in Int8Rows.unpacked} == {2}  # never all experts
        assert torch.equal(logits, usmoe.patch(twin, router)(x).logits)
