"""A trained decoder as a transformers model: the same numbers in OLMoE's names, for everything that reads those."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from usmoe.hf.patch import patch
from usmoe.models.config import LanguageConfig
from usmoe.models.language import LanguageModel
from usmoe.report.whole import whole_folder
from usmoe.routing import OwnChoice, TokenChoice
from usmoe.routing.host import ROUTE
from usmoe.routing.unified_score import UnifiedScore

_NEEDED: dict[str, Any] = {
    "position": "rotary",
    "norm": "rms",
    "norm_place": "pre",
    "activation": "swiglu",
    "qk_norm": True,
    "gate": "linear",
    "shared_experts": 0,
    "cutoffs": (),
    "moving": False,
}


def as_olmoe(model: LanguageModel, *, context: int, k: int = 2) -> Any:
    """An OlmoeForCausalLM with the model's weights (copied), patched with its routers; plain where these are the token
    choice that OLMoE has by itself.

    context  max_position_embeddings, tokens
    k        num_experts_per_tok, where the router has no whole k of its own

    Raises ValueError for a model that OLMoE cannot be, naming the fields.
    """
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = model.config
    assert config.vocabulary is not None
    refuse_what_is_no_olmoe(config)
    routers = [layer.router for layer in model.moe_layers]
    given = getattr(routers[0], "k", None)
    k = int(given) if isinstance(given, int | float) and given >= 1 and given == int(given) else k
    theirs = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_experts=config.num_experts,
            num_experts_per_tok=k,
            max_position_embeddings=context,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            rms_norm_eps=1e-5,
            tie_word_embeddings=config.tied,
            norm_topk_prob=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )
    missing, unexpected = theirs.load_state_dict(_renamed(model), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # tied
    theirs.tie_weights()
    theirs.train(model.training)
    routers = [_spelt_out(router) for router in routers]
    own = TokenChoice(k=k)
    if any(router != own for router in routers):
        patch(theirs, [OwnChoice() if router == own else router for router in routers])
    return theirs


def export(
    model: LanguageModel, tokenizer: Any, folder: Path, *, context: int, dtype: torch.dtype = torch.float32
) -> None:
    """Write the model as transformers reads it (`usmoe.from_pretrained(folder)` brings its routers back), and its
    tokenizer where there is one; the folder is there whole or not at all.

    dtype  of the file: bfloat16 is half as large, and rounds

    Raises ValueError for a model that OLMoE cannot be, and for a folder that is not empty.
    """
    theirs = as_olmoe(model, context=context).to(dtype)
    with whole_folder(folder) as part:
        theirs.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)


def _spelt_out(router: Any) -> Any:
    """A router whose alpha says what it is in a layer of ours; under a patch, None would be the model's own 0."""
    unsaid = isinstance(router, UnifiedScore) and router.alpha is None
    return dataclasses.replace(router, alpha=ROUTE.alpha) if unsaid else router


def refuse_what_is_no_olmoe(config: LanguageConfig) -> None:
    """Raise ValueError for a model that OLMoE cannot be, naming the fields."""
    other = {name: getattr(config, name) for name, value in _NEEDED.items() if getattr(config, name) != value}
    if config.size_of_head * config.heads != config.d_model:
        other["head_size"] = config.head_size
    if not config.num_experts:
        other["num_experts"] = 0
    if other:
        told = ", ".join(f"{name}={value!r}" for name, value in other.items())
        raise ValueError(f"OLMoE has no {told}. A model like decoder-base or decoder-small can be exported.")


def _renamed(model: LanguageModel) -> dict[str, torch.Tensor]:
    ours = model.state_dict()
    found = {"model.embed_tokens.weight": ours["words.vectors"], "model.norm.weight": ours["norm.weight"]}
    if "words.output" in ours:
        found["lm_head.weight"] = ours["words.output"]
    for number in range(model.config.layers):
        here, there = f"layers.{number}.", f"model.layers.{number}."
        for one, other in _NAMES.items():
            found[there + other] = ours[here + one]
    return found


_NAMES = {
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "attention.query_norm.weight": "self_attn.q_norm.weight",
    "attention.key_norm.weight": "self_attn.k_norm.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.gate.weight": "mlp.gate.weight",
    "feed_forward.up": "mlp.experts.gate_up_proj",
    "feed_forward.down": "mlp.experts.down_proj",
}
"""Ours and OLMoE's, of one layer."""
