"""`supported`: what usmoe can do with each MoE layer of a model, and why not where it cannot."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from usmoe.hf.layers import moe_layers
from usmoe.hf.packed import precision_of
from usmoe.hf.wrapped import unwrapped


@dataclass(frozen=True, kw_only=True)
class LayerSupport:
    """One MoE layer."""

    layer: str
    family: str
    """model_type of the configuration."""
    experts: int
    own_choice: str | None
    """The rule that the model follows by itself, in words; None where it was not recognised."""
    weights: str | None
    """What the experts are kept in: bfloat16, nf4, ...; None where they were not found."""
    supported: bool
    reason: str | None
    """Why it cannot be patched; None where it can."""


def _weights(model: PreTrainedModel, experts: nn.Module) -> str:
    """What the experts are kept in; said in full where the rest of the model is kept in fewer bits."""
    kept = precision_of(experts)
    whole = getattr(model, "is_quantized", False) and kept in ("float32", "bfloat16", "float16")
    return f"{kept} (the model's quantisation leaves experts as they are)" if whole else kept


def supported(model: PreTrainedModel) -> list[LayerSupport]:
    """A row a MoE layer, in order; an empty list for a model that is not a mixture of experts."""
    model = unwrapped(model)
    rows = []
    for layer in moe_layers(model):
        rows.append(
            LayerSupport(
                layer=layer.name,
                family=str(model.config.model_type),
                experts=layer.num_experts,
                own_choice=None if layer.rule is None else str(layer.host),
                weights=None if layer.experts is None else _weights(model, layer.experts),
                supported=layer.reason is None,
                reason=layer.reason,
            )
        )
    return rows
