"""The balance loss, of the pairs that were really routed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from usmoe.types import RouterOutput


def balance_loss(said: Sequence[RouterOutput]) -> Float[Tensor, ""]:
    """E * sum over experts of f_e * p_e: f_e the pairs of expert e for a token, p_e the mean softmax of its logit
    (Fedus et al. 2022, arXiv 2101.03961, equations 4 to 6), over the real tokens of all layers together.

    Differentiable in p. Under token choice it equals transformers' load_balancing_loss_func; f follows the route
    whatever the router. It is k where all is balanced, and 0 where there is no real token, or no layer. Layers have one
    number of experts, else the mean over the layers of each number is taken.
    """
    if not said:
        return torch.zeros(())
    by_number: dict[int, list[RouterOutput]] = {}
    for one in said:
        by_number.setdefault(one.routing.num_experts, []).append(one)
    losses = [_of_one_number(group, number) * len(group) for number, group in by_number.items()]
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum() / len(said)


def _of_one_number(said: Sequence[RouterOutput], experts: int) -> Tensor:
    device = said[0].logits.device
    load, likely, tokens = torch.zeros(experts, device=device), torch.zeros(experts, device=device), 0
    for one in said:
        real = one.routing.valid
        shares = one.logits.flatten(0, 1).float().softmax(-1)[:, :experts]
        shares = shares if real is None else shares.masked_fill(~real.unsqueeze(-1), 0.0)
        load = load + one.routing.load.to(device)
        likely = likely + shares.sum(0).to(device)
        tokens = tokens + (len(shares) if real is None else real.sum().to(device))
    tokens = torch.as_tensor(tokens, device=device).clamp(min=1)
    return experts * (load / tokens * (likely / tokens)).sum()
