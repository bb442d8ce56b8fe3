"""Optimisers and learning rates of a training run."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from usmoe.train.config import TrainConfig
from usmoe.train.muon import Muon


def learning_rate(step: int, config: TrainConfig) -> float:
    """Of the step with that number, from 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
        return config.lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    left = config.steps - step
    if left >= config.decay:
        return config.lr
    return config.lr * (1 - math.sqrt(1 - left / config.decay))


def optimisers_of(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Adam as in the paper (weight decay, where there is any, goes into the gradient); AdamW, whose decay leaves norms
    and biases alone; or Muon for the matrices of attention and experts, with AdamW for the rest."""
    parameters = dict(model.named_parameters())
    if config.optimizer == "adam":
        adam = torch.optim.Adam(
            parameters.values(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        return [adam]
    inner = {
        name: one
        for name, one in parameters.items()
        if config.optimizer == "muon" and one.ndim >= 2 and _is_matrix(name)
    }
    others = [one for name, one in parameters.items() if name not in inner]
    decaying = {id(one) for name, one in parameters.items() if one.ndim >= 2 and not name.endswith("bias")}
    groups: list[dict[str, list[Tensor] | float]] = [
        {"params": [one for one in others if id(one) in decaying], "weight_decay": config.weight_decay},
        {"params": [one for one in others if id(one) not in decaying], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    return [adamw, *([Muon(inner.values(), config.lr, weight_decay=config.weight_decay)] if inner else [])]


def _is_matrix(name: str) -> bool:
    """Whether a parameter of two dimensions or more is a map between hidden states; words, gates and biases are
    none."""
    return not (name.endswith("bias") or any(part in name for part in ("words.", "gate.")))
