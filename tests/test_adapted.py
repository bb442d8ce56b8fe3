"""Models that peft adapts: LoRA on experts and routers, and copies of modules that are trained whole."""

import copy

import pytest
import torch
from torch import Tensor, nn

import usmoe
from families import FAMILIES, build
from tiny import tiny, tokens
from usmoe.hf.layers import moe_layers, plain_name

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.usefixtures("quiet_transformers"),
    pytest.mark.filterwarnings(
        "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"  # which peft 0.21 reads
    ),
]
USMOE = usmoe.USMoE(k=1.5)
NAMES = ["model.layers.0.mlp", "model.layers.1.mlp"]
THROUGH = {
    "the PeftModel": lambda adapted: adapted,
    "the LoraModel": lambda adapted: adapted.base_model,
    "the model inside": lambda adapted: adapted.get_base_model(),
}


def targets(family: str) -> list[str]:
    router = "router" if family == "gpt_oss" else "gate"
    return [f"mlp.{router}.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def lora(model, parameters, seed: int = 3, name: str = "default", **kwargs):
    """LoRA on parameters, with factors that have something to say (peft begins with B = 0)."""
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=parameters, **kwargs)
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, config)
        adapted = model
    else:
        adapted = peft.get_peft_model(model, config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, factor in adapted.named_parameters():
            if f".{name}." in key:
                factor.normal_(std=0.2, generator=random)
    return adapted.eval()


def wrappers(adapted) -> dict[str, nn.Module]:
    """What peft put around each parameter, by the parameter's name in the plain model."""
    found = {}
    for name, module in adapted.named_modules():
        if type(module).__name__ == "ParamWrapper":
            found[f"{plain_name(name).removeprefix('base_model.model.')}.{module.parameter_name}"] = module
    return found


def sums(adapted, plain, name: str = "default") -> tuple[dict[str, Tensor], list[Tensor]]:
    """W + scale * B @ A of each adapted parameter, by name, from W, A and B alone; and the A and B."""
    weights, factors = {}, []
    for key, wrapper in wrappers(adapted).items():
        whole = plain.get_parameter(key).detach()
        a, b = (getattr(wrapper, part)[name].weight.detach().clone().requires_grad_() for part in ("lora_A", "lora_B"))
        factors += [a, b]
        if whole.ndim == 2:
            weights[key] = whole + 3 * b @ a
            continue
        turned = plain.get_submodule(key.rpartition(".")[0]).is_transposed
        delta = [b.view(len(b), 2, 8)[:, :, e] @ a[2 * e : 2 * e + 2] for e in range(8)]
        weights[key] = whole + 3 * torch.stack([one.T if turned else one for one in delta])
    return weights, factors


def loss(model, **given) -> Tensor:
    return model(input_ids=tokens(), labels=tokens(), **given).loss


def logits(model) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss", "qwen2_moe"])
@pytest.mark.parametrize("way", ["before", *THROUGH])
def test_lora_equals_a_plain_model_with_the_sum_in_output_and_gradients(family, way):
    model, plain = tiny(family), usmoe.patch(tiny(family), USMOE)
    if way == "before":
        usmoe.patch(model, USMOE)
    adapted = lora(model, targets(family))
    if way != "before":
        assert usmoe.patch(THROUGH[way](adapted), USMOE) is THROUGH[way](adapted)
    weights, factors = sums(adapted, plain)
    assert len(factors) == 2 * 3 * 2  # layers, parameters, A and B
    given = dict(input_ids=tokens(), labels=tokens())
    theirs = torch.func.functional_call(plain, weights, (), given)
    ours = adapted(**given)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
    ours.loss.backward()
    mine = [
        getattr(w, part)["default"].weight.grad for w in wrappers(adapted).values() for part in ("lora_A", "lora_B")
    ]
    for one, other in zip(mine, torch.autograd.grad(theirs.loss, factors), strict=True):
        assert other.abs().sum() > 0
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    assert (ours.logits - logits(usmoe.unpatch(adapted))).abs().max() > 1e-3
    torch.testing.assert_close(
        logits(adapted), torch.func.functional_call(usmoe.unpatch(plain), weights, (tokens(),)).logits
    )


def test_only_lora_moves_in_a_training_step():
    adapted = usmoe.patch(lora(tiny(), targets("olmoe")), USMOE).train()
    before = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters()}
    step = torch.optim.SGD(adapted.parameters(), lr=0.1)
    loss(adapted).backward()
    step.step()
    moved = {name for name, parameter in adapted.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert len(moved) == 12


@pytest.mark.parametrize("reentrant", [False, True])
def test_lora_with_gradient_checkpointing_has_the_same_gradients(reentrant):
    results = []
    for checkpointing in (False, True):
        adapted = lora(tiny(), targets("olmoe"))
        if checkpointing:
            adapted.get_base_model().activation_checkpointing_enable({"use_reentrant": reentrant})
            adapted.enable_input_require_grads()
        usmoe.patch(adapted, USMOE).train()
        loss(adapted, use_cache=False).backward()
        results.append([p.grad for p in adapted.parameters() if p.requires_grad])
    assert all(gradient.abs().sum() > 0 for gradient in results[0])
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(again, plain)


def test_an_adapter_that_is_switched_off_leaves_the_plain_model_under_the_router():
    adapted = usmoe.patch(lora(tiny(), targets("olmoe")), USMOE)
    on = logits(adapted)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), logits(usmoe.patch(tiny(), USMOE)))
    assert torch.equal(logits(adapted), on)


