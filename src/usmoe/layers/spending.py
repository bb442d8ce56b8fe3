"""From a budget to a threshold, given all the scores: where exactly k pairs a token reach it."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from usmoe.layers.threshold_form import Threshold
from usmoe.routing import ExpertChoice, USMoE
from usmoe.routing.host import Host
from usmoe.routing.pools import pools
from usmoe.routing.router import competing
from usmoe.routing.scores import EXPERT_CHOICE_SCORES
from usmoe.routing.select import budget, capacity, cut_above_floors, per_expert


def ranking_scores(
    router: USMoE | ExpertChoice, logits: Float[Tensor, "B L E"], valid: Bool[Tensor, "B L"] | None, host: Host
) -> Float[Tensor, "S E"]:
    """The scores by which a router ranks the pairs of the S real tokens, each by itself: -inf for a pair that cannot be
    chosen."""
    batch, length, _ = logits.shape
    flat, competes = competing(logits, valid)
    group = pools("token", batch, length, competes)
    if isinstance(router, USMoE):
        scores = router.unified_scores(flat, group, host)[1]
    else:
        scores = EXPERT_CHOICE_SCORES[router.score](flat, group).masked_fill(flat == -torch.inf, -torch.inf)
    return scores[competes.reshape(-1)]


def spending_threshold(router: USMoE | ExpertChoice, scores: Float[Tensor, "S E"], k: float, experts: int) -> Threshold:
    """The value that floor(k*S + 0.5) pairs of these tokens reach, those that the router's floor adds included; for
    expert choice one an expert, which as many tokens reach as it would take of them. It lies midway between two
    scores, so that no observed pair sits on it.

    experts  among which a budget of expert choice is divided: those that compute, where some columns are of none
    """
    tokens = torch.tensor([len(scores)])
    eligible = scores > -torch.inf
    if isinstance(router, ExpertChoice):
        _, cut = per_expert(scores[None], eligible[None], capacity(k, tokens, experts))
        return tuple(cut[0].tolist())
    floors = torch.full((1, len(scores)), router.min_experts)
    cut, _ = cut_above_floors(scores[None], eligible[None], floors, budget(k, tokens))
    return cut.item()
