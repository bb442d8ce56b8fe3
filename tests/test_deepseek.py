"""DeepSeekMoE-16B on transformers 5: a published checkpoint, tiny, against its arithmetic written out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, DynamicCache

import usmoe
from deepseek_checkpoint import PUBLISHED, VARIANTS, load, oracle, published_tensors, tokens, write, write_tokenizer
from rounding import assert_to_rounding
from usmoe.hf.deepseek import DeepseekConfig, DeepseekForCausalLM, DeepseekModel, DeepseekTokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "published", published_tensors(PUBLISHED), PUBLISHED)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_logits_equal_the_arithmetic_written_out(tmp_path, variant, attention):
    config = PUBLISHED | variant
    tensors = published_tensors(config)
    write(tmp_path, tensors, config)
    model, report = load(tmp_path, output_loading_info=True, attn_implementation=attention)
    assert not any(report.values())  # no key missing, unexpected or misshapen
    x = tokens()
    theirs = torch.stack([oracle(tensors, config, row) for row in x.tolist()])
    assert theirs.std() > 1
    assert (model(x).logits - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_the_published_configuration_is_read_as_it_is(folder):
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is DeepseekConfig
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000}
    assert config.dtype == torch.bfloat16
    said = {"auto_map", "aux_loss_alpha", "seq_aux", "pretraining_tp", "norm_topk_prob", "n_routed_experts"}
    assert {key: getattr(config, key) for key in said} == {key: PUBLISHED[key] for key in said}
    assert config.num_experts == 12  # by the name that transformers' own families use
    assert [config.is_moe(layer) for layer in range(3)] == [False, True, True]
    assert type(AutoModelForCausalLM.from_config(config)) is DeepseekForCausalLM


def test_at_the_published_size_it_has_the_published_number_of_parameters():
    config = DeepseekConfig(
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=28,
        num_attention_heads=16,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        max_position_embeddings=4096,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == 16.38


def test_a_key_that_is_absent_means_what_it_means_to_the_published_code():
    dense = DeepseekConfig(num_attention_heads=8)
    assert dense.num_key_value_heads == 8
    assert not any(dense.is_moe(layer) for layer in range(dense.num_hidden_layers))
    moe = DeepseekConfig(n_routed_experts=4, num_experts_per_tok=2)
    assert all(moe.is_moe(layer) for layer in range(moe.num_hidden_layers))
    assert (moe.norm_topk_prob, moe.tie_word_embeddings, moe.rope_parameters["rope_theta"]) == (False, False, 10000)


def test_a_fresh_model_is_drawn_as_the_configuration_says(folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, dtype=torch.float32))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert parameter.eq(1).all()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name


def test_the_code_that_the_checkpoint_brings_is_neither_run_nor_asked_for(folder, monkeypatch):
    for name in ("configuration_deepseek", "modeling_deepseek"):
        (folder / f"{name}.py").write_text("raise RuntimeError('remote code ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asked the user"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("something went to the network"))
    for trust in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
        assert type(AutoConfig.from_pretrained(folder, **trust)) is DeepseekConfig
        assert type(AutoModel.from_pretrained(folder, **trust)) is DeepseekModel
        assert type(AutoModelForCausalLM.from_pretrained(folder, **trust)) is DeepseekForCausalLM


@pytest.mark.portable
def test_the_inner_model_loads_by_itself(folder):
    whole, inner = load(folder), AutoModel.from_pretrained(folder, dtype=torch.float32)
    x = tokens()
    assert torch.equal(inner(x).last_hidden_state, whole.model(x).last_hidden_state)


def test_a_cache_gives_what_the_whole_sequence_gives(folder):
    model, x = load(folder), tokens()
    whole = model(x, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    steps = [model(x[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(x.shape[1])]
    assert (torch.cat(steps, dim=1) - whole).abs().max() < 1e-5 * whole.abs().max()
    assert cache.get_seq_length() == x.shape[1]


def test_padding_on_the_left_changes_nothing(folder):
    model, x = load(folder), tokens(batch=1)
    padding = torch.full((1, 4), 5)
    mask = torch.cat([torch.zeros_like(padding), torch.ones_like(x)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    alone = model(x).logits
    behind = model(torch.cat([padding, x], dim=1), attention_mask=mask, position_ids=positions).logits[:, 4:]
    assert (behind - alone).abs().max() < 1e-5 * alone.abs().max()


def test_generate_takes_the_best_token_again_and_again(folder):
    model, x = load(folder), tokens(batch=1)
    long = model.generate(x, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    grown = x
    for _ in range(6):
        logits = model(grown, use_cache=False).logits[:, -1]
        logits[:, PUBLISHED["eos_token_id"]] = -torch.inf
        grown = torch.cat([grown, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(long, grown)


def test_usmoe_finds_its_layers_and_reads_its_rule(folder):
    rows = usmoe.supported(load(folder))
    assert [(row.layer, row.family, row.experts, row.own_choice) for row in rows] == [
        ("model.layers.1.mlp", "deepseek", 12, "top 3 of softmax"),
        ("model.layers.2.mlp", "deepseek", 12, "top 3 of softmax"),
    ]
    assert all(row.supported for row in rows)


@pytest.mark.parametrize("variant", VARIANTS[:5], ids=str)
def test_own_choice_through_our_path_equals_the_model_and_usmoe_does_not(tmp_path, variant):
    config = PUBLISHED | variant
    model = load(write(tmp_path, published_tensors(config), config))
    x = tokens()
    before = model(x).logits
    with usmoe.patched(model, usmoe.OwnChoice()), usmoe.record(model) as trace:
        ours = model(x).logits
    assert (ours - before).abs().max() < 2e-6 * before.abs().max()
    assert all(out.routing.experts_per_token.eq(config["num_experts_per_tok"]).all() for out in trace.last.values())
    with usmoe.patched(model, usmoe.USMoE()):
        assert (model(x).logits - before).abs().max() > 1e-3
    assert torch.equal(model(x).logits, before)


def test_router_logits_hidden_states_and_attentions_are_recorded(folder):
    model = load(folder, attn_implementation="eager")
    said = model(tokens(), output_router_logits=True, output_hidden_states=True, output_attentions=True)
    assert [tuple(logits.shape) for logits in said.router_logits] == [(22, 12)] * 2
    assert [tuple(states.shape) for states in said.hidden_states] == [(2, 11, 32)] * 4
    assert [tuple(shares.shape) for shares in said.attentions] == [(2, 4, 11, 11)] * 3


def test_training_reaches_every_parameter_with_and_without_checkpointing(folder):
    model, x = load(folder).train(), tokens(batch=8)
    model(x, labels=x).loss.backward()
    plain = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad is not None and grad.abs().max() > 0 for grad in plain.values())
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": False})
    model(x, labels=x, use_cache=False).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name])


def test_the_balance_loss_of_transformers_is_added_on_request_alone(folder):
    model, x = load(folder).train(), tokens()
    plain = model(x, labels=x)
    asked = model(x, labels=x, output_router_logits=True)
    assert plain.aux_loss is None
    torch.testing.assert_close(asked.loss, plain.loss + 0.001 * asked.aux_loss)


@pytest.mark.portable
@pytest.mark.parametrize("files", [1, 5])
def test_saving_writes_the_published_names_bit_for_bit(tmp_path, files):
    tensors = published_tensors(PUBLISHED)
    model = load(write(tmp_path / "published", tensors, PUBLISHED, files))
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    model.save_pretrained(tmp_path / "ours", max_shard_size=size // files + 4096)
    written: dict[str, Tensor] = {}
    parts = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(parts) == files
    for part in parts:
        written |= load_file(part)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    again, report = load(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    x = tokens()
    assert_to_rounding(again(x).logits, model(x).logits)


def test_a_checkpoint_in_bfloat16_is_loaded_and_saved_as_it_is(tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in published_tensors(PUBLISHED).items()}
    model = AutoModelForCausalLM.from_pretrained(write(tmp_path / "published", tensors, PUBLISHED))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.layers[1].mlp.experts.down_proj[11], tensors[name_of(1, 11, "down")])
    wide = load(tmp_path / "published")
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    x = tokens()
    exact = wide(x).logits
    model.set_experts_implementation("eager")  # grouped_mm wants rows of 16 bytes, where tensors happen to be aligned
    assert (model(x).logits - exact).std() < 0.05 * exact.std()  # bfloat16 rounding, and a few experts that flip
    assert [row.own_choice for row in usmoe.supported(model)] == ["top 3 of softmax"] * 2
    model.save_pretrained(tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)


def name_of(layer: int, expert: int, part: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"


@pytest.mark.parametrize("part", ["gate", "up", "down"])
def test_an_expert_that_is_missing_or_misshapen_is_an_error(tmp_path, part):
    tensors = published_tensors(PUBLISHED)
    name = name_of(2, 10, part)
    without = {key: tensor for key, tensor in tensors.items() if key != name}
    with pytest.raises(RuntimeError, match="report"):
        load(write(tmp_path / "missing", without, PUBLISHED))
    crooked = tensors | {name: tensors[name][:-1].clone()}
    with pytest.raises(RuntimeError, match="report"):
        load(write(tmp_path / "crooked", crooked, PUBLISHED))


def test_a_layer_whose_experts_are_all_missing_is_reported(tmp_path):
    kept = {name: t for name, t in published_tensors(PUBLISHED).items() if "layers.2.mlp.experts" not in name}
    _, report = load(write(tmp_path, kept, PUBLISHED), output_loading_info=True)
    experts = "model.layers.2.mlp.experts."
    assert set(report["missing_keys"]) == {f"{experts}gate_up_proj", f"{experts}down_proj"}


def test_the_rotation_frequencies_of_old_checkpoints_are_left_aside(tmp_path):
    old = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for layer in range(3)}
    _, report = load(write(tmp_path, published_tensors(PUBLISHED) | old, PUBLISHED), output_loading_info=True)
    assert not any(report.values())


def test_a_router_that_is_not_the_published_one_is_refused(tmp_path):
    write(tmp_path, {}, PUBLISHED | {"scoring_func": "sigmoid"})
    with pytest.raises(ValueError, match=r"scoring_func='sigmoid' is not known for DeepSeekMoE. Give 'softmax'\."):
        AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_experts_per_tok=3 is impossible with n_routed_experts=2"):
        DeepseekConfig(n_routed_experts=2, num_experts_per_tok=3)
    with pytest.raises(ValueError, match="num_experts_per_tok=None is impossible with n_routed_experts=2"):
        DeepseekConfig(n_routed_experts=2)


def test_texts_begin_with_the_begin_token_as_the_checkpoint_says(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asked the user"))
    backend = write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer) is DeepseekTokenizer
    text = "the sum of 12 parts, 中文"
    bare = backend.encode(text).ids
    assert tokenizer(text).input_ids == [1, *bare]
    assert tokenizer(text, add_special_tokens=False).input_ids == bare
    assert tokenizer.decode(bare) == text
    assert tokenizer(["the sum", "the"], padding=True).input_ids[1][-1] == tokenizer.pad_token_id == 2


def test_a_begin_token_that_was_switched_off_stays_off(folder):
    backend = write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, add_bos_token=False)
    assert tokenizer("the sum").input_ids == backend.encode("the sum").ids
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("the sum").input_ids == backend.encode("the sum").ids


def test_a_tokenizer_that_is_saved_begins_each_text_once(folder):
    backend = write_tokenizer(folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("the sum").input_ids == [1, *backend.encode("the sum").ids]
