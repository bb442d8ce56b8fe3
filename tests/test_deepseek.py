"""DeepSeekMoE-16B on transformers 5: a published checkpoint, tiny, against its arithmetic written out by hand.

    layer 0          attention, dense feed-forward
    layers 1, 2      attention, 12 routed experts of which 3 a token, 2 shared experts

Twelve experts and not eight, so that a sort by text (experts.10 before experts.2) would be seen.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import silu
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, DynamicCache

import usmoe
from usmoe._autoregister import _Finder
from usmoe.hf.deepseek import DeepseekConfig, DeepseekForCausalLM, DeepseekModel, DeepseekTokenizer

PUBLISHED = {  # config.json of deepseek-ai/deepseek-moe-16b-base, key by key; the sizes are ours
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "model_type": "deepseek",
    "moe_intermediate_size": 12,
    "moe_layer_freq": 1,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vocab_size": 96,
}
VARIANTS = [
    {},
    {"norm_topk_prob": True},
    {"norm_topk_prob": True, "num_experts_per_tok": 1},  # the published code leaves the weight of a single expert
    {"n_shared_experts": None, "rms_norm_eps": 0.1},
    {"first_k_dense_replace": 0, "moe_layer_freq": 2},
    {"n_routed_experts": None, "n_shared_experts": None, "num_experts_per_tok": None},
    {"num_key_value_heads": 2, "attention_bias": True, "tie_word_embeddings": True},
    {"rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
]


def routes(config: dict, layer: int) -> bool:
    above = layer >= config["first_k_dense_replace"] and layer % config["moe_layer_freq"] == 0
    return bool(config["n_routed_experts"]) and above


def published_tensors(config: dict) -> dict[str, Tensor]:
    """Random tensors of every published name, large enough for logits with spread."""
    width, dense, narrow = config["hidden_size"], config["intermediate_size"], config["moe_intermediate_size"]
    keys = width * config["num_key_value_heads"] // config["num_attention_heads"]
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}

    def add(name: str, *shape: int) -> None:
        # what bfloat16 can hold: the file is the same in both types
        drawn = 0.3 * torch.randn(shape, generator=generator) + (1.0 if "norm" in name else 0.0)
        tensors[name] = drawn.bfloat16().float()

    def add_mlp(name: str, inner: int) -> None:
        add(f"{name}.gate_proj.weight", inner, width)
        add(f"{name}.up_proj.weight", inner, width)
        add(f"{name}.down_proj.weight", width, inner)

    add("model.embed_tokens.weight", config["vocab_size"], width)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        add(f"{name}.input_layernorm.weight", width)
        add(f"{name}.post_attention_layernorm.weight", width)
        for part, rows in {"q": width, "k": keys, "v": keys, "o": width}.items():
            add(f"{name}.self_attn.{part}_proj.weight", rows, width)
            if config["attention_bias"]:
                add(f"{name}.self_attn.{part}_proj.bias", rows)
        if not routes(config, layer):
            add_mlp(f"{name}.mlp", dense)
            continue
        add(f"{name}.mlp.gate.weight", config["n_routed_experts"], width)
        for expert in range(config["n_routed_experts"]):
            add_mlp(f"{name}.mlp.experts.{expert}", narrow)
        if config["n_shared_experts"]:
            add_mlp(f"{name}.mlp.shared_experts", narrow * config["n_shared_experts"])
    add("model.norm.weight", width)
    if not config["tie_word_embeddings"]:
        add("lm_head.weight", config["vocab_size"], width)
    return tensors


def write(folder: Path, tensors: dict[str, Tensor], config: dict, files: int = 1) -> Path:
    """A checkpoint folder; in several files the tensors are dealt out like cards, so that no layer is in one."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    where = {name: f"model-{i % files + 1:05d}-of-{files:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        part = {name: tensors[name] for name in tensors if where[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "published", published_tensors(PUBLISHED), PUBLISHED)


def load(folder: Path, **options) -> DeepseekForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, **({"dtype": torch.float32} | options))


def tokens(batch: int = 2, length: int = 11) -> Tensor:
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(1))


# The oracle: one sequence, one token, one head, one expert at a time, from the tensors of the file alone.


