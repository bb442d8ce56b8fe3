"""Patching another library's model politely: install, disable, restore, each tested."""

import copy

import pytest
import torch
from torch import nn

import usmoe
from rounding import assert_to_rounding
from tiny import FAMILIES, tiny, tokens
from usmoe.hf.experts import IMPLEMENTATION

ROUTERS = [
    usmoe.OwnChoice(),
    usmoe.OwnChoice(k=1),
    usmoe.TokenChoice(k=2, normalize="chosen"),
    usmoe.ExpertChoice(k=2),
    usmoe.ExpertChoice(k=1.5, score="softmax_experts", pool="batch"),
    usmoe.USMoE(),
    usmoe.USMoE(k="0.75x"),
    usmoe.USMoE(k=1.5, alpha=0.5, normalize="all"),
    usmoe.USMoE(k=1, pool="batch", expert_score="softmax_tokens", alpha=1.0),
    usmoe.USMoE(pool="threshold", threshold=0.2),
]


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    x = tokens()
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    mask[1, 10:] = 0
    return x, mask


@pytest.mark.portable
@pytest.mark.parametrize("family", FAMILIES)
def test_own_choice_through_our_path_equals_the_model(family):
    model = tiny(family)
    x, mask = padded()
    real = mask.bool()
    theirs = model(x, attention_mask=mask).logits
    usmoe.patch(model, usmoe.OwnChoice())
    ours = model(x, attention_mask=mask).logits
    difference = (ours - theirs)[real].abs().max() / theirs[real].abs().max()
    assert difference < 2e-6  # float32 rounding; the largest that was seen is 4e-7


@pytest.mark.parametrize("family", FAMILIES)
def test_another_router_changes_the_logits_and_leaving_restores_every_bit(family):
    model = tiny(family)
    x, mask = padded()
    before, keys = model(x, attention_mask=mask).logits, list(model.state_dict())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with usmoe.patched(model, usmoe.USMoE(k="0.75x")):
        inside = model(x, attention_mask=mask).logits
        assert list(model.state_dict()) == keys
    assert (inside - before)[mask.bool()].abs().max() > 1e-3
    assert torch.equal(model(x, attention_mask=mask).logits, before)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert all(m.config._experts_implementation != IMPLEMENTATION for m in model.modules() if hasattr(m, "config"))


def block_by_loop(block: nn.Module, x: torch.Tensor, router, host, valid) -> torch.Tensor:
    """An OLMoE block under any router, pair by pair, from its weights alone."""
    logits = x @ block.gate.weight.T
    routing = router(logits, valid, host=host)
    out = [torch.zeros(x.shape[-1]) for _ in range(x.shape[0] * x.shape[1])]
    flat = x.flatten(0, 1)
    for token, expert, weight in zip(routing.token.tolist(), routing.expert.tolist(), routing.weight, strict=True):
        gate, up = (block.experts.gate_up_proj[expert] @ flat[token]).chunk(2)
        hidden = torch.nn.functional.silu(gate) * up
        out[token] = out[token] + weight * (block.experts.down_proj[expert] @ hidden)
    return torch.stack(out).view_as(x)


