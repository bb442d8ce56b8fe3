"""The routing methods that are trained and compared, by name: each is a few changes of a training configuration."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from usmoe.routing.router import Router
from usmoe.routing.text import parse_router
from usmoe.train.config import TrainConfig

BALANCE = 0.01
"""Coefficient of the balance loss for token choice, as the paper states it; its released code switches the loss off by
accident. Expert choice is balanced by construction, and USMoE has no such loss."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to route, and what its training needs beside."""

    title: str
    """As in a table: the paper's word for it, or that of its own paper."""
    router: str
    """As on the command line, with the k of the paper's small model."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of the configuration, as `TrainConfig.replace` takes them."""
    note: str = ""
    """What was decided where the papers leave it open; sentences."""

    def apply(self, config: TrainConfig, k: float | None = None) -> TrainConfig:
        """The configuration, trained by this method.

        What belongs to another method is put back: gate, coefficients of losses, stages.

        k  experts a token in place of the method's own. Raises ValueError where the method has no k of its own
        """
        router = self.router
        if k is not None:
            if "grow_k" in self.changes:
                raise ValueError(f"{self.title} grows its k from step to step, and takes no k={k:g}. Leave it out.")
            made = parse_router(self.router)
            assert isinstance(made, Router)
            router = str(dataclasses.replace(made, k=k))  # pyright: ignore[reportArgumentType]
        fields = {one.name: one.default for one in dataclasses.fields(TrainConfig) if one.name in _STAGES}
        model = {"model__gate": "linear", "model__moving": False, "model__router": router}
        return config.replace(**(fields | model | dict(self.changes)))


_STAGES = ("balance", "distill", "similarity", "sparsity", "grow_k", "freeze_at")

REPLACED = (*_STAGES, "model.gate", "model.moving")
"""Fields beside the router that a method sets or puts back, as a configuration file states them."""

METHODS: dict[str, Method] = {
    "token_choice": Method(
        title="SMoE",
        router="token_choice(k=2, score_order=topk_then_score)",
        changes={"balance": BALANCE},
        note="The k best logits, then the softmax of these; balance loss 0.01. At k = 1 that softmax is 1 whatever the "
        "logit, and the balance loss alone trains the gate.",
    ),
    "expert_choice_sigmoid": Method(title="EC sigmoid", router="expert_choice(k=2, score=sigmoid)"),
    "expert_choice_softmax_tokens": Method(
        title="EC softmax over tokens",
        router="expert_choice(k=2, score=softmax_tokens)",
        note="Every weight depends on all tokens of the sequence, later ones too.",
    ),
    "expert_choice_softmax_experts": Method(
        title="EC softmax over experts", router="expert_choice(k=2, score=softmax_experts)"
    ),
    "usmoe": Method(title="USMoE k=2", router="usmoe(k=2, alpha=0.5)"),
    "usmoe-1.5": Method(title="USMoE k=1.5", router="usmoe(k=1.5, alpha=0.5)"),
    "usmoe_time_step": Method(
        title="USMoE, as released",
        router="usmoe(k=2, alpha=0.5, pool=time_step)",
        note="The pool is the batch at one time step: a token's route depends on the other sequences, and at batch 1 "
        "it competes with itself alone.",
    ),
    "usmoe_chosen": Method(
        title="USMoE k=2, weights of a token sum to 1",
        router="usmoe(k=2, alpha=0.5, normalize=chosen)",
        note="A control: the paper's U is about 1/E a pair, so that a token's experts together weigh some tenth of "
        "what SMoE's weigh. Here they sum to 1, as SMoE's do; it has no balance loss.",
    ),
    "token_choice_scores": Method(
        title="SMoE, scores as weights",
        router="token_choice(k=2)",
        changes={"balance": BALANCE},
        note="The other control: token choice whose weights are the softmax over all experts, as OLMoE has them.",
    ),
    "xmoe": Method(
        title="XMoE",
        router="token_choice(k=2, score_order=topk_then_score)",
        changes={"model__gate": "cosine", "balance": BALANCE},
        note="Projection of width E/2, learned temperature from 0.07; weights and balance loss as SMoE.",
    ),
    "stablemoe": Method(
        title="StableMoE",
        router="token_choice(k=2, score=sigmoid)",
        changes={"model__gate": "stable", "distill": 1.0, "freeze_at": 0.1, "balance": BALANCE},
        note="Stage one takes a tenth of the steps, as in its own paper (6,000 of 60,000).",
    ),
    "smoe_dropout": Method(
        title="SMoE-DR",
        router="token_choice(k=8, score_order=topk_then_score)",
        changes={"model__gate": "frozen", "grow_k": (8, 16)},
        note="k grows from 8 to all 16 experts; the gate is random and never moves, so no loss balances it.",
    ),
    "usmoe_batch": Method(title="USMoE, pool batch", router="usmoe(k=2, alpha=0.5, pool=batch)"),
    "usmoe_threshold": Method(
        title="USMoE, moving threshold",
        router="usmoe(k=2, alpha=0.5)",
        changes={"model__moving": True},
        note="Routes by the moving average of the sequences' cuts, in training too: causal throughout.",
    ),
    "expert_threshold": Method(
        title="Expert Threshold",
        router="expert_choice(k=2, score=sigmoid, pool=batch)",
        changes={"model__moving": True},
        note="One threshold an expert, the moving average of its cuts in a batch (arXiv 2603.11535).",
    ),
    "loss_free": Method(
        title="SMoE, balanced by bias",
        router="token_choice(k=2)",
        changes={"model__gate": "bias"},
        note="Sigmoid scores, a bias an expert on what competes, no loss (arXiv 2408.15664).",
    ),
    "remoe": Method(
        title="ReMoE",
        router="relu_choice(k=2)",
        changes={"sparsity": True},
        note="Every pair with a positive logit; an adaptive penalty drives their number to k, and nothing holds it "
        "there (arXiv 2412.14711).",
    ),
    "expert_race": Method(
        title="Expert Race",
        router="usmoe(k=2, alpha=1.0, expert_score=identity, pool=batch)",
        changes={"similarity": 1e-4},
        note="The best pairs of the batch by raw logits, weighed by them (arXiv 2503.16057); the coefficient of its "
        "similarity loss, 0.0001, is chosen here.",
    ),
}
"""By the name as typed behind `usmoe train --method`."""


def method(name: str) -> Method:
    """The method of that name. Raises ValueError for an unknown one, with the nearest."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, 2)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"There is no method {name!r}.{hint} Known: {', '.join(METHODS)}.")
    return METHODS[name]
