"""A patched model on disk: for plain transformers a model like any other, for usmoe the model with its routers."""

import json
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

import usmoe
from rounding import assert_to_rounding
from tiny import tiny, tokens

pytestmark = pytest.mark.portable

ROUTERS = [
    usmoe.OwnChoice(k=2),
    usmoe.ExpertChoice(pool="threshold", threshold=(0.4, 0.5, 0.6, 0.5, 0.5, 0.45, 0.55, float("inf"))),
    usmoe.USMoE(k="0.75x", alpha=0.1),
    usmoe.USMoE(k=2, pool="threshold", threshold=0.1234567890123456789, burst=8, min_experts=1),
    usmoe.BoundedChoice(k=2, per_token=(1, 3)),
]


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_from_pretrained_gives_the_same_weights_to_the_bit_and_the_same_logits(router, tmp_path):
    model = usmoe.patch(tiny(), router)
    x = tokens()
    model.save_pretrained(tmp_path)
    again = usmoe.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert not again.training
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    assert_to_rounding(again(x).logits, model(x).logits)  # weights from a file lie elsewhere in memory
    again.save_pretrained(tmp_path / "twice")
    assert_to_rounding(usmoe.from_pretrained(tmp_path / "twice")(x).logits, model(x).logits)


def test_one_router_a_layer_and_the_dtype_are_kept(tmp_path):
    routers = [usmoe.OwnChoice(k=1), usmoe.USMoE(k=2.5)]
    tiny().save_pretrained(tmp_path / "plain")
    model = usmoe.from_pretrained(tmp_path / "plain", router=routers, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "patched")
    again = usmoe.from_pretrained(str(tmp_path / "patched"))
    assert again.dtype == torch.bfloat16
    assert_to_rounding(again(tokens()).logits, model(tokens()).logits, roundings=8)


def test_plain_transformers_loads_it_unpatched_and_without_complaint(tmp_path, caplog):
    model = tiny()
    x = tokens()
    plain = model(x).logits
    usmoe.patch(model, usmoe.USMoE(k=1)).save_pretrained(tmp_path)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not caplog.records
    assert_to_rounding(loaded(x).logits, plain)
    written = json.loads((tmp_path / "config.json").read_text())["usmoe"]
    assert written["schema"] == 1
    assert written["routers"]["model.layers.1.mlp"] == usmoe.USMoE(k=1).to_dict()


def test_the_configuration_in_memory_is_left_alone_and_an_unpatched_model_writes_none(tmp_path):
    model = usmoe.patch(tiny(), usmoe.USMoE(k=1))
    model.save_pretrained(tmp_path / "patched")
    assert not hasattr(model.config, "usmoe")
    again = usmoe.unpatch(usmoe.from_pretrained(tmp_path / "patched"))
    again.save_pretrained(tmp_path / "plain")
    assert "usmoe" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "save_pretrained" not in model.__dict__ or usmoe.unpatch(model) is model
    assert not {"save_pretrained", "generate"} & set(model.__dict__)
    assert_to_rounding(usmoe.from_pretrained(tmp_path / "plain")(tokens()).logits, model(tokens()).logits)


def a_router_of_mine(logits, valid, **kw):
    return usmoe.Routing.from_dense(logits.softmax(-1), logits > 0, valid=valid)


def test_code_of_the_users_own_is_named_and_never_run_from_a_file(tmp_path):
    model = usmoe.patch(tiny(), a_router_of_mine)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"test_saved:a_router_of_mine.*router="):
        usmoe.from_pretrained(tmp_path)
    again = usmoe.from_pretrained(tmp_path, router=a_router_of_mine)
    assert_to_rounding(again(tokens()).logits, model(tokens()).logits)


def spoiled(tmp_path, change) -> str:
    usmoe.patch(tiny(), usmoe.USMoE(k=1)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    change(config["usmoe"])
    path.write_text(json.dumps(config))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda saved: saved.update(schema=3), r"has schema 3, and this usmoe reads schema 2\. Update usmoe"),
        (lambda saved: saved["routers"].pop("model.layers.1.mlp"), r"for 1 layers.*the model has 2 MoE layers"),
        (lambda saved: saved["routers"].update({"model.layers.9.mlp": {}}), r"holds no router for model\.layers\.9"),
        (lambda saved: saved["routers"]["model.layers.0.mlp"].update(colour=3), r"holds no router for model.*colour"),
        (lambda saved: saved["routers"].update({"model.layers.0.mlp": "os:getcwd"}), "'os:getcwd' is no router"),
        (lambda saved: saved.pop("routers"), "holds no routers"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_sentence(change, sentence, tmp_path):
    source = spoiled(tmp_path, change)
    with pytest.raises(ValueError, match=sentence):
        usmoe.from_pretrained(source)
    assert usmoe.from_pretrained(source, router=usmoe.OwnChoice()) is not None
    assert AutoModelForCausalLM.from_pretrained(source) is not None


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no folder"):
        usmoe.from_pretrained(tmp_path / "nothing")


def test_options_reach_the_configuration_as_in_transformers(tmp_path):
    usmoe.patch(tiny(), usmoe.USMoE(k=1)).save_pretrained(tmp_path / "inner" / "model")
    model = usmoe.from_pretrained(tmp_path / "inner", subfolder="model", use_cache=False, dtype=torch.float64)
    assert (model.config.use_cache, model.dtype) == (False, torch.float64)
    with pytest.raises(ValueError, match="output_loading_info"):
        usmoe.from_pretrained(tmp_path / "inner" / "model", output_loading_info=True)
    with pytest.raises(ValueError, match="is no folder of a model"):
        usmoe.from_pretrained("")


def test_a_base_model_of_a_registered_family_comes_back_as_itself(tmp_path):
    from usmoe.hf.deepseek import DeepseekConfig, DeepseekModel

    config = DeepseekConfig(
        vocab_size=96, hidden_size=32, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, n_routed_experts=8, num_experts_per_tok=2, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = usmoe.patch(DeepseekModel(config).eval(), usmoe.USMoE(k=1.5))
    model.save_pretrained(tmp_path)
    again = usmoe.from_pretrained(tmp_path)
    assert type(again) is DeepseekModel
    assert_to_rounding(again(tokens()).last_hidden_state, model(tokens()).last_hidden_state)