@pytest.mark.portable
@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_a_patched_block_equals_the_loop_in_output_and_gradients(router):
    from usmoe.hf.layers import moe_layers

    model = tiny()
    layer = moe_layers(model)[0]
    usmoe.patch(model, router)
    x = torch.randn(2, 7, 32, requires_grad=True)
    toward = torch.randn(2, 7, 32)
    parameters = [x, *layer.block.parameters()]
    ours = layer.block(x)
    theirs = block_by_loop(layer.block, x, router, layer.host, None)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for one, other in zip(
        torch.autograd.grad((ours * toward).sum(), parameters, allow_unused=True),
        torch.autograd.grad((theirs * toward).sum(), parameters, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_original_block_is_never_asked_to_choose():
    """Spoil the model's own selection: our path must not notice."""
    model = tiny()
    x = tokens()
    usmoe.patch(model, usmoe.OwnChoice())
    before = model(x).logits
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(
            lambda module, args, out: (out[0], out[1] * torch.nan, out[2] * 0), prepend=True
        )
    assert torch.equal(model(x).logits, before)


def test_padding_reaches_the_router_and_takes_no_budget():
    model = tiny()
    x, mask = padded()
    with usmoe.patched(model, usmoe.USMoE(k=1.5)), usmoe.record(model) as trace:
        model(x, attention_mask=mask)
    for routing in (said.routing for said in trace.last.values()):
        counts = routing.experts_per_token.view(2, 12)
        assert counts[~mask.bool()].sum() == 0
        assert counts.sum(1).tolist() == [int(1.5 * 9 + 0.5), int(1.5 * 10 + 0.5)]


@pytest.mark.portable
def test_what_padding_holds_and_where_it_stands_does_not_matter():
    model = tiny()
    x = tokens(1, 8)
    with usmoe.patched(model, usmoe.USMoE(k=1.5, alpha=0.5)):
        alone = model(x).logits
        for left, right in ((3, 0), (0, 4), (2, 2)):
            wide = torch.cat([tokens(1, left, 5), x, tokens(1, right, 6)], 1)
            mask = torch.zeros_like(wide)
            mask[:, left : left + 8] = 1
            place = (mask.cumsum(1) - 1).clamp(min=0)
            out = model(wide, attention_mask=mask, position_ids=place).logits[:, left : left + 8]
            torch.testing.assert_close(out, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.portable
def test_a_sequence_does_not_depend_on_its_batch_mates():
    model = tiny()
    x = tokens(4, 9)
    with usmoe.patched(model, usmoe.USMoE(k=1.5)):
        whole = model(x).logits
        alone = torch.cat([model(row[None]).logits for row in x])
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-5)


def test_the_inner_model_can_be_called_by_itself():
    model = tiny()
    x, mask = padded()
    with usmoe.patched(model, usmoe.USMoE(k=1.5)):
        through = model(x, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        inner = model.model(x, attention_mask=mask).last_hidden_state
    assert torch.equal(through[mask.bool()], inner[mask.bool()])


def test_one_router_a_layer_by_list_and_by_name():
    model = tiny()
    x = tokens()
    with usmoe.patched(model, [usmoe.OwnChoice(k=1), usmoe.USMoE(k=2.5)]), usmoe.record(model) as trace:
        model(x)
    assert [len(said.routing.token) for said in trace.last.values()] == [24, 60]
    with usmoe.patched(model, {"model.layers.1.mlp": usmoe.USMoE(k=2.5)}), usmoe.record(model) as trace:
        model(x)
    assert [len(said.routing.token) for said in trace.last.values()] == [24 * 4, 60]


def test_a_router_of_the_users_own():
    def always_expert_three(logits, valid, **kw):
        mask = torch.zeros_like(logits, dtype=torch.bool)
        mask[..., 3] = True
        return usmoe.Routing.from_dense(logits.softmax(-1), mask)

    model = tiny()
    with usmoe.patched(model, always_expert_three), usmoe.record(model) as trace:
        model(tokens())
    assert next(iter(trace.last.values())).routing.load.tolist() == [0, 0, 0, 24, 0, 0, 0, 0]


def test_patching_and_unpatching_twice():
    model = tiny()
    x = tokens()
    before = model(x).logits
    usmoe.patch(model, usmoe.USMoE(k=1))
    once = model(x).logits
    usmoe.patch(model, usmoe.USMoE(k=3))
    assert usmoe.patch(model, usmoe.USMoE(k=1)) is model
    assert torch.equal(model(x).logits, once)
    assert usmoe.unpatch(usmoe.unpatch(model)) is model
    assert torch.equal(model(x).logits, before)


def test_patched_restores_the_patch_that_was_there():
    model = tiny()
    x = tokens()
    usmoe.patch(model, usmoe.USMoE(k=1))
    outside = model(x).logits
    with usmoe.patched(model, usmoe.OwnChoice()):
        assert not torch.equal(model(x).logits, outside)
    assert torch.equal(model(x).logits, outside)
    with pytest.raises(RuntimeError), usmoe.patched(usmoe.unpatch(model), usmoe.USMoE(k=1)):
        raise RuntimeError
    assert not hasattr(model, "_usmoe_patch")


def test_record_keeps_every_forward_with_its_graph():
    model = tiny()
    with usmoe.record(model) as trace:
        model(tokens())
        model(tokens(1, 5))
    assert list(trace) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert [said.routing.num_tokens for said in trace["model.layers.1.mlp"]] == [24, 5]
    assert trace["model.layers.0.mlp"][1].logits.shape == (1, 5, 8)
    (gradient,) = torch.autograd.grad(
        trace["model.layers.1.mlp"][0].routing.weight.sum(), model.model.layers[0].mlp.gate.weight
    )
    assert gradient.abs().sum() > 0
    model(tokens())
    assert len(trace["model.layers.0.mlp"]) == 2


def test_training_a_patched_model_reaches_every_parameter_kind():
    model = tiny().train()
    x = tokens()
    with usmoe.patched(model, usmoe.USMoE(k=1.5, alpha=0.5)):
        model(x, labels=x).loss.backward()
    block = model.model.layers[0].mlp
    for parameter in (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0


def test_gradient_checkpointing_gives_the_same_gradients():
    x, mask = padded()
    gradients = []
    for checkpointing in (False, True):
        model = tiny().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        usmoe.patch(model, usmoe.USMoE(k=1.5))
        model(x, attention_mask=mask, labels=x, use_cache=False).loss.backward()
        gradients.append(model.model.layers[0].mlp.experts.down_proj.grad)
    torch.testing.assert_close(*gradients)


def test_bfloat16():
    model = tiny().to(torch.bfloat16)
    x = tokens()
    theirs = model(x).logits
    with usmoe.patched(model, usmoe.OwnChoice()):
        ours = model(x).logits
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_the_rule_is_recognised_in_bfloat16_where_logits_tie_and_with_weights_of_any_size(family):
    for seed, size in enumerate((0.002, 0.02, 0.2, 2.0, 20.0)):
        model = tiny(family, seed, initializer_range=size, num_local_experts=64).to(torch.bfloat16)
        assert all(row.supported for row in usmoe.supported(model)), size


@pytest.mark.portable
def test_generation_step_by_step_equals_the_whole_under_a_causal_router():
    model = tiny()
    x = tokens(1, 10)
    with usmoe.patched(model, usmoe.USMoE(pool="threshold", threshold=0.15, alpha=0.5)):
        whole = model(x).logits
        past, steps = None, []
        for place in range(10):
            out = model(x[:, place : place + 1], past_key_values=past, use_cache=True)
            past = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)


def test_a_mask_is_forgotten_when_the_forward_is_over():
    model = tiny()
    x, mask = padded()
    usmoe.patch(model, usmoe.USMoE(k=1.5))
    before = model.model(x).last_hidden_state
    model(x, attention_mask=mask)
    assert torch.equal(model.model(x).last_hidden_state, before)
    with pytest.raises(IndexError):
        model(x + 1000, attention_mask=mask)  # fails halfway
    assert torch.equal(model.model(x).last_hidden_state, before)


def test_a_mask_of_four_dimensions_is_read_and_one_that_cannot_be_read_is_refused_where_tokens_compete():
    model = tiny()
    x, mask = padded()
    real = mask.bool()
    usmoe.patch(model, usmoe.USMoE(k=1.5))
    before = model(x, attention_mask=mask).logits[real]
    looks = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril() & real[:, None, None, :]
    for wide in (looks, torch.zeros(looks.shape).masked_fill(~looks, torch.finfo(torch.float32).min)):
        assert torch.allclose(model(x, attention_mask=wide).logits[real], before, atol=1e-5)
    for router in (usmoe.USMoE(k=1.5), usmoe.OwnChoice()):
        with usmoe.patched(model, router):
            for bad in (torch.ones(2, 7), torch.ones(2, 15), torch.ones(3, 12), torch.ones(2, 12, 12), torch.ones(12)):
                with pytest.raises(ValueError, match="which tokens are padding") as refused:
                    model(x, attention_mask=bad)
                assert str(tuple(bad.shape)) in str(refused.value)
    assert torch.equal(model(x, attention_mask=mask).logits[real], before)


def test_two_models_of_one_configuration_do_not_disturb_each_other():
    one = tiny()
    other = type(one)(one.config).eval()
    other.load_state_dict(one.state_dict())
    x = tokens()
    plain = one(x).logits
    usmoe.patch(one, usmoe.USMoE(k=1))
    usmoe.patch(other, usmoe.USMoE(k=2))
    first, second = one(x).logits, other(x).logits
    usmoe.unpatch(one)
    assert torch.equal(one(x).logits, plain)
    assert torch.equal(other(x).logits, second)
    usmoe.patch(one, usmoe.USMoE(k=1))
    assert torch.equal(one(x).logits, first)


def test_a_deep_copy_is_patched_like_its_original_and_apart_from_it():
    model = usmoe.patch(tiny(), usmoe.USMoE(k=1.5))
    x = tokens()
    patched = model(x).logits
    twin = copy.deepcopy(model)
    usmoe.unpatch(model)
    assert torch.equal(twin(x).logits, patched)
    assert torch.equal(usmoe.unpatch(twin)(x).logits, model(x).logits)


def test_a_part_of_a_patched_model_is_not_patched_again():
    model = usmoe.patch(tiny(), usmoe.OwnChoice())
    with pytest.raises(ValueError, match="part of a model that is patched"):
        usmoe.patch(model.model, usmoe.USMoE(k=1))
    usmoe.unpatch(model)
    usmoe.patch(model.model, usmoe.USMoE(k=1))
    with pytest.raises(ValueError, match="patched by itself"):
        usmoe.patch(model, usmoe.USMoE(k=1))


def test_record_goes_on_when_the_model_is_patched_inside_it():
    model = tiny()
    x = tokens()
    with usmoe.record(model) as trace:
        model(x)
        with usmoe.patched(model, usmoe.USMoE(k=1)):
            model(x)
        model(x)
    assert [len(said.routing.token) for said in trace["model.layers.0.mlp"]] == [96, 24, 96]
    assert not hasattr(model, "_usmoe_patch")
    with usmoe.record(model) as trace:
        usmoe.patch(model, usmoe.USMoE(k=1))
        model(x)
    assert [len(said.routing.token) for said in trace["model.layers.0.mlp"]] == [24]
    assert hasattr(model, "_usmoe_patch")


def test_a_router_that_returns_no_routing_is_named():
    model = usmoe.patch(tiny(), lambda logits, valid, **kw: logits)
    with pytest.raises(TypeError, match="returned a Tensor"):
        model(tokens())


def test_supported_says_what_each_layer_does():
    rows = usmoe.supported(tiny("mixtral"))
    assert [row.layer for row in rows] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert (rows[0].family, rows[0].experts, rows[0].supported, rows[0].reason) == ("mixtral", 8, True, None)
    assert rows[0].own_choice == "top 2 of softmax normalised over chosen"


def test_a_rule_that_cannot_be_recognised_is_refused_with_the_reason():
    model = tiny()
    gate = model.model.layers[1].mlp.gate
    original = type(gate).forward
    gate.forward = lambda x: (lambda out: (out[0], out[1] ** 2, out[2]))(original(gate, x))
    assert [row.supported for row in usmoe.supported(model)] == [True, False]
    before = model(tokens()).logits
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp .* rule that usmoe cannot express"):
        usmoe.patch(model, usmoe.OwnChoice())
    assert torch.equal(model(tokens()).logits, before)


def test_bad_requests_are_refused_in_a_sentence_and_change_nothing():
    model = tiny()
    x = tokens()
    before = model(x).logits
    dense = __import__("transformers").GPT2LMHeadModel(
        __import__("transformers").GPT2Config(
            n_layer=1, n_embd=8, n_head=1, vocab_size=10, bos_token_id=1, eos_token_id=1
        )
    )
    for wrong, message in (
        (usmoe.USMoE(k=9), "k=9 experts per token is impossible with 8 experts"),
        (usmoe.USMoE(pool="threshold"), "no threshold yet"),
        (usmoe.OwnChoice(k="0.6x"), "same number of experts"),
        ([usmoe.OwnChoice()], "1 routers were given for 2 MoE layers"),
        ({"model.layers.7.mlp": usmoe.OwnChoice()}, "There is no MoE layer"),
    ):
        with pytest.raises(ValueError, match=message):
            usmoe.patch(model, wrong)
    with pytest.raises(TypeError, match="is not a router"):
        usmoe.patch(model, 3)
    with pytest.raises(ValueError, match="no MoE layer"):
        usmoe.patch(dense, usmoe.OwnChoice())
    with pytest.raises(TypeError, match="not a transformers model"):
        usmoe.patch(nn.Linear(2, 2), usmoe.OwnChoice())
    assert torch.equal(model(x).logits, before)


def test_the_balance_loss_follows_the_real_route():
    model = tiny().train()
    x, mask = padded()
    labels = x.masked_fill(mask * mask.roll(1, 1) == 0, -100)  # nothing is asked of padding
    given = dict(attention_mask=mask, labels=labels, output_router_logits=True)
    theirs = model(x, **given)
    usmoe.patch(model, usmoe.TokenChoice(k=4))  # the model's own rule, but as a route of ours
    ours = model(x, **given)
    torch.testing.assert_close(ours.aux_loss, theirs.aux_loss)
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert len(ours.router_logits) == len(theirs.router_logits)
    real = mask.bool().reshape(-1)
    for one, other in zip(ours.router_logits, theirs.router_logits, strict=True):
        torch.testing.assert_close(one[real], other[real])
    usmoe.patch(model, usmoe.USMoE(k=1))
    with usmoe.record(model) as trace:
        fewer = model(x, **given)
    load = sum(said.routing.load for said in trace.last.values()) / real.sum() / 2
    likely = sum(said.logits.flatten(0, 1).softmax(-1)[real].mean(0) for said in trace.last.values()) / 2
    torch.testing.assert_close(fewer.aux_loss, 8 * (load * likely).sum())
    plain = model(x, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(fewer.loss, plain + model.router_aux_loss_coef * fewer.aux_loss)
    (gradient,) = torch.autograd.grad(fewer.aux_loss, model.model.layers[0].mlp.gate.weight)
    assert gradient.abs().sum() > 0
    parts = model(x, **given, return_dict=False)
    torch.testing.assert_close(parts[:3], fewer.to_tuple()[:3])
    assert model(x, attention_mask=mask, labels=x).aux_loss is None


@pytest.mark.portable
def test_the_balance_loss_that_a_configuration_asks_for_is_ours_too():
    model = tiny(output_router_logits=True)
    x = tokens()
    theirs = model(x, labels=x).aux_loss
    usmoe.patch(model, usmoe.USMoE(k=1))
    assert model(x, labels=x).aux_loss < theirs / 2
    usmoe.patch(model, usmoe.OwnChoice())
    assert_to_rounding(model(x, labels=x).aux_loss, theirs)
