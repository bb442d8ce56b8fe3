"""Scores: pure functions from logits to the numbers by which pairs compete and are weighed.

All of them take logits in float32 at least and give 0 where a logit is -inf.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from usmoe.routing.pools import Pools


def in_float32_at_least(logits: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The logits in float32, or float64 if they are: bfloat16 has too few bits to rank pairs."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _widened(logits: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The logits in float64, to be rounded back: vector units round an element, and order a sum, by where it stands in
    memory, while equal logits must have equal scores, or a tie is not a tie."""
    return logits.double()


def masked_softmax(logits: Float[Tensor, "..."], keep: Bool[Tensor, "..."], dim: int) -> Float[Tensor, "..."]:
    """Softmax over the entries that are kept and finite; 0 elsewhere, and in a slice that keeps nothing."""
    keep = keep & (logits > -torch.inf)
    none = ~keep.any(dim, keepdim=True)
    filled = logits.masked_fill(~keep, -torch.inf).masked_fill(none, 0.0)
    if logits.dtype == torch.float64 and logits.numel():  # nothing wider to round from: sum in the order of size
        powers = (filled - filled.amax(dim, keepdim=True)).exp()
        return (powers / powers.sort(dim).values.sum(dim, keepdim=True)).masked_fill(~keep, 0.0)
    return _widened(filled).softmax(dim).to(logits.dtype).masked_fill(~keep, 0.0)


def softmax(logits: Float[Tensor, "... E"]) -> Float[Tensor, "... E"]:
    """Softmax over the experts of a token (token choice; the paper's f_t). A token whose every logit is -inf gets 0."""
    if logits.dtype == torch.float64 or not logits.numel():
        return masked_softmax(logits, torch.ones_like(logits, dtype=torch.bool), -1)
    none = (logits.amax(-1, keepdim=True) == -torch.inf).expand_as(logits)  # the others' -inf become 0 by themselves
    return _widened(logits.masked_fill(none, 0.0)).softmax(-1).to(logits.dtype).masked_fill(none, 0.0)


def sigmoid(logits: Float[Tensor, "... E"]) -> Float[Tensor, "... E"]:
    """Sigmoid of each logit by itself (the expert score of the paper's Algorithm 1)."""
    return _widened(logits).sigmoid().to(logits.dtype)


def scaled_sigmoid(logits: Float[Tensor, "... E"]) -> Float[Tensor, "... E"]:
    """2 * sigmoid / E, the expert score of the paper's released code: 1/E at a logit of 0, as a softmax has on average,
    where a plain sigmoid would swamp it."""
    return sigmoid(logits) * (2.0 / logits.shape[-1])


def identity(logits: Float[Tensor, "... E"]) -> Float[Tensor, "... E"]:
    """The logits themselves: negative scores, and so negative weights, are possible (Expert Race, arXiv 2503.16057)."""
    return logits.masked_fill(logits == -torch.inf, 0.0)


def softplus(logits: Float[Tensor, "... E"]) -> Float[Tensor, "... E"]:
    """log(1 + exp(logit)) of each logit by itself."""
    return torch.nn.functional.softplus(_widened(logits)).to(logits.dtype)


def sqrtsoftplus(logits: Float[Tensor, "... E"]) -> Float[Tensor, "... E"]:
    """The square root of softplus (DeepSeek-V4's score)."""
    return torch.nn.functional.softplus(_widened(logits)).sqrt().to(logits.dtype)


def sparse_mixer(logits: Float[Tensor, "... E"], jitter: float) -> Float[Tensor, "... E"]:
    """Of each expert: its softmax among itself and the lower logits that are within 2*jitter of its own, relative to
    the larger of the two (SparseMixer-v2 at inference, arXiv 2409.12136; PhiMoE)."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    own, other = ordered.unsqueeze(-1), ordered.unsqueeze(-2)
    far = (own - other) / other.abs().maximum(own) > 2 * jitter
    lower = torch.ones_like(far).triu()
    shares = masked_softmax(other.expand_as(far), lower & ~far, -1).diagonal(dim1=-2, dim2=-1)
    return torch.zeros_like(logits).scatter(-1, order, shares)


def softmax_tokens(logits: Float[Tensor, "T E"], pools: Pools) -> Float[Tensor, "T E"]:
    """Softmax over the tokens of a pool, for each expert by itself (the paper's f_e, Definition 3.2)."""
    pooled = pools.gather(logits)  # (G, S, E)
    present = pools.present.unsqueeze(-1).expand_as(pooled)
    return pools.scatter(masked_softmax(pooled, present, 1), len(logits))


def _alone(score: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Pools], Tensor]:
    return lambda logits, pools: score(logits)


TOKEN_SCORES: dict[str, Callable[[Tensor], Tensor]] = {"softmax": softmax, "sigmoid": sigmoid}
"""Scores that look at one token alone."""

HOST_SCORES = TOKEN_SCORES | {"softplus": softplus, "sqrtsoftplus": sqrtsoftplus}
"""Scores that a pretrained model may have."""

EXPERT_SCORES: dict[str, Callable[[Tensor, Pools], Tensor]] = {
    "scaled_sigmoid": _alone(scaled_sigmoid),
    "sigmoid": _alone(sigmoid),
    "softmax_tokens": softmax_tokens,
    "identity": _alone(identity),
}
"""The expert's side of the unified score: (logits (T, E), pools) -> (T, E)."""

EXPERT_CHOICE_SCORES: dict[str, Callable[[Tensor, Pools], Tensor]] = {
    "sigmoid": _alone(sigmoid),
    "softmax_tokens": softmax_tokens,
    "softmax_experts": _alone(softmax),
}
"""By what an expert chooses its tokens: (logits (T, E), pools) -> (T, E)."""
