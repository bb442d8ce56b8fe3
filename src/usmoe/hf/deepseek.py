"""DeepSeekMoE-16B (`model_type: "deepseek"`), which transformers does not have, on the building blocks that it has.

Dai et al., DeepSeekMoE, 2024. A Llama whose feed-forward layers, after the first dense ones, are a softmax router over
many narrow experts, k of them a token, beside shared experts that every token takes. Importing this module registers
the family with transformers' Auto classes; a checkpoint under the published names loads as it is, and is saved as it
was. Nothing of the code that the checkpoint brings is run, nor asked for: a registered class goes before it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from huggingface_hub.dataclasses import strict
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_rope_utils import RopeParameters
from transformers.models.auto import tokenization_auto
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.olmoe.modeling_olmoe import OlmoeForCausalLM, OlmoeModel
from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeExperts,
    Qwen2MoeMLP,
    Qwen2MoePreTrainedModel,
    Qwen2MoeTopKRouter,
)
from transformers.tokenization_utils_tokenizers import TokenizersBackend
from transformers.utils.output_capturing import OutputRecorder


@strict
class DeepseekConfig(PreTrainedConfig):
    """The published config.json. A key that is absent means what it means to the published code: without
    n_routed_experts every layer is dense. Keys that nothing here reads (aux_loss_alpha, seq_aux, pretraining_tp) are
    kept as they came.

    Raises ValueError for a router that is not softmax, and for more experts a token than there are.
    """

    model_type = "deepseek"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {"num_experts": "n_routed_experts"}  # noqa: RUF012

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    """Width of a dense layer."""
    moe_intermediate_size: int = 1407
    """Width of one expert, routed or shared."""
    num_hidden_layers: int = 30
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    """How many experts' widths every token takes beside the routed ones."""
    num_experts_per_tok: int | None = None
    first_k_dense_replace: int = 0
    """Layers at the bottom that are dense."""
    moe_layer_freq: int = 1
    """Above them, layers whose index it divides are MoE, the others dense."""
    norm_topk_prob: bool = False
    """Whether the weights of a token's experts are made to sum to 1; never for one expert a token."""
    scoring_func: str = "softmax"
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    output_router_logits: bool = False
    """Whether transformers' balance loss is added in training. It is not the published one, which is a sum over layers
    and, with seq_aux, a mean over sequences."""
    router_aux_loss_coef: float = 0.001

    def __post_init__(self, **kwargs: Any) -> None:
        if self.scoring_func != "softmax":
            raise ValueError(f"scoring_func={self.scoring_func!r} is not known for DeepSeekMoE. Give 'softmax'.")
        if self.n_routed_experts is not None and not 0 < (self.num_experts_per_tok or 0) <= self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is impossible with "
                f"n_routed_experts={self.n_routed_experts}. Give 1 to {self.n_routed_experts}."
            )
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)

    def is_moe(self, layer: int) -> bool:
        """Whether the layer of this index routes."""
        above = layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0
        return self.n_routed_experts is not None and above


class DeepseekTopKRouter(Qwen2MoeTopKRouter):
    """(T, D) -> logits (T, E), weights (T, k), experts (T, k). The softmax is taken in float32."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        self.norm_topk_prob = config.norm_topk_prob and self.top_k > 1


class DeepseekMoE(nn.Module):
    """(B, L, D) -> (B, L, D): the routed experts of each token, weighted, and the shared ones."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.gate = DeepseekTopKRouter(config)
        self.experts = Qwen2MoeExperts(config)
        shared = config.moe_intermediate_size * (config.n_shared_experts or 0)
        self.shared_experts = Qwen2MoeMLP(config, intermediate_size=shared) if shared else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, D)
        _, weights, chosen = self.gate(flat)
        routed = self.experts(flat, chosen, weights).view_as(hidden_states)
        return routed if self.shared_experts is None else routed + self.shared_experts(hidden_states)


class DeepseekDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: DeepseekConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)  # Llama's own would build a dense layer first
        self.hidden_size = config.hidden_size
        self.self_attn = LlamaAttention(cast(Any, config), layer_idx)
        self.mlp = DeepseekMoE(config) if config.is_moe(layer_idx) else Qwen2MoeMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class DeepseekPreTrainedModel(Qwen2MoePreTrainedModel):
    config_class = DeepseekConfig
    _no_split_modules = ["DeepseekDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "router_logits": OutputRecorder(DeepseekTopKRouter, index=0),
        "hidden_states": DeepseekDecoderLayer,
        "attentions": LlamaAttention,
    }


class DeepseekModel(DeepseekPreTrainedModel, OlmoeModel):
    """Token ids (B, L) to hidden states (B, L, D). The forward is OLMoE's."""

    def __init__(self, config: DeepseekConfig) -> None:
        PreTrainedModel.__init__(self, config)  # OLMoE's own would build OLMoE's layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DeepseekDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(cast(Any, config))
        self.post_init()


class DeepseekForCausalLM(DeepseekPreTrainedModel, OlmoeForCausalLM):
    """Token ids (B, L) to logits (B, L, vocabulary). The forward is OLMoE's."""

    def __init__(self, config: DeepseekConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.n_routed_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()


class DeepseekTokenizer(TokenizersBackend):
    """The published byte-level tokenizer, which begins each text with <｜begin▁of▁sentence｜>.

    The checkpoint says so in tokenizer_config.json (add_bos_token), which transformers 5 no longer reads beside a
    tokenizer.json; there it expects a template, and the published file has none. A template that is there is left.
    """

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> DeepseekTokenizer:
        # not in an __init__: with one, transformers would rebuild the tokenizer from its vocabulary, and wrongly
        tokenizer: Any = super().from_pretrained(*args, **kwargs)
        if not isinstance(tokenizer.backend_tokenizer.post_processor, TemplateProcessing):
            tokenizer.add_bos_token = True
        return tokenizer


AutoConfig.register("deepseek", DeepseekConfig, exist_ok=True)
AutoModel.register(DeepseekConfig, DeepseekModel, exist_ok=True)
AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
# one matrix an expert in the file, one for all experts in memory, as in most families
register_checkpoint_conversion_mapping("deepseek", get_checkpoint_conversion_mapping("qwen2_moe") or [], overwrite=True)
# the checkpoint names LlamaTokenizerFast, which is not byte-level: transformers keeps a list of such model types
AutoTokenizer.register(DeepseekConfig, DeepseekTokenizer, exist_ok=True)
tokenization_auto.TOKENIZER_MAPPING_NAMES["deepseek"] = DeepseekTokenizer.__name__
tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add("deepseek")
