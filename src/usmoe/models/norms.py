"""Norms, in the precision of their weights whatever autocast makes of their inputs."""

from __future__ import annotations

from torch import Tensor, nn

from usmoe.models.config import LanguageConfig


class RMSNorm(nn.RMSNorm):
    """x over its root mean square, times a weight (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def norm_of(config: LanguageConfig) -> nn.Module:
    """The norm that a configuration asks for."""
    return nn.LayerNorm(config.d_model) if config.norm == "layer" else RMSNorm(config.d_model, eps=1e-5)