def oracle(tensors: dict[str, Tensor], config: dict, sequence: list[int]) -> Tensor:
    """Logits (L, vocabulary)."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    states = [w["model.embed_tokens.weight"][token] for token in sequence]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        normed = [norm(x, w[f"{name}.input_layernorm.weight"], config) for x in states]
        attended = attention(w, f"{name}.self_attn", config, normed)
        states = [x + y for x, y in zip(states, attended, strict=True)]
        normed = [norm(x, w[f"{name}.post_attention_layernorm.weight"], config) for x in states]
        moe = routes(config, layer)
        fed = [mixture(w, f"{name}.mlp", config, x) if moe else mlp(w, f"{name}.mlp", x) for x in normed]
        states = [x + y for x, y in zip(states, fed, strict=True)]
    head = w["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return torch.stack([head @ norm(x, w["model.norm.weight"], config) for x in states])


def norm(x: Tensor, weight: Tensor, config: dict) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean() + config["rms_norm_eps"])


def mlp(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    gate, up = w[f"{name}.gate_proj.weight"] @ x, w[f"{name}.up_proj.weight"] @ x
    return w[f"{name}.down_proj.weight"] @ (silu(gate) * up)


def mixture(w: dict[str, Tensor], name: str, config: dict, x: Tensor) -> Tensor:
    scores = torch.softmax(w[f"{name}.gate.weight"] @ x, dim=0)
    k = config["num_experts_per_tok"]
    chosen = sorted(range(len(scores)), key=lambda expert: -scores[expert])[:k]
    total = sum(scores[expert] for expert in chosen) if config["norm_topk_prob"] and k > 1 else 1.0
    out = mlp(w, f"{name}.shared_experts", x) if config["n_shared_experts"] else torch.zeros_like(x)
    for expert in chosen:
        out = out + scores[expert] / total * mlp(w, f"{name}.experts.{expert}", x)
    return out


def attention(w: dict[str, Tensor], name: str, config: dict, states: list[Tensor]) -> list[Tensor]:
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads

    def project(part: str, x: Tensor) -> Tensor:
        bias = w.get(f"{name}.{part}_proj.bias")
        return w[f"{name}.{part}_proj.weight"] @ x + (0.0 if bias is None else bias)

    q = [project("q", x).view(heads, size) for x in states]
    k = [project("k", x).view(groups, size) for x in states]
    v = [project("v", x).view(groups, size) for x in states]
    out = []
    for here in range(len(states)):
        seen = []
        for head in range(heads):
            group = head * groups // heads
            query = rotated(q[here][head], here, config)
            fits = [query @ rotated(k[there][group], there, config) / math.sqrt(size) for there in range(here + 1)]
            shares = torch.softmax(torch.stack(fits), dim=0)
            seen.append(sum(share * v[there][group] for there, share in enumerate(shares)))
        out.append(project("o", torch.cat(seen)))
    return out


def rotated(x: Tensor, position: int, config: dict) -> Tensor:
    """Entry i turns with entry i + half, by position / theta^(i / half)."""
    half = len(x) // 2
    slower = config["rope_scaling"]["factor"] if config["rope_scaling"] else 1.0
    out = x.clone()
    for i in range(half):
        angle = position / slower * config["rope_theta"] ** (-i / half)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


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
    assert torch.equal(again(x).logits, model(x).logits)


def test_a_checkpoint_in_bfloat16_is_loaded_and_saved_as_it_is(tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in published_tensors(PUBLISHED).items()}
    model = AutoModelForCausalLM.from_pretrained(write(tmp_path / "published", tensors, PUBLISHED))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.layers[1].mlp.experts.down_proj[11], tensors[name_of(1, 11, "down")])
    wide = load(tmp_path / "published")
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    x = tokens()
    exact = wide(x).logits
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


# The tokenizer: byte-level, under the name LlamaTokenizerFast, with add_bos_token but no template, as published.

BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"  # noqa: RUF001


def write_tokenizer(folder: Path) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<unk>", BEGIN, END], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the sum of the parts"] * 3, trainer)
    backend.save(str(folder / "tokenizer.json"))
    plain = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    said = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": plain | {"content": BEGIN},
        "clean_up_tokenization_spaces": False,
        "eos_token": plain | {"content": END},
        "legacy": True,
        "model_max_length": 16384,
        "pad_token": plain | {"content": END},
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizerFast",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return backend


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


# Registration without an import: each in a Python of its own, with nobody at the keyboard and warnings as errors.

INSTALL = "import sys, usmoe; from usmoe._autoregister import install; install()"  # what `import usmoe` does


def run(*lines: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(lines), str(folder)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


def said_by(*lines: str, folder: Path | None = None) -> list[str]:
    done = run(*lines, folder=folder)
    assert not done.returncode, done.stderr
    return done.stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AutoTokenizer", "AutoModelForCausalLM"])
def test_after_import_usmoe_the_auto_classes_know_the_family(folder, name):
    write_tokenizer(folder)
    said = said_by(
        INSTALL,
        "print('transformers' in sys.modules)",
        f"from transformers import {name}",
        "print('usmoe.hf.deepseek' in sys.modules)",
        f"print(type({name}.from_pretrained(sys.argv[1])).__module__)",
        folder=folder,
    )
    assert said == ["False", "False", "usmoe.hf.deepseek"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "before",
    [
        "from transformers import AutoConfig; install()",
        "install(); import importlib; importlib.reload(usmoe); install(); from transformers import AutoConfig",
        "install(); from transformers import LlamaForCausalLM, AutoConfig",
        "install(); import usmoe.hf.deepseek; from transformers import AutoConfig; install()",
    ],
)
def test_whatever_of_transformers_comes_first(folder, before):
    said = said_by(
        INSTALL.replace("; install()", ""),
        before,
        "print(AutoConfig.for_model('deepseek', vocab_size=7).vocab_size)",
        "print(type(AutoConfig.from_pretrained(sys.argv[1])).__module__)",
        "print(sum('usmoe' in type(finder).__module__ for finder in sys.meta_path))",
        "print(type(sys.modules['transformers.models.auto.configuration_auto'].__loader__).__name__)",
        folder=folder,
    )
    assert said == ["7", "usmoe.hf.deepseek", "0", "SourceFileLoader"]  # nothing of ours is left in the import system


@pytest.mark.slow
def test_threads_that_import_transformers_at_once(folder):
    said = said_by(
        INSTALL,
        "import threading, transformers",
        "names = ['AutoTokenizer', 'LlamaForCausalLM', 'Trainer', 'AutoModelForCausalLM', 'PreTrainedModel']",
        "threads = [threading.Thread(target=getattr, args=(transformers, name)) for name in names]",
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]",
        "print(*[hasattr(transformers, name) for name in names])",
        "print(type(transformers.AutoConfig.from_pretrained(sys.argv[1])).__module__)",
        folder=folder,
    )
    assert said == ["True"] * 5 + ["usmoe.hf.deepseek"]


def test_the_module_is_found_as_it_would_be_found_without_us(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [object(), *sys.meta_path])  # a finder without find_spec is passed over
    name = "transformers.models.auto.configuration_auto"
    found = _Finder().find_spec(name, transformers.models.auto.__path__)
    assert found.origin == sys.modules[name].__file__
    assert "class AutoConfig" in found.loader.get_source(name)
    assert _Finder().find_spec("transformers.models.auto.modeling_auto", transformers.models.auto.__path__) is None


@pytest.mark.slow
def test_without_transformers_its_absence_is_what_is_reported():
    block = "sys.meta_path = [f for f in sys.meta_path if 'PathFinder' not in str(f)]"
    done = run("import sys, torch, numpy, jaxtyping, usmoe._autoregister", block, INSTALL, "import transformers")
    assert done.stderr.strip().endswith("ModuleNotFoundError: No module named 'transformers'")


@pytest.mark.slow
def test_a_registration_that_fails_is_a_warning_and_transformers_is_there():
    done = run(
        INSTALL,
        "from usmoe import _autoregister",
        "_autoregister.DeepseekConfig = None",
        "from transformers import AutoConfig",
        "print(AutoConfig.__name__)",
    )
    assert done.stdout.split() == ["AutoConfig"]
    assert done.stderr.startswith("usmoe could not register its models with transformers: TypeError(")


@pytest.mark.slow
def test_a_family_that_transformers_has_by_itself_is_left_alone():
    said = said_by(
        "from transformers import AutoConfig, OlmoeConfig",
        "class Theirs(OlmoeConfig): model_type = 'deepseek'",
        "AutoConfig.register('deepseek', Theirs)",
        INSTALL,
        "print(type(AutoConfig.for_model('deepseek')).__name__)",
    )
    assert said == ["Theirs"]