def test_each_adapter_is_heard_when_it_is_its_turn():
    adapted = usmoe.patch(lora(tiny(), targets("olmoe")), USMOE)
    first = logits(adapted)
    lora(adapted, targets("olmoe"), seed=4, name="second")
    assert torch.equal(logits(adapted), first)
    adapted.set_adapter("second")
    plain = usmoe.patch(tiny(), USMOE)
    theirs = torch.func.functional_call(plain, sums(adapted, plain, "second")[0], (tokens(),)).logits
    torch.testing.assert_close(logits(adapted), theirs, rtol=1e-4, atol=1e-5)
    assert (theirs - first).abs().max() > 1e-3
    adapted.set_adapter("default")
    assert torch.equal(logits(adapted), first)


@pytest.mark.parametrize("order", ["patched first", "adapted first"])
def test_merged_and_unloaded_it_stays_patched_until_it_is_unpatched(order):
    model = tiny()
    if order == "patched first":
        usmoe.patch(model, USMOE)
    adapted = lora(model, targets("olmoe"))
    own = logits(usmoe.unpatch(adapted))
    usmoe.patch(adapted, USMOE)
    ours = logits(adapted)
    merged = adapted.merge_and_unload()
    assert merged is model
    torch.testing.assert_close(logits(merged), ours, rtol=1e-4, atol=1e-5)
    usmoe.unpatch(merged)
    torch.testing.assert_close(logits(merged), own, rtol=1e-4, atol=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in merged.modules())


@pytest.mark.parametrize("whole", [["gate"], ["experts"], ["gate", "experts"], ["mlp"], ["0"]], ids="+".join)
@pytest.mark.parametrize("way", ["before", *THROUGH])
def test_copies_that_are_trained_whole_are_routed_by_our_router(whole, way):
    """peft runs a copy of the module, and the original where its adapter is off: both are to be ours."""
    model, plain, trained = tiny(), tiny(), tiny()
    if way == "before":
        usmoe.patch(model, USMOE)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=whole)).eval()
    if way != "before":
        usmoe.patch(THROUGH[way](adapted), USMOE)
    with torch.no_grad():  # as if training had moved the copies, and the route with them
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5).add_(0.1)
                key = plain_name(name.rpartition(".")[0]).removeprefix("base_model.model.")
                trained.get_submodule(key).get_parameter(name.rpartition(".")[2]).copy_(parameter)
    assert [row.layer for row in usmoe.supported(adapted)] == NAMES
    own, own_trained = logits(plain), logits(trained)
    ours = logits(adapted)
    torch.testing.assert_close(ours, logits(usmoe.patch(trained, USMOE)), rtol=1e-4, atol=1e-5)
    assert (ours - own_trained).abs().max() > 1e-3
    assert (ours - logits(usmoe.patch(plain, USMOE))).abs().max() > 1e-3
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), logits(plain))
    loss(adapted.train()).backward()
    assert all(p.grad.abs().sum() > 0 for name, p in adapted.named_parameters() if "modules_to_save" in name)
    usmoe.unpatch(adapted.eval())
    torch.testing.assert_close(logits(adapted), own_trained)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), own)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in adapted.modules())


def test_an_adapter_that_copies_a_module_after_the_patch_is_routed_too():
    adapted = usmoe.patch(peft.get_peft_model(tiny(), peft.LoraConfig(r=2, target_modules=["q_proj"])), USMOE).eval()
    ours = logits(adapted)
    for name, whole in (("first", "gate"), ("second", "experts")):
        adapted.add_adapter(name, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[whole]))
        adapted.eval().set_adapter(name)
        assert torch.equal(logits(adapted), ours)  # LoRA begins at 0, and a copy where its original stands
    assert torch.equal(logits(usmoe.unpatch(adapted)), logits(tiny()))


