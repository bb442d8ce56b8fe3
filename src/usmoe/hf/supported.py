"""`supported`: what usmoe can do with each MoE layer of a model, and why not where it cannot."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from usmoe.hf.layers import moe_layers


@dataclass(frozen=True, kw_only=True)
class LayerSupport:
    """One MoE layer."""

    layer: str
    family: str
    """model_type of the configuration."""
    experts: int
    own_choice: str | None
    """The rule that the model follows by itself, in words; None where it was not recognised."""
    supported: bool
    reason: str | None
    """Why it cannot be patched; None where it can."""


def supported(model: PreTrainedModel) -> list[LayerSupport]:
    """A row a MoE layer, in order; an empty list for a model that is not a mixture of experts."""
    rows = []
    for layer in moe_layers(model):
        rows.append(
            LayerSupport(
                layer=layer.name,
                family=str(model.config.model_type),
                experts=layer.num_experts,
                own_choice=None if layer.rule is None else str(layer.host),
                supported=layer.reason is None,
                reason=layer.reason,
            )
        )
    return rows
