"""A tiny checkpoint of DeepSeekMoE-16B under the published names, and the arithmetic of the model, written out by hand.

    layer 0          attention, dense feed-forward
    layers 1, 2      attention, 12 routed experts of which 3 a token, 2 shared experts

Twelve experts and not eight, so that a sort by text (experts.10 before experts.2) would be seen.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM

from usmoe.hf.deepseek import DeepseekForCausalLM

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