def test_record_hears_the_copy_that_runs_and_names_the_plain_layer():
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gate"])
    adapted = usmoe.patch(peft.get_peft_model(tiny(), config).eval(), USMOE)
    with usmoe.record(adapted) as trace:
        logits(adapted)
    assert list(trace) == NAMES
    assert [len(said.routing.token) for said in trace.last.values()] == [36, 36]  # 1.5 * 2 * 12, heard once


@pytest.mark.parametrize("patched_first", [False, True])
@pytest.mark.parametrize(("family", "whole"), [("deepseek_v3", "gate"), ("deepseek_v3", "mlp"), ("minimax_m2", "mlp")])
def test_the_correction_bias_of_a_copy_is_its_own(family, whole, patched_first):
    """It moves outside of the gradient, in the router or (minimax_m2) the block; that of the running copy counts."""
    model, moved, router = build(FAMILIES[family]), build(FAMILIES[family]), usmoe.OwnChoice(k=2)
    if patched_first:
        usmoe.patch(model, router)
    config = peft.LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=[whole])
    adapted = peft.get_peft_model(model, config).eval()
    if not patched_first:
        usmoe.patch(adapted, router)
    other = 2 * torch.randn(8, generator=torch.Generator().manual_seed(5))
    for one in (adapted, moved):
        for name, bias in (*one.named_buffers(), *one.named_parameters()):
            if name.endswith("e_score_correction_bias") and "original_module" not in name:
                bias.data.copy_(other)
    plain = logits(usmoe.patch(build(FAMILIES[family]), router))
    torch.testing.assert_close(logits(adapted), logits(usmoe.patch(moved, router)))
    assert (logits(adapted) - plain).abs().max() > 1e-3
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), plain)


def test_a_copied_block_that_is_called_by_itself_knows_its_sequences():
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp"])
    adapted = usmoe.patch(peft.get_peft_model(tiny(), config).eval(), USMOE)
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(6))
    block, plain = (one.model.layers[0].mlp for one in (adapted.get_base_model(), usmoe.patch(tiny(), USMOE)))
    assert torch.equal(block(x), plain(x))
    assert not torch.allclose(block(x), plain(x.view(1, 14, 32)).view_as(x))  # where all tokens are one pool


@pytest.mark.parametrize("config", [dict(target_modules=[]), dict(modules_to_save=["gate"])], ids=["lora", "copies"])
def test_a_deep_copy_of_an_adapted_model_is_patched_like_it_and_apart_from_it(config):
    adapted = lora(tiny(), ["mlp.experts.down_proj"], **(config if "modules_to_save" in config else {}))
    own = logits(adapted)
    ours = logits(usmoe.patch(adapted, USMOE))
    twin = copy.deepcopy(adapted)
    with usmoe.record(twin) as trace:
        logits(adapted)
        assert not trace.last
        logits(twin)
    assert len(trace.last) == 2
    usmoe.unpatch(adapted)
    assert torch.equal(logits(twin), ours)
    assert torch.equal(logits(adapted), own)
    assert torch.equal(logits(usmoe.unpatch(twin)), own)


def test_an_adapted_model_generates_under_a_threshold_and_warns_where_the_router_looks_ahead():
    router = usmoe.USMoE(pool="threshold", threshold=0.15, alpha=0.5)
    adapted = usmoe.patch(lora(tiny(), targets("olmoe")), router)
    x = tokens(2, 5)
    given = dict(max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(x), pad_token_id=0)
    ours = adapted.generate(input_ids=x, **given)
    assert torch.equal(ours, adapted.merge_and_unload().generate(input_ids=x, **given))
    ahead = usmoe.patch(lora(tiny(), targets("olmoe")), USMOE)
    with pytest.warns(UserWarning, match="For generation use thresholds"):
        ahead.generate(input_ids=x, **given)


def test_names_and_counts_are_those_of_the_plain_model():
    plain = moe_layers(tiny())
    for adapted in (lora(tiny(), targets("olmoe")), lora(tiny(), targets("olmoe")[1:], modules_to_save=["gate"])):
        for model in (adapted, adapted.base_model, adapted.get_base_model()):
            layers = moe_layers(model)
            assert [layer.name for layer in layers] == NAMES
            assert [layer.flops_per_pair for layer in layers] == [layer.flops_per_pair for layer in plain]
            assert [layer.num_experts for layer in layers] == [8, 8]
        one = usmoe.patch(adapted, {NAMES[1]: USMOE})
        with usmoe.record(one) as trace:
            logits(one)
        assert [len(said.routing.token) for said in trace.last.values()] == [96, 36]
