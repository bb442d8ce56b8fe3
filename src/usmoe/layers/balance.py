"""The balance loss, of the pairs that were really routed: layer by layer, or as transformers has it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from usmoe.layers.losses import real_logits
from usmoe.routing.scores import masked_softmax
from usmoe.types import RouterOutput


def balance_loss(said: Sequence[RouterOutput]) -> Float[Tensor, ""]:
    """The sum over the layers of E * sum over experts of f_e * p_e: f_e the pairs of expert e for a token, p_e the mean
    softmax of its logit (Fedus et al. 2022, arXiv 2101.03961, equations 4 to 6), over the real tokens.

    Differentiable in p; f follows the route whatever the router. Of a layer it is k where all is balanced, and 0 where
    there is no real token. Padding is left out, and so is a token whose every logit is -inf.
    """
    losses = [_of_layers([one]) for one in said]
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum() if losses else torch.zeros(())


def pooled_balance_loss(said: Sequence[RouterOutput]) -> Float[Tensor, ""]:
    """The same of all layers' tokens as if they were of one layer: under token choice transformers'
    load_balancing_loss_func. Layers that are imbalanced towards different experts look balanced to it.

    It is k where all is balanced, and 0 without a layer. Layers have one number of experts, else the mean over the
    layers of each number is taken.
    """
    by_number: dict[int, list[RouterOutput]] = {}
    for one in said:
        by_number.setdefault(one.routing.num_experts, []).append(one)
    losses = [_of_layers(group) * len(group) for group in by_number.values()]
    if not losses:
        return torch.zeros(())
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum() / len(said)


def _of_layers(said: Sequence[RouterOutput]) -> Tensor:
    """E * sum of f_e * p_e over the tokens of layers that have E experts each."""
    experts, device = said[0].routing.num_experts, said[0].logits.device
    load, likely, tokens = (torch.zeros(number, device=device) for number in (experts, experts, 1))
    for one in said:
        logits, real = real_logits(one)
        shares = masked_softmax(logits[:, :experts], real.unsqueeze(-1).expand(-1, experts), -1)
        counted = real[one.routing.token].to(load.dtype)
        load = load + load.new_zeros(experts).index_add(0, one.routing.expert.to(device), counted.to(device))
        likely = likely + shares.sum(0).to(device)
        tokens = tokens + real.sum().to(device)
    tokens = tokens.clamp(min=1)
    return experts * (load / tokens * (likely / tokens)).sum()
