"""Layers: nn.Modules that route tokens to experts."""

from usmoe.layers.causal import to_causal
from usmoe.layers.moe import MoE
from usmoe.layers.soft import SoftMoE

__all__ = ["MoE", "SoftMoE", "to_causal"]
