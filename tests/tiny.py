"""Tiny random models of several families, built from their configurations."""

from __future__ import annotations

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

_SHAPE = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=64,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=1,
)

FAMILIES = {
    "olmoe": dict(num_experts=8, num_experts_per_tok=4),
    "olmoe normalised": dict(num_experts=8, num_experts_per_tok=4, norm_topk_prob=True),
    "mixtral": dict(num_local_experts=8, num_experts_per_tok=2),
    "qwen2_moe": dict(
        num_experts=8, num_experts_per_tok=4, moe_intermediate_size=16, shared_expert_intermediate_size=32
    ),
    "qwen3_moe": dict(num_experts=8, num_experts_per_tok=4, moe_intermediate_size=16, head_dim=8),
    "gpt_oss": dict(num_local_experts=8, num_experts_per_tok=2, head_dim=8),
}
_CLASSES = {
    "olmoe": "Olmoe",
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
    "gpt_oss": "GptOss",
}


def tiny(family: str = "olmoe", seed: int = 0, **changes) -> PreTrainedModel:
    """A tiny model of a family, in evaluation mode, with logits that have spread."""
    name = _CLASSES[family.split()[0]]
    config = getattr(transformers, f"{name}Config")(**(_SHAPE | FAMILIES[family] | changes))
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for module in model.modules():  # biases start at 0: give them something to say
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter_name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def tokens(batch: int = 2, length: int = 12, seed: int = 1) -> torch.Tensor:
    """(batch, length) of random token ids, none of them padding."""
    return torch.randint(2, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def tokenizer(**settings) -> PreTrainedTokenizerFast:
    """A token a character, for the tiny models: ids 2 to 95; what is no printable ASCII is "?"."""
    characters = [chr(code) for code in range(32, 126)]
    vocabulary = {"<pad>": 0, "<eos>": 1} | {character: 2 + index for index, character in enumerate(characters)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    given = dict(pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False) | settings
    return PreTrainedTokenizerFast(tokenizer_object=made, **given)
