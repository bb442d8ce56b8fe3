"""Tiny random models of every family with routed experts, built from their configurations alone.

    FAMILIES     name -> Family, of those whose experts carry `use_experts_implementation`
    OUTSIDERS    name -> Family, of those whose experts do not
    CANNOT_RUN   name -> why it cannot be built or run here
    build        the model of a family, in evaluation mode
    inputs       what it takes: model(**inputs(family))

A name is that of models/<name> in transformers; what follows a space names a variant of its router.
"""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

SIZES: dict[str, Any] = {
    field: value
    for value, fields in (
        (96, "vocab_size"),
        (0, "pad_token_id"),
        (1, "bos_token_id eos_token_id"),
        (64, "max_position_embeddings"),
        (32, "hidden_size d_model"),
        (3, "num_hidden_layers"),
        # experts
        (8, "num_experts num_local_experts n_routed_experts moe_num_experts"),
        (3, "num_experts_per_tok moe_topk moe_k top_k_experts"),
        (16, "intermediate_size moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size"),
        (16, "shared_experts_intermediate_size moe_shared_expert_intermediate_size"),
        (1, "n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace num_dense_layers"),
        # routing
        (True, "norm_topk_prob"),
        (1.7, "routed_scaling_factor router_scaling_factor moe_routed_scaling_factor moe_router_scaling_factor"),
        (1.7, "route_scale"),
        (1, "n_group topk_group"),
        # attention: plain, latent, indexed; linear attention, Mamba, hyper-connections
        (4, "num_attention_heads num_key_value_heads num_heads index_n_heads linear_num_heads linear_num_value_heads"),
        (2, "linear_num_key_heads hc_mult"),
        (8, "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim"),
        (8, "linear_head_dim linear_key_head_dim linear_value_head_dim"),
        (8, "sliding_window sliding_window_size index_topk"),
        (16, "q_lora_rank kv_lora_rank index_head_dim"),
        (8, "mamba_n_heads mamba_d_head mamba_d_state mamba_chunk_size"),
        # no layers that predict further tokens
        (0, "num_mtp_layers num_nextn_predict_layers"),
        # towers of images and of sound, which text leaves alone
        (1, "depth encoder_layers"),
        (4, "encoder_attention_heads"),
        (16, "encoder_ffn_dim output_channels projection_intermediate_size projector_hidden_size"),
        (16, "num_position_embeddings downsample_hidden_size"),
        (32, "image_size out_hidden_size output_dim"),
        ((0,), "deepstack_visual_indexes"),
    )
    for field in fields.split()
}
"""What a field of a configuration becomes, unless the family says otherwise, wherever a family has it."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family, or a variant of one, at a tiny size."""

    name: str
    """Folder under transformers/models, and after a space the variant of its router."""
    model: str
    """Class of the model."""
    config: str
    """Class of its configuration."""
    settings: dict[str, Any]
    """Keyword arguments of the configuration beyond SIZES."""

    @property
    def folder(self) -> str:
        return self.name.split()[0]

    def __str__(self) -> str:
        return self.name


