"""A router's own rule is found out by asking it: the cases in which a few answers would not do."""

import dataclasses

import pytest
import torch
from torch import nn

import usmoe
from families import FAMILIES, build, inputs
from families_table import answer, distance
from test_families import LARGEST
from tiny import tiny, tokens
from usmoe.hf.layers import moe_layers


@torch.no_grad()
@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2", "mistral4"])
@pytest.mark.parametrize(
    ("experts", "groups", "kept", "k"), [(8, 4, 3, 1), (8, 4, 2, 1), (16, 8, 6, 2), (64, 2, 1, 1), (64, 8, 7, 8)]
)
def test_a_group_limit_that_seldom_bites_is_found(name, experts, groups, kept, k):
    changes = dict(n_routed_experts=experts, n_group=groups, topk_group=kept, num_experts_per_tok=k)
    if name == "deepseek_v2":
        changes["topk_method"] = "group_limited_greedy"
    model = build(FAMILIES[name], num_hidden_layers=2, **changes)
    layers = moe_layers(model)
    assert {layer.host.groups.number for layer in layers} == {groups}
    assert {layer.host.groups.kept for layer in layers} == {kept}
    given = inputs(FAMILIES[name], batch=8, length=40, padding=False)
    before = answer(model, given)
    with usmoe.patched(model, usmoe.OwnChoice()):
        assert distance(answer(model, given), before) < LARGEST


@pytest.mark.parametrize("name", ["deepseek_v3 grouped", "mixtral", "gemma4", "zaya"])
def test_weights_that_are_not_loaded_yet_do_not_matter(name):
    model = build(FAMILIES[name])
    rules = [row.own_choice for row in usmoe.supported(model)]
    for size in (0.0, 100.0):
        for layer in moe_layers(model):
            kept = {n: p.clone() for n, p in layer.router.named_parameters()}
            with torch.no_grad():
                for parameter in layer.router.parameters():
                    parameter.mul_(size if parameter.ndim == 2 else 1)
            before = {n: p.clone() for n, p in layer.router.state_dict().items()}
            assert [row.own_choice for row in usmoe.supported(model)] == rules
            assert all(torch.equal(before[n], p) for n, p in layer.router.state_dict().items())
            with torch.no_grad():
                for n, parameter in layer.router.named_parameters():
                    parameter.copy_(kept[n])


def test_asking_leaves_every_parameter_buffer_and_mode_as_it_was():
    model = build(FAMILIES["deepseek_v3 grouped"]).train()
    parameters = {n: (p, p._version) for n, p in model.named_parameters()}
    buffers = {n: (b, b._version) for n, b in model.named_buffers()}
    usmoe.supported(model)
    assert all(p is parameters[n][0] and p._version == parameters[n][1] for n, p in model.named_parameters())
    assert all(b is buffers[n][0] and b._version == buffers[n][1] for n, b in model.named_buffers())
    assert all(module.training for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 2])
def test_shared_weights_of_the_same_shape_as_the_chosen_ones(k):
    family = FAMILIES["inkling"]
    model, given = build(family, num_experts_per_tok=k, n_shared_experts=k), inputs(family)
    before = answer(model, given)
    with usmoe.patched(model, usmoe.OwnChoice()):
        assert distance(answer(model, given), before) < LARGEST


def test_one_expert_leaves_nothing_to_choose():
    model = tiny("mixtral", num_local_experts=1, num_experts_per_tok=1)
    assert {row.reason for row in usmoe.supported(model)} == {"it has one expert, so there is nothing to choose"}
    with pytest.raises(ValueError, match=r"No layer of Mixtral.* can be patched: it has one expert"):
        usmoe.patch(model, usmoe.USMoE(k=1))


@torch.no_grad()
def test_a_correction_bias_is_read_where_it_lives_when_the_model_runs():
    family = FAMILIES["deepseek_v3"]
    model, given = build(family), inputs(family)
    usmoe.patch(model, usmoe.OwnChoice())
    for module in model.modules():
        if isinstance(getattr(module, "e_score_correction_bias", None), torch.Tensor):
            module.e_score_correction_bias = nn.Buffer(torch.linspace(1, -1, 8))
    ours = answer(model, given)
    assert distance(ours, answer(usmoe.unpatch(model), given)) < LARGEST


def test_a_budget_above_the_experts_is_refused_under_every_pool():
    model = tiny()
    for router in (
        usmoe.USMoE(k=9),
        usmoe.USMoE(k="9x", pool="threshold", threshold=0.1),
        usmoe.ExpertChoice(k=9),
        usmoe.OwnChoice(k=9),
    ):
        with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp: A budget of k=\d+ .* impossible with 8 experts"):
            usmoe.patch(model, router)
    assert not hasattr(model, "_usmoe_patch")


def test_what_is_no_batch_is_refused_in_a_sentence():
    model = tiny()
    for bad in ([tokens()[0]], [[1, 2, 3]], ["text"], [tokens().float()], [{"text": "x"}]):
        for find in (lambda bad: usmoe.calibrate(model, bad, usmoe.USMoE()), lambda bad: usmoe.tune(model, bad)):
            with pytest.raises(TypeError, match=r"Give integer tensors, or mappings with input_ids"):
                find(bad)
    with pytest.raises(ValueError, match="no alphas"):
        usmoe.tune(model, [tokens()], alphas=())


ODD_RULES = [
    *(("phimoe", dict(router_jitter_noise=jitter)) for jitter in (0.01, 0.2, 0.3, 0.5)),
    ("deepseek_v3 grouped", dict(routed_scaling_factor=0.013)),
    ("hunyuan_v1_moe", {}),
    ("laguna softcapped", {}),
    ("minimax_m3_vl", {}),
    ("qwen3_moe unnormalised", {}),
]


@torch.no_grad()
@pytest.mark.usefixtures("quiet_transformers")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "changes"), ODD_RULES, ids=str)
def test_a_rule_is_read_in_16_bits_as_in_32(name, changes, dtype):
    model = build(FAMILIES[name], **changes)
    wide = moe_layers(model)
    assert all(layer.rule is not None for layer in wide)
    model.to(dtype)
    before = {name: (value.dtype, value.clone()) for name, value in model.state_dict().items()}
    for layer, narrow in zip(wide, moe_layers(model), strict=True):
        assert narrow.rule is not None, narrow.reason
        one, other = (
            dataclasses.asdict(dataclasses.replace(rule.host, scale=1.0, bias=None))
            for rule in (layer.rule, narrow.rule)
        )
        assert one == other
        assert narrow.rule.host.scale == pytest.approx(layer.rule.host.scale, rel=1e-4)
    for name, value in model.state_dict().items():  # what was asked has its own values and dtype again
        assert value.dtype is before[name][0]
        assert torch.equal(value, before[name][1])
