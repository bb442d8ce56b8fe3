"""What quotas cost: the best selection under a budget beside the best with a quota for tokens, experts, or both."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from usmoe.lp.solve import check_scores, solve


@dataclass(frozen=True, kw_only=True)
class Quota:
    """One selection of a comparison, all with the same number of pairs."""

    name: str
    value: float
    """Sum of the scores of the chosen pairs."""
    given_away: float
    """Share of the unconstrained optimum that the quota gives away: 0, and more."""
    dropped: float
    """Share of the tokens without a pair, 0 to 1."""
    most: float
    """Pairs of the fullest expert over an even share of them."""
    per_token: tuple[int, int] | None
    """Floor and cap of a token."""
    per_expert: tuple[int, int] | None
    """Floor and cap of an expert."""


def compare(scores: Float[Tensor, "T E"], k: float | None = None) -> list[Quota]:
    """How much score each quota gives away, at floor(k*T + 0.5) pairs (by default k is 2, or E where that is less).

        for quota in usmoe.lp.compare(scores):
            print(quota.name, f"{quota.given_away:.1%}", quota.dropped)

    none                   the best pairs: USMoE
    tokens                 every token floor(k) to ceil(k) experts: token choice, where k is whole
    experts                every expert its even share of the pairs, rounded down or up: expert choice
    tokens and experts     both
    no drop, capped        every token 1 to ceil(2k) experts, every expert 1.25 times its share at most: bounded choice

    Raises ValueError for a k outside of 0 < k <= E, and as `solve` does.
    """
    check_scores(scores)
    tokens, experts = scores.shape
    k = min(2, experts) if k is None else k
    if isinstance(k, bool) or not isinstance(k, numbers.Real):
        raise ValueError(f"k={k!r} is not a budget. Give a number of experts per token, 0 < k <= {experts}.")
    if not 0 < k <= experts:
        raise ValueError(
            f"A budget of k={k:g} experts per token is impossible with {experts} experts. Choose 0 < k <= {experts}."
        )
    budget = math.floor(k * tokens + 0.5)
    of_token = (math.floor(k), math.ceil(k))
    of_expert = (budget // experts, -(-budget // experts))
    loose = (min(1, of_token[0]), min(experts, math.ceil(2 * k))), (0, math.ceil(1.25 * k * tokens / experts - 1e-9))
    quotas: dict[str, tuple[tuple[int, int] | None, tuple[int, int] | None]] = {
        "none": (None, None),
        "tokens": (of_token, None),
        "experts": (None, of_expert),
        "tokens and experts": (of_token, of_expert),
        "no drop, capped": loose,
    }
    rows: list[Quota] = []
    for name, (per_token, per_expert) in quotas.items():
        found = solve(scores, budget=budget, per_token=per_token, per_expert=per_expert)
        best = rows[0].value if rows else found.value
        load = found.mask.sum(0)
        rows.append(
            Quota(
                name=name,
                value=found.value,
                given_away=(best - found.value) / abs(best) if best else 0.0,
                dropped=(found.mask.sum(1) == 0).sum().item() / max(tokens, 1),
                most=load.max().item() * experts / max(budget, 1),
                per_token=per_token,
                per_expert=per_expert,
            )
        )
    return rows
