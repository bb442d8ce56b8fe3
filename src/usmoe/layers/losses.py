"""Losses of routing beside the balance loss: functions of what the layers said, so that any router may have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from usmoe.routing.scores import in_float32_at_least, masked_softmax
from usmoe.types import RouterOutput


def z_loss(said: Sequence[RouterOutput]) -> Float[Tensor, ""]:
    """The mean of logsumexp(logits)^2 over the real tokens of a layer, and the mean of that over the layers: keeps
    logits small (router z-loss, ST-MoE: Zoph et al. 2022, arXiv 2202.08906, equation 5).

    Padding is left out, and so is a token whose every logit is -inf. 0 where there is no real token.
    """
    return _mean_of_layers(said, _z_of_layer)


def distillation_loss(said: Sequence[RouterOutput]) -> Float[Tensor, ""]:
    """The cross-entropy of the distilled logits against the route: the mean over the (token, expert) pairs that were
    routed of -log softmax(distilled)[token, expert], and the mean of that over the layers that distil
    (StableMoE: Dai et al. 2022, arXiv 2204.08396, section 3.1, for one expert a token; each pair of several counts).

    Only the distilled logits get a gradient. Pairs of padding are left out. 0 where nothing is distilled or routed.
    """
    return _mean_of_layers([one for one in said if one.distilled is not None], _distillation_of_layer)


def similarity_loss(said: Sequence[RouterOutput]) -> Float[Tensor, ""]:
    """The router similarity loss of Expert Race (Yuan et al. 2025, arXiv 2503.16057, section 5): 1/T times the sum over
    pairs of experts (i, j) of W_ij * P_ij, and the mean of that over the layers.

    P = p^T p says how alike two experts' softmax shares are over the T real tokens, and M = m^T m how many tokens they
    share in the route. W_ii = E * M_ii / sum of the diagonal, which evens the load; W_ij = (E^2 - E) * M_ij / sum off
    the diagonal, which drives apart experts that go together. W has no gradient. It is 1 where all is even; without
    tokens that have several experts, the diagonal alone is left. 0 where nothing is routed.
    """
    return _mean_of_layers(said, _similarity_of_layer)


def _mean_of_layers(said: Sequence[RouterOutput], of_layer: Callable[[RouterOutput], Tensor]) -> Tensor:
    """The mean over layers, on the device of the first; 0 without any."""
    losses = [of_layer(one) for one in said]
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean() if losses else torch.zeros(())


def real_logits(one: RouterOutput) -> tuple[Float[Tensor, "T E"], Bool[Tensor, " T"]]:
    """Logits in float32 at least, 0 in padding (a NaN there times a gradient of 0 is a NaN), and which are real."""
    logits = in_float32_at_least(one.logits).flatten(0, 1)
    real = one.routing.valid
    if real is None:
        return logits, torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    return logits.masked_fill(~real.unsqueeze(-1), 0.0), real


def _z_of_layer(one: RouterOutput) -> Tensor:
    logits, real = real_logits(one)
    real = real & (logits > -torch.inf).any(-1)
    squares = logits.masked_fill(~real.unsqueeze(-1), 0.0).logsumexp(-1).square()
    return squares.where(real, 0.0).sum() / real.sum().clamp(min=1)


def _similarity_of_layer(one: RouterOutput) -> Tensor:
    logits, real = real_logits(one)
    experts = one.routing.num_experts
    shares = masked_softmax(logits[:, :experts], real.unsqueeze(-1).expand(-1, experts), -1)
    routed = (one.routing.mask() & real.unsqueeze(-1)).to(shares.dtype)
    together = routed.T @ routed
    own = torch.eye(experts, dtype=torch.bool, device=together.device)
    diagonal, off = together.where(own, 0), together.where(~own, 0)
    of_diagonal = experts * diagonal / diagonal.sum().clamp(min=1)
    of_others = (experts**2 - experts) * off / off.sum().clamp(min=1)
    return ((of_diagonal + of_others) * (shares.T @ shares)).sum() / real.sum().clamp(min=1)


def _distillation_of_layer(one: RouterOutput) -> Tensor:
    routing, distilled = one.routing, one.distilled
    assert distilled is not None
    logits = in_float32_at_least(distilled).flatten(0, 1)
    logits = logits if routing.valid is None else logits.masked_fill(~routing.valid.unsqueeze(-1), 0.0)
    surprise = F.cross_entropy(logits.index_select(0, routing.token), routing.expert, reduction="none")
    if routing.valid is None:
        return surprise.sum() / max(len(surprise), 1)
    real = routing.valid[routing.token]
    return surprise.where(real, 0.0).sum() / real.sum().clamp(min=1)
