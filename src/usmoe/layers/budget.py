"""Whether thresholds spend what was asked for: pairs counted on the first text that is served, and a warning once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from usmoe.routing.host import ROUTE, Host
from usmoe.routing.router import experts_per_token
from usmoe.types import Routing

APART = 0.1
"""Share of a budget by which what is spent may differ from it, before something is said."""
TOKENS = 1024
"""Of each layer, on which the experts a token are counted."""


def off_budget(spent: float | None, asked: float | None) -> bool:
    """Whether experts a token differ from what is asked for by more than a tenth of it; not where either is unknown."""
    return spent is not None and asked is not None and abs(spent - asked) > APART * asked


def asked_of(router: Any, experts: int, host: Host = ROUTE) -> float | None:
    """The experts a token that a router is asked for; None where it says no number of its own."""
    k = getattr(router, "k", 0)
    if k == 0 or (host.k is None and (k is None or isinstance(k, str))):
        return None
    return experts_per_token(k, host, experts)


def mean_asked(routers: Sequence[Any], experts: int) -> float | None:
    """The mean over layers; None where one of them says no number, and where there is no layer."""
    asked = [asked_of(router, experts) for router in routers]
    known = [one for one in asked if one is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(asked) else None


class Spending:
    """Pairs a token of layers that are served by thresholds, counted over the first TOKENS real tokens of each."""

    def __init__(self, asked: Iterable[float]) -> None:
        """asked: experts a token, one a layer."""
        self.asked = tuple(asked)
        self.pairs = [0] * len(self.asked)
        self.tokens = [0] * len(self.asked)

    def count(self, layer: int, routing: Routing) -> bool:
        """Count what a layer chose; whether it need not be asked again. When every layer has seen enough, a budget that
        is not kept is said, once, as a UserWarning."""
        real = routing.num_tokens if routing.valid is None else int(routing.valid.sum())
        self.pairs[layer] += len(routing.token)
        self.tokens[layer] += real
        if min(self.tokens) < TOKENS:
            return False
        if sum(self.asked):
            self._say()
        self.asked = (0.0,) * len(self.asked)
        return True

    def _say(self) -> None:
        spent = math.fsum(pairs / tokens for pairs, tokens in zip(self.pairs, self.tokens, strict=True))
        spent, asked = spent / len(self.asked), math.fsum(self.asked) / len(self.asked)
        if off_budget(spent, asked):
            warnings.warn(
                f"The thresholds of usmoe.to_causal spend {spent:.2f} experts a token, and {asked:.2f} are asked for "
                f"(mean of {len(self.asked)} layers, first {min(self.tokens):,} tokens): the cuts that training "
                "tracked are not those of this model and text. Train on until they settle (a bias that balances moves "
                "them), or find thresholds on text: usmoe.calibrate() for a patched model, usmoe eval RUN --serve-k K "
                "for a run.",
                stacklevel=2,
            )