def build(family: Family, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The model of a family in evaluation mode and float32, drawn by `draw`; changes go to its configuration."""
    modeling = importlib.import_module(f"transformers.models.{family.folder}.modeling_{family.folder}")
    torch.manual_seed(seed)
    model = getattr(modeling, family.model)(configuration(family, **changes)).float().eval()
    draw(model, seed)
    return model


def configuration(family: Family, **changes: Any) -> PreTrainedConfig:
    """The configuration of a family: SIZES, its settings and the changes, each level taking the fields that it has.

    Raises ValueError for a change that no level has.
    """
    module = importlib.import_module(f"transformers.models.{family.folder}.configuration_{family.folder}")
    made = getattr(module, family.config)
    unknown = set(changes)
    settings = _shrunk(made, family.settings, changes, unknown)
    if unknown:
        raise ValueError(f"{family.config} and its parts have no field {', '.join(sorted(unknown))}.")
    return made(**settings)


def _shrunk(
    made: type[PreTrainedConfig], settings: dict[str, Any], changes: dict[str, Any], unknown: set[str]
) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(made)}
    own = {key: value for key, value in SIZES.items() if key in fields} | settings
    for name, part in made.sub_configs.items():
        if dataclasses.is_dataclass(part):  # what is left to AutoConfig is shrunk by the settings
            own[name] = _shrunk(part, settings.get(name, {}), changes, unknown)
    known = changes.keys() & (fields | made.attribute_map.keys())
    unknown -= known
    return own | {key: changes[key] for key in known}


@torch.no_grad()
def draw(model: PreTrainedModel, seed: int) -> None:
    """Draws what training would have moved, so that a rule which forgets a part of the router is noticed.

    Weights of two and three axes ~ N(0, 0.2), wider in the routers that would shrink their logits; the rest (norms,
    biases, scales of experts) and saved buffers (correction biases) by N(0, 0.1) around where they start; a table of
    hash routing gives each token id experts that differ.
    """
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim in (2, 3) and "bias" not in name:
            shrinks = ".router.proj." in name or ".router_mlp." in name  # of Gemma and of Zaya
            parameter.normal_(std=0.5 if shrinks else 0.2, generator=random)
        else:
            parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.1)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name == "tid2eid":
                buffer.copy_(torch.rand(len(buffer), module.num_experts, generator=random).argsort()[:, : module.top_k])
            elif name == "balancing_biases":  # zaya starts the expert that does nothing at -1, where none chooses it
                buffer.normal_(std=0.1, generator=random)
            elif name not in module._non_persistent_buffers_set and buffer.is_floating_point():
                buffer.add_(torch.randn(buffer.shape, generator=random), alpha=0.1)


def inputs(family: Family, batch: int = 2, length: int = 12, seed: int = 1, padding: bool = True) -> dict[str, Any]:
    """What the model takes; with padding, row 0 lacks 3 tokens at its left and row 1 lacks 2 at its right.

    Token ids and their mask, and what a decoder starts from; images of 4 x 4 patches for the models of images.
    """
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, SIZES["vocab_size"], (batch, length), generator=random)
    mask = torch.ones_like(ids)
    if padding:
        mask[0, :3] = 0
        mask[1:2, -2:] = 0
    text = dict(input_ids=ids.masked_fill(mask == 0, SIZES["pad_token_id"]), attention_mask=mask)
    match family.name:
        case "nllb_moe" | "switch_transformers" | "diffusion_gemma":
            return text | dict(decoder_input_ids=torch.randint(2, SIZES["vocab_size"], (batch, 8), generator=random))
        case "ernie4_5_vl_moe images":
            return text | dict(moe_mm_token_type_ids=(torch.arange(length) % 3 == 1).expand(batch, -1).int())
        case "qwen3_omni_moe talker":
            embeds = torch.randn(batch, length, SIZES["hidden_size"], generator=random)
            return dict(inputs_embeds=embeds, attention_mask=mask)
        case "dots3_note vision":
            pixels = torch.randn(batch * 16, 3 * 4 * 4, generator=random)
            return dict(pixel_values=pixels, grid_thw=torch.tensor([[1, 4, 4]] * batch))
        case "vitpose_backbone":
            pixels = torch.randn(batch, 3, 32, 32, generator=random)
            return dict(pixel_values=pixels, dataset_index=torch.arange(batch) % SIZES["num_experts"])
    return text


def _family(name: str, stem: str, *, model: str = "ForCausalLM", config: str = "Config", **settings: Any) -> Family:
    """A family whose classes are <stem><model> and <stem><config>."""
    return Family(name=name, model=stem + model, config=stem + config, settings=settings)


def _text(name: str, stem: str, **settings: Any) -> Family:
    """A family of images and text whose text has a model of its own."""
    return _family(name, stem, config="TextConfig", **settings)


def _whole(name: str, stem: str, *, parts: dict[str, Any] | None = None, **settings: Any) -> Family:
    """A family of images and text that is run whole, on text; the settings are those of its text."""
    return _family(name, stem, model="ForConditionalGeneration", text_config=settings, **(parts or {}))


def _variant(family: Family, variant: str, settings: dict[str, Any]) -> Family:
    """The family under other settings of its text."""
    if "text_config" in family.settings:
        settings = dict(text_config=family.settings["text_config"] | settings)
    return dataclasses.replace(family, name=f"{family.name} {variant}", settings=family.settings | settings)


DENSE_FIRST = ["dense", "sparse", "sparse"]
LINEAR = ["linear_attention", "full_attention", "linear_attention"]
CONV = ["conv", "full_attention", "conv"]
INDEXED = ["linear_attention", "indexed_attention", "linear_attention"]
SPARSE = ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]
SLIDING = ["sliding_attention", "full_attention", "full_attention"]
NEMOTRON_BLOCKS = ["linear_attention", "moe", "full_attention", "mlp", "moe"]

ROPE = dict(rope_type="default", rope_theta=10_000.0)
THREE_AXES = ROPE | dict(partial_rotary_factor=1.0, mrope_section=[1, 1, 2])
HALF = ROPE | dict(partial_rotary_factor=0.5)
YARN = dict(rope_type="yarn", rope_theta=10_000.0, factor=4.0, original_max_position_embeddings=16)
YARN |= dict(partial_rotary_factor=0.5, llama_4_scaling_beta=0.1)

TOWER = dict(hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4, head_dim=8)
PIXTRAL = dict(vision_config=TOWER | dict(model_type="pixtral", image_size=32))
GEMMA = TOWER | dict(model_type="gemma4_vision", num_key_value_heads=4, position_embedding_size=16)
SAM = dict(vision_config=dict(sam_config=dict(mlp_dim=16, downsample_channels=[16, 16])))
MEL = dict(
    audio_config=dict(num_hidden_layers=1, patch_sizes=(16,), hidden_sizes=(16,), depths=(1,), out_hidden_size=32)
)

DOTS = dict(swa_num_attention_heads=4, swa_num_key_value_heads=4, swa_q_lora_rank=16, swa_kv_lora_rank=16)
DOTS |= dict(head_dim=16, swa_head_dim=16, swa_qk_nope_head_dim=8, swa_v_head_dim=8)
INKLING = dict(swa_num_attention_heads=4, swa_num_key_value_heads=4, swa_head_dim=8, d_rel=4, rel_extent=16)
INKLING |= dict(layer_types=["hybrid_sliding", "hybrid", "hybrid_sliding"])
GRANITE = dict(embedding_multiplier=2.0, residual_multiplier=0.5, attention_multiplier=0.3, logits_scaling=2.0)
NEMOTRON = dict(mamba_num_heads=4, mamba_head_dim=16, n_groups=2, chunk_size=8, ssm_state_size=8)
V4 = dict(head_dim=16, partial_rotary_factor=0.5, o_groups=4, o_lora_rank=8, index_topk=2)
V4 |= dict(compress_rates=dict(compressed_sparse_attention=2, heavily_compressed_attention=4))
V4 |= dict(layer_types=["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"])
GEMMA4 = dict(global_head_dim=8, hidden_size_per_layer_input=8, vocab_size_per_layer_input=96, layer_types=SLIDING)
M3 = dict(dense_intermediate_size=16, rotary_dim=4, index_head_dim=8, index_block_size=4, index_topk_blocks=2)
QWEN4 = dict(indexer_n_heads=4, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=8, indexer_compress_ratio=2)
NLLB = dict(decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=16, encoder_layers=2)
SWITCH = dict(d_kv=8, d_ff=16, num_layers=2, num_decoder_layers=2, expert_capacity=3)

DECORATED = [
    _family("afmoe", "Afmoe", global_attn_every_n_layers=2),
    _family("aria", "AriaText"),
    _family("axk1", "AXK1"),
    _family("axk2", "AXK2", n_group=None, topk_group=None),
    _family("bailing_hybrid", "BailingHybrid", layer_types=LINEAR),
    _family("beam", "Beam", mlp_layer_types=DENSE_FIRST),
    _family("cohere2_moe", "Cohere2Moe"),
    _whole("deepseek_ocr2", "DeepseekOcr2", mlp_layer_types=DENSE_FIRST, parts=SAM),
    _family("deepseek_v2", "DeepseekV2"),
    _family("deepseek_v3", "DeepseekV3"),
    _family("deepseek_v32", "DeepseekV32"),
    _family("deepseek_v4", "DeepseekV4", mlp_layer_types=["moe"] * 3, **V4),
    _family(
        "diffusion_gemma",
        "DiffusionGemma",
        model="ForBlockDiffusion",
        canvas_length=8,
        text_config=dict(global_head_dim=8, layer_types=SLIDING),
        vision_config=GEMMA,
    ),
    _family("dots1", "Dots1"),
    _text("dots3_note", "Dots3Note", **DOTS),
    _family("ernie4_5_moe", "Ernie4_5_Moe"),
    _whole("ernie4_5_vl_moe", "Ernie4_5_VLMoe", moe_intermediate_size=[16, 8], rope_parameters=THREE_AXES),
    _family("exaone_moe", "ExaoneMoe"),
    _family("flex_olmo", "FlexOlmo"),
    _family("flint", "Flint", mlp_only_layers=[0]),
    _text("gemma4", "Gemma4", enable_moe_block=True, **GEMMA4),
    _family("glm4_moe", "Glm4Moe"),
    _family("glm4_moe_lite", "Glm4MoeLite", mlp_layer_types=DENSE_FIRST),
    _whole("glm4v_moe", "Glm4vMoe", rope_parameters=THREE_AXES),
    _whole("glm5_next", "Glm5Next", layer_types=LINEAR, mlp_layer_types=DENSE_FIRST, qk_rope_head_dim=0, index_kpool=2),
    _family("glm_moe_dsa", "GlmMoeDsa", mlp_layer_types=DENSE_FIRST),
    _family("gpt_oss", "GptOss", rope_parameters=ROPE),
    _family("granitemoe", "GraniteMoe", **GRANITE),
    _family("granitemoe_swa", "GraniteMoeSWA", **GRANITE),
    _family("granitemoehybrid", "GraniteMoeHybrid", layer_types=LINEAR, **GRANITE),
    _family("granitemoeshared", "GraniteMoeShared", **GRANITE),
    _family("hunyuan_v1_moe", "HunYuanMoEV1"),
    _family("hy_v3", "HYV3"),
    _family("hy_v4", "HYV4"),
    _text("inkling", "Inkling", n_shared_experts=2, mlp_layer_types=DENSE_FIRST, **INKLING),
    _text("inkling2", "Inkling2", **INKLING),
    _family("jamba", "Jamba", num_hidden_layers=4, attn_layer_period=3, attn_layer_offset=1),
    _family("kimi_linear", "KimiLinear", layer_types=LINEAR),
    _family("kolibri1", "Kolibri1"),
    _family("laguna", "Laguna"),
    _family("lfm2_moe", "Lfm2Moe", layer_types=CONV),
    _family("mellum", "Mellum"),
    _family("mimo_v2_flash", "MiMoV2Flash", head_dim=12, num_key_value_heads=2),
    _family("minimax", "MiniMax", block_size=8),
    _family("minimax_m2", "MiniMaxM2"),
    _text("minimax_m3_vl", "MiniMaxM3VL", mlp_layer_types=DENSE_FIRST, layer_types=SPARSE, **M3),
    _family("mistral4", "Mistral4", rope_parameters=YARN),
    _whole("mistral_large4", "MistralLarge4", rope_parameters=HALF, parts=PIXTRAL),
    _family("mixtral", "Mixtral"),
    _whole("muse_spark", "MuseSpark", moe_hidden_size=24, output_multiplier=0.6, parts=MEL),
    _family("nemotron_h", "NemotronH", layers_block_type=NEMOTRON_BLOCKS, **NEMOTRON),
    _family("olmoe", "Olmoe"),
    _family("openai_privacy_filter", "OpenAIPrivacyFilter", model="ForTokenClassification", rope_parameters=ROPE),
    _family("phimoe", "Phimoe", num_experts_per_tok=2, router_jitter_noise=0.3),
    _family("qwen2_moe", "Qwen2Moe", mlp_only_layers=[0]),
    _text("qwen3_5_moe", "Qwen3_5Moe", layer_types=LINEAR),
    _family("qwen3_moe", "Qwen3Moe"),
    _family("qwen3_next", "Qwen3Next", layer_types=LINEAR),
    _whole("qwen3_omni_moe", "Qwen3OmniMoeThinker", parts=dict(vision_start_token_id=90)),
    _whole("qwen3_vl_moe", "Qwen3VLMoe"),
    _text("qwen4_exp", "Qwen4Exp", layer_types=INDEXED, hc_count=2, hc_lowrank=4, **QWEN4),
    _family("solar_open", "SolarOpen"),
    _whole("unlimited_ocr", "UnlimitedOcr", mlp_layer_types=DENSE_FIRST, parts=SAM),
    _family(
        "zaya", "Zaya", num_experts_per_tok=1, layer_types=["hybrid", "hybrid_sliding", "hybrid"], router_hidden_size=16
    ),
    # A second model of the same folder, with a block or a router of its own
    _family(
        "dots3_note vision",
        "Dots3NoteVision",
        model="Model",
        patch_size=4,
        adapter_in_dim=32,
        adapter_out_dim=32,
        pyramid_num_routed=[-1, 4, 8],
    ),
    _whole(
        "qwen3_omni_moe talker",
        "Qwen3OmniMoeTalker",
        shared_expert_intermediate_size=16,
        parts=dict(thinker_hidden_size=32, spatial_merge_size=2),
    ),
]
GROUPS = dict(n_group=4, topk_group=2)
UNNORMALISED = dict(norm_topk_prob=False)
VARIANTS: list[tuple[str, dict[str, Any], str]] = [
    ("grouped", GROUPS, "axk1 axk2 bailing_hybrid beam deepseek_v3 deepseek_v32 dots1 dots3_note exaone_moe glm4_moe"),
    ("grouped", GROUPS, "glm4_moe_lite glm4v_moe glm5_next glm_moe_dsa hy_v4 kimi_linear mimo_v2_flash mistral4"),
    ("grouped", GROUPS, "mistral_large4 nemotron_h solar_open"),
    ("grouped", GROUPS | dict(topk_method="group_limited_greedy"), "deepseek_ocr2 deepseek_v2 unlimited_ocr"),
    ("unnormalised", UNNORMALISED, "deepseek_v3 flex_olmo flint kolibri1 lfm2_moe mellum mistral4 olmoe qwen2_moe"),
    ("unnormalised", UNNORMALISED, "qwen3_moe qwen3_next qwen4_exp"),
    ("sigmoid", dict(expert_selection_fn="sigmoid"), "cohere2_moe"),
    ("sigmoid unnormalised", dict(expert_selection_fn="sigmoid") | UNNORMALISED, "cohere2_moe"),
    ("sum", dict(shared_expert_combination_strategy="sum"), "cohere2_moe"),
    ("sigmoid", dict(scoring_func="sigmoid"), "deepseek_v4"),
    ("sqrtsoftplus", dict(scoring_func="sqrtsoftplus"), "inkling2"),
    ("hash", dict(mlp_layer_types=["hash_moe", "moe", "hash_moe"]), "deepseek_v4"),
    ("images", {}, "ernie4_5_vl_moe"),  # the same model: inputs() marks some tokens as those of an image
    ("by layer", dict(moe_topk=[3, 2, 1]), "hunyuan_v1_moe"),
    ("softcapped", dict(moe_router_logit_softcapping=1.5), "laguna"),
    ("unbiased", dict(use_expert_bias=False), "lfm2_moe"),
    ("latent", dict(moe_latent_size=24), "nemotron_h"),
]
FAMILIES: dict[str, Family] = {family.name: family for family in DECORATED}
FAMILIES |= {
    f"{name} {variant}": _variant(FAMILIES[name], variant, settings)
    for variant, settings, names in VARIANTS
    for name in names.split()
}
OUTSIDERS: dict[str, Family] = {
    family.name: family
    for family in (
        _family(
            "dbrx",
            "Dbrx",
            d_model=32,
            n_heads=4,
            n_layers=2,
            max_seq_len=64,
            attn_config=dict(rope_theta=10_000.0, kv_n_heads=2, clip_qkv=8.0),
            ffn_config=dict(ffn_hidden_size=16, moe_top_k=3),
        ),
        _family("doge", "Doge", is_moe=True, num_experts=16, norm_topk_prob=False),
        _family("jetmoe", "JetMoe", kv_channels=8, num_experts_per_tok=2, num_key_value_heads=2),
        _text("llama4", "Llama4", intermediate_size_mlp=16, moe_layers=[1, 2], num_experts_per_tok=2),
        _family(
            "longcat_flash",
            "LongcatFlash",
            num_layers=2,
            ffn_hidden_size=16,
            expert_ffn_hidden_size=16,
            zero_expert_num=4,
        ),
        _family(
            "nllb_moe",
            "NllbMoe",
            model="ForConditionalGeneration",
            encoder_sparse_step=2,
            decoder_sparse_step=2,
            **NLLB,
        ),
        _whole("step3p7", "Step3p7", mlp_layer_types=DENSE_FIRST, share_expert_dim=16),
        _family(
            "switch_transformers",
            "SwitchTransformers",
            model="ForConditionalGeneration",
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            **SWITCH,
        ),
        _family("vitpose_backbone", "VitPoseBackbone", model="", image_size=(32, 32), mlp_ratio=2, part_features=8),
    )
}
CANNOT_RUN: dict[str, str] = {}
"""Name -> why the family cannot be built or run on a CPU."""
