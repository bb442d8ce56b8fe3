"""The balance loss of a patched model stands where the unpatched model has one, and nowhere else."""

import pytest
import torch
import transformers

import usmoe
from tiny import tiny, tokens

FAMILIES = ["olmoe", "mixtral", "qwen3_moe"]
ROUTERS = [usmoe.TokenChoice(k=1), usmoe.USMoE(k=1.5), usmoe.ExpertChoice(k=2)]


@pytest.mark.parametrize("router", ROUTERS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_of_the_output_stand_in_the_order_of_the_unpatched_model(family, router):
    model, x = tiny(family), tokens()
    theirs = model(x, labels=x, output_router_logits=True)
    usmoe.patch(model, router)
    ours = model(x, labels=x, output_router_logits=True)
    assert list(ours) == list(theirs)
    assert ours[1] is ours.aux_loss
    torch.testing.assert_close(ours.loss, model(x, labels=x).loss + model.router_aux_loss_coef * ours.aux_loss)


@pytest.mark.parametrize("router", ROUTERS, ids=str)
@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "qwen3_moe"])
def test_bodies_and_classification_heads_get_no_balance_loss(family, router):
    config, x = tiny(family).config, tokens()
    heads = (transformers.AutoModel, transformers.AutoModelForSequenceClassification)
    for head, labels in zip(heads, ({}, {"labels": torch.tensor([0, 1])}), strict=True):
        model = head.from_config(config).eval()
        theirs = model(x, output_router_logits=True, **labels)
        usmoe.patch(model, router)
        ours = model(x, output_router_logits=True, **labels)
        assert list(ours) == list(theirs)
        assert "aux_loss" not in ours
        if labels:
            assert torch.equal(ours.loss, model(x, **labels).loss)


@pytest.mark.parametrize("router", [usmoe.OwnChoice(), *ROUTERS], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_reentrant_checkpointing_is_refused_and_the_other_kind_has_the_gradients(family, router):
    x, found = tokens(), []
    for reentrant in (None, False, True):
        model = usmoe.patch(tiny(family, router_aux_loss_coef=5.0), router).train()
        if reentrant is not None:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        given = dict(labels=x, use_cache=False, output_router_logits=True)
        if reentrant:
            with pytest.raises(ValueError, match=r"[Rr]eentrant activation checkpointing.*use_reentrant"):
                model(x, **given)
            continue
        model(x, **given).loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)
