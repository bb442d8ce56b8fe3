"""Every router of usmoe, in one list: a new router joins ALL_ROUTERS and meets all laws of the test files.

Beside the list: `fit`, which adapts a router to a number of experts; `batches`, the inputs that hypothesis draws; and
`oracle`, the answer of tests/reference.py for the same input.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from usmoe import BoundedChoice, ExpertChoice, OwnChoice, ReLUChoice, Routing, TokenChoice, USMoE, route
from usmoe.routing import Host
from usmoe.types import Promises


@dataclass(frozen=True)
class Hosted:
    """A router under the rule of a pretrained model, as `usmoe.patch` calls it."""

    router: Any
    host: Host

    @property
    def promises(self) -> Promises:
        return self.router.promises

    def __call__(self, logits: Tensor, valid: Tensor | None = None, **given: Any) -> Routing:
        return self.router(logits, valid, host=self.host, **given)

    def __str__(self) -> str:
        return f"{self.router} under {self.host.score}, {self.host.normalize}, x{self.host.scale}"


BIASED = Host(
    k=2,
    score="sigmoid",
    normalize="chosen",
    scale=2.5,
    bias=torch.tensor([0.2, -0.1, 0.05, 0.3, -0.3, 0.1]),
    alpha=0.0,
)
PLAIN = Host(k=2, alpha=0.0)

_EXPERT_SCORES = ("scaled_sigmoid", "sigmoid", "softmax_tokens")
_NORMALIZE = ("none", "all", "chosen")
_TAU = {"scaled_sigmoid": 0.3, "sigmoid": 0.45}

USMOES: list[Any] = [
    *(
        USMoE(k=1.5, pool=pool, expert_score=score, normalize=normalize)
        for pool, score, normalize in itertools.product(("sequence", "batch", "time_step"), _EXPERT_SCORES, _NORMALIZE)
    ),
    *(
        USMoE(k=2, pool="token", expert_score=score, normalize=normalize)
        for score, normalize in itertools.product(_TAU, _NORMALIZE)
    ),
    *(
        USMoE(pool="threshold", threshold=_TAU[score], expert_score=score, normalize=normalize)
        for score, normalize in itertools.product(_TAU, _NORMALIZE)
    ),
    *(
        USMoE(k=1.5, pool="prefix", expert_score=score, normalize=normalize)
        for score, normalize in itertools.product(_TAU, _NORMALIZE)
    ),
    USMoE(k=0.5, pool="prefix"),
    USMoE(k=2, pool="prefix", alpha=0.0, min_experts=1),
    USMoE(k=1.5, pool="prefix", burst=1.5, normalize="chosen"),
    USMoE(k=1.5, pool="prefix", burst=0, min_experts=1),
    USMoE(k=1, pool="threshold", threshold=0.15, burst=2),
    USMoE(k=1.5, pool="threshold", threshold=0.2, burst=0.5, min_experts=1, normalize="chosen"),
    USMoE(k=1, pool="threshold", threshold=0.3, min_experts=1),
    USMoE(k=1, pool="threshold", threshold=(0.2, 0.1, 0.15, 0.3, 0.12, 0.18), burst=2, min_experts=1),
    USMoE(k=1, pool="threshold", threshold=(0.2, 0.4, 0.15, 0.5, 0.3, 0.25), min_experts=1),
    USMoE(pool="threshold", threshold=(0.2, 0.25, 0.15, 0.3, 0.22, 0.18)),
    USMoE(k=2, pool="token", burst=1, min_experts=1),
    USMoE(k=1, alpha=0.0),
    USMoE(k=0.5, alpha=1.0, expert_score="sigmoid"),
    USMoE(k=1.3, alpha=0.3, token_score="sigmoid"),
    *(USMoE(k=1.5, alpha=1.0, expert_score="identity", pool=pool) for pool in ("batch", "sequence", "prefix")),
    USMoE(k=1, alpha=0.7, expert_score="identity", pool="token", token_score="sigmoid"),
    USMoE(pool="threshold", threshold=(0.5, -0.2, 1.0, 0.3, 0.8, 0.0), alpha=1.0, expert_score="identity"),
    *(USMoE(k=1.5, mask_padding=False, pool=pool) for pool in ("sequence", "batch", "time_step")),
    USMoE(k=1, mask_padding=False, pool="token"),
    USMoE(k=1.5, mask_padding=False, pool="prefix", burst=1),
    Hosted(USMoE(k="0.75x"), BIASED),
    Hosted(USMoE(k="0.75x", alpha=0.5, pool="batch"), PLAIN),
    Hosted(USMoE(k=1.2, alpha=0.5), BIASED),
    Hosted(USMoE(k="0.75x", pool="prefix", burst=1, min_experts=1), BIASED),
    Hosted(USMoE(pool="prefix", alpha=0.5), PLAIN),
]

EXPERT_CHOICES: list[Any] = [
    *(
        ExpertChoice(k=1.5, score=score, pool=pool)
        for score, pool in itertools.product(("sigmoid", "softmax_tokens", "softmax_experts"), ("sequence", "batch"))
    ),
    ExpertChoice(pool="threshold", threshold=(0.5, 0.6, 0.3, 0.7, 0.55, 0.4)),
    ExpertChoice(pool="threshold", score="softmax_experts", threshold=(0.2, 0.4, 0.1, 0.3, 0.25, 0.35)),
]

BOUNDED_CHOICES: list[Any] = [
    BoundedChoice(k=1.5),
    BoundedChoice(k=1.5, per_token=(1, 2), per_expert=(0.5, 1), normalize="chosen"),
    BoundedChoice(k=2, pool="batch", alpha=0.3),
    BoundedChoice(k=1.5, pool="batch", per_token=(0, 3), per_expert=(1, 1.5), expert_score="softmax_tokens"),
    BoundedChoice(k=1.5, pool="time_step"),
    BoundedChoice(k=2, pool="token"),
    BoundedChoice(k=1.5, per_expert=None, normalize="all"),
    BoundedChoice(k=1.5, per_token=None, per_expert=(0.5, 1.25), expert_score="sigmoid"),
    BoundedChoice(k=1.5, per_token=None, per_expert=None),
    BoundedChoice(k=1.5, per_token=(0, 3), alpha=1.0, expert_score="identity"),
    Hosted(BoundedChoice(k="0.75x"), BIASED),
]

TOKEN_CHOICES: list[Any] = [
    *(
        TokenChoice(k=2, score=score, normalize=normalize, score_order=order)
        for score, normalize, order in itertools.product(
            ("softmax", "sigmoid"), _NORMALIZE, ("score_then_topk", "topk_then_score")
        )
    ),
    Hosted(OwnChoice(), PLAIN),
    Hosted(OwnChoice(), BIASED),
    Hosted(OwnChoice(k=1), BIASED),
]

RELU_CHOICES: list[Any] = [ReLUChoice(), ReLUChoice(k=2), Hosted(ReLUChoice(k="0.75x"), BIASED)]

ALL_ROUTERS: list[Any] = USMOES + EXPERT_CHOICES + BOUNDED_CHOICES + TOKEN_CHOICES + RELU_CHOICES

laws = settings(max_examples=8, derandomize=True, deadline=None, database=None)
"""Seeded: the same examples on every run."""


def those(holds: Callable[[Promises], bool]) -> list[Any]:
    """The routers whose promises are such."""
    return [router for router in ALL_ROUTERS if holds(router.promises)]


def plain(router: Any) -> Any:
    """The router itself, out of its host."""
    return router.router if isinstance(router, Hosted) else router


def fit(router: Any, experts: int) -> Any:
    """The same rule for a given number of experts: k no higher, a threshold and a bias for each."""
    if isinstance(router, Hosted):
        host, bias = router.host, router.host.bias
        host = replace(host, k=min(host.k or 1, experts), bias=None if bias is None else bias[:experts])
        k = router.router.k
        if isinstance(k, int | float):
            k = min(k, experts)
        elif host.k == 1:  # a share of one expert may be no whole number
            k = None
        return Hosted(replace(router.router, k=k), host)
    if isinstance(router.k, int | float):
        router = replace(router, k=min(router.k, experts))
    if isinstance(getattr(router, "per_token", None), tuple):
        router = replace(router, per_token=(min(router.per_token[0], math.floor(router.k)), router.per_token[1]))
    if isinstance(router.threshold if hasattr(router, "threshold") else None, tuple):
        router = replace(router, threshold=tuple(itertools.islice(itertools.cycle(router.threshold), experts)))
    return router


@dataclass(frozen=True)
class Batch:
    """Logits (B, L, E) in float64 with the spread of a trained gate, and a source of further randomness."""

    logits: Tensor
    valid: Tensor | None
    random: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random, dtype=torch.float64) * 2

    def below(self, high: int) -> int:
        return int(torch.randint(high, (), generator=self.random))


@st.composite
def batches(draw: Any, *, padded: bool = True, length: int = 6, experts: int = 6, least: int = 1) -> Batch:
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    shape = draw(st.integers(1, 3)), draw(st.integers(least, length)), draw(st.integers(least, experts))
    logits = torch.randn(*shape, generator=random, dtype=torch.float64) * 2
    valid = None
    if padded and draw(st.booleans()):
        valid = torch.rand(*shape[:2], generator=random) < 0.7
    return Batch(logits, valid, random)


def oracle(
    router: Any, logits: Tensor | list, valid: Tensor | None = None, segments: Tensor | None = None
) -> reference.Answer:
    """What tests/reference.py answers."""
    nested = logits.tolist() if isinstance(logits, Tensor) else logits
    host = router.host if isinstance(router, Hosted) else None
    listed = [None if x is None else x.tolist() for x in (valid, segments)]
    return reference.route(plain(router), nested, *listed, host=host)


def pairs(routing: Routing) -> list[tuple[int, int]]:
    """(token, expert) of each pair, in the routing's order."""
    return list(zip(routing.token.tolist(), routing.expert.tolist(), strict=True))


def grids(routing: Routing, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mask and weights, both (B, L, E)."""
    return routing.mask().view(like.shape), routing.dense().view(like.shape)


def assert_same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], tolerance: float = 1e-12) -> None:
    """Masks equal, weights equal up to rounding."""
    assert one[0].tolist() == other[0].tolist()
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=tolerance)


def differ(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    """Whether a mask differs, or a weight by more than rounding."""
    return bool((one[0] != other[0]).any() or ((one[1] - other[1]).abs() > 1e-9).any())


def whole(router: Any, logits: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mask and weights of route()."""
    return grids(route(logits, router, valid=valid), logits)
