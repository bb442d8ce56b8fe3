"""Metrics: functions of Routing values. Padding is left out wherever the Routing says which tokens are real."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from usmoe.types import Routing

Valid = Bool[Tensor, "..."] | None


def experts_per_token(routing: Routing, valid: Valid = None) -> Int[Tensor, " R"]:
    """Experts of each of the R real tokens, in order."""
    counts = routing.experts_per_token
    real = _real(routing, valid)
    return counts if real is None else counts[real]


def dropped(routing: Routing, valid: Valid = None) -> float:
    """Share of real tokens without an expert, 0 to 1 (the paper's token dropping D); NaN without a real token."""
    return underserved(routing, 1, valid)


def underserved(routing: Routing, k: float, valid: Valid = None) -> float:
    """Share of real tokens with fewer than k experts, 0 to 1; NaN without a real token."""
    return (experts_per_token(routing, valid) < k).double().mean().item()


def load(routing: Routing, valid: Valid = None) -> Int[Tensor, " E"]:
    """Real tokens that each expert receives."""
    real = _real(routing, valid)
    expert = routing.expert if real is None else routing.expert[real[routing.token]]
    return torch.bincount(expert, minlength=routing.num_experts)


def load_cv(routing: Routing, valid: Valid = None) -> float:
    """Coefficient of variation of the experts' loads: 0 is perfect balance, sqrt(E - 1) is one expert doing it all.
    NaN where nothing is routed."""
    return variation(load(routing, valid))


def variation(loads: Int[Tensor, " E"]) -> float:
    """Standard deviation over mean of the loads of the experts; NaN where all are 0."""
    return (loads.double().std(correction=0) / loads.double().mean()).item()


def load_entropy(routing: Routing, valid: Valid = None) -> float:
    """Entropy of the experts' loads over that of perfect balance, 0 to 1 (1 where there is one expert)."""
    share = load(routing, valid).double()
    share = share / share.sum()
    if routing.num_experts == 1:
        return 1.0
    return -torch.special.xlogy(share, share).sum().item() / math.log(routing.num_experts)


def unique_experts(routing: Routing, valid: Valid = None) -> float:
    """Experts that receive at least one token of a sequence, averaged over the sequences that have a real token;
    NaN without one."""
    real = _real(routing, valid)
    length = routing.num_tokens // max(routing.sequences, 1)
    seen = routing.mask() if real is None else routing.mask() & real[:, None]
    by_sequence = seen.view(routing.sequences, length, routing.num_experts).any(1).sum(1)
    if real is not None:
        by_sequence = by_sequence[real.view(routing.sequences, length).any(1)]
    return by_sequence.double().mean().item()


def overlap(one: Routing, other: Routing) -> float:
    """Pairs that two routings of the same tokens share, over the pairs of either (Jaccard), 0 to 1; 1 where both are
    empty. Raises ValueError where the sizes differ."""
    if (one.num_tokens, one.num_experts) != (other.num_tokens, other.num_experts):
        raise ValueError(
            f"overlap() compares routings of the same tokens and experts, not {one.num_tokens}x{one.num_experts} "
            f"with {other.num_tokens}x{other.num_experts}."
        )
    both = torch.isin(one.pair, other.pair).sum().item()
    either = len(one.pair) + len(other.pair) - both
    return both / either if either else 1.0


def _real(routing: Routing, valid: Valid) -> Bool[Tensor, " T"] | None:
    return routing.valid if valid is None else valid.reshape(-1)
