"""Tiny language models with experts, untrained but with spread, and a text for them: what the tests of their evaluation
share."""

import numpy as np
import torch

from usmoe.models.config import MODELS
from usmoe.models.language import LanguageModel

V = 30


def tiny(router=None, *, seed: int = 0, **changes) -> LanguageModel:
    """Two layers of four experts, untrained, with spread in gates and words."""
    shape = {"vocabulary": V, "layers": 2, "d_model": 16, "d_ff": 8, "num_experts": 4} | changes
    config = MODELS["transformer-xl-small"].replace(**shape)
    torch.manual_seed(seed)
    model = LanguageModel(config, router)
    with torch.no_grad():
        for layer in model.moe_layers:
            layer.gate.weight.normal_(std=1.0)
        for value in model.words.parameters():
            value.normal_(std=0.5)
    return model.eval()


def trained(router, **changes) -> LanguageModel:
    """One whose layers have tracked some cuts of their router."""
    model = tiny(router, **changes).train()
    for seed in range(3):
        model(torch.from_numpy(text(48, seed + 10).astype(np.int64)).view(3, 16))
    return model.eval()


def text(length: int = 100, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, length).astype(np.uint8)


def assert_close(one: torch.Tensor, other, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(one, torch.as_tensor(other, dtype=one.dtype), rtol=1e-5, atol=tolerance)
