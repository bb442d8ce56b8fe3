"""The exhaustive side channel: how many bits of the later tokens a model of MoE layers gives away at earlier positions.

All sequences of a small alphabet, each with equal weight, go through a small, random, untrained model. What is observed
at positions 1..t is a function of the whole sequence, so its mutual information with the tokens after t, given those up
to t, is the entropy that it still has once the tokens up to t are known: group the sequences by their prefix and count
the distinct observations in each group. Nothing is estimated, trained or differentiated, and a pair that flips for one
sequence in a thousand counts: that is the leak of top-n over a pool, of which a gradient sees nothing.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from usmoe import MoE
from usmoe.types import Routing, promises_of

D, F, E = 8, 8, 6
LONGEST = 6
"""Tokens of the longest sequence: the positions that the model knows."""
SPREAD = 2.0
"""Standard deviation of the logits, about that of a trained gate; without it, all experts score nearly the same."""
ROUNDING = 1e-9
"""Observations that differ by less are one. Measured at 4 layers: the sums of a batch are rounded by up to 2e-15, and
what a later token moves, it moves by more than 0.01."""

Observed = Literal["outputs", "masks"]
"""outputs: what the last layer returns (an observer of the model); masks: the pairs of every layer (of its routers)."""


class CausalStack(nn.Module):
    """Layers of a running mean of the states so far, then a residual MoE; the routers alone can look ahead.

    With one seed, the first layers of a deeper stack are those of a shallower one.
    """

    def __init__(self, router: Any, layers: int, symbols: int, seed: int = 0) -> None:
        super().__init__()
        self.random = torch.Generator().manual_seed(seed)
        self.position = self._normal(LONGEST, D)
        self.symbol = self._normal(symbols, D)
        self.mixes: list[Tensor] = []
        self.moes = nn.ModuleList()
        for _ in range(layers):
            self.mixes.append(self._normal(D, D) * D**-0.5)
            moe = MoE(D, F, E, router).double()
            for name, value in moe.named_parameters():
                spread = SPREAD if name == "gate.weight" else 1.0
                value.data = self._normal(*value.shape) * spread * value.shape[-1] ** -0.5
            self.moes.append(moe)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random, dtype=torch.float64)

    def embed(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """The states before the first layer."""
        return self.symbol[tokens] + self.position[: tokens.shape[1]]

    def forward(self, x: Float[Tensor, "B L D"]) -> tuple[Float[Tensor, "B L D"], list[Routing]]:
        """The states after the last layer, and the routing of every layer."""
        routings = []
        places = torch.arange(1, x.shape[1] + 1)[:, None]
        for mix, moe in zip(self.mixes, self.moes, strict=True):
            x = x + x.cumsum(1) / places @ mix
            y, out = moe(nn.functional.rms_norm(x, (D,)))
            x = x + y
            routings.append(out.routing)
        return x, routings


def sequences(symbols: int, length: int) -> Int[Tensor, "B L"]:
    """All symbols**length sequences, the last token fastest: those of one prefix stand side by side."""
    return torch.cartesian_prod(*[torch.arange(symbols)] * length).view(-1, length)


def entropy(observed: Float[Tensor, "P R M"]) -> float:
    """Bits of a row of M numbers, of which there are R equally likely ones in each of P groups; the mean of the groups.

    0.0, exactly, where all rows of each group are one. Rows are one where they differ by less than ROUNDING from the
    first of their kind: on a rounded grid, noise at the edge of a cell would pass for information.
    """
    assert observed.isfinite().all()
    groups = torch.arange(len(observed))
    new = torch.ones(observed.shape[:2], dtype=torch.bool)
    nats = torch.zeros(len(observed), dtype=torch.float64)
    while new.any():
        first = observed[groups, new.int().argmax(1)]  # of a group that has none left, any row: nothing is new in it
        same = new & ((observed - first[:, None]).abs().amax(-1) < ROUNDING)
        nats += torch.special.entr(same.double().mean(1))
        new &= ~same
    return nats.mean().item() / math.log(2)


@torch.no_grad()
def observations(
    router: Any, layers: int, *, symbols: int, length: int, observe: Observed, seed: int
) -> Float[Tensor, "B L M"]:
    """What is observed at each position of every sequence, each routed as if it were alone in its batch."""
    model = CausalStack(router, layers, symbols, seed)
    x = model.embed(sequences(symbols, length))
    parts = [x] if promises_of(router).batch_independent else x.split(1)
    observed = []
    for part in parts:
        y, routings = model(part)
        masks = torch.cat([routing.mask().view(*part.shape[:2], E) for routing in routings], -1)
        observed.append({"outputs": y, "masks": masks.double()}[observe])
    return torch.cat(observed)


def leaks(
    router: Any, layers: int = 1, *, symbols: int = 4, length: int = 6, observe: Observed = "outputs", seed: int = 0
) -> list[float]:
    """For t = 1 ... length-1: bits that positions 1..t say about all tokens after t, of (length-t) * log2(symbols)."""
    observed = observations(router, layers, symbols=symbols, length=length, observe=observe, seed=seed)
    return [entropy(observed[:, :t].reshape(symbols**t, symbols ** (length - t), -1)) for t in range(1, length)]


def leak(router: Any, layers: int = 1, **given: Any) -> float:
    """Bits that all earlier positions say about the last token, of log2(symbols); `given` as in `leaks`."""
    return leaks(router, layers, **given)[-1]


def leak_per_token(router: Any, layers: int = 1, *, length: int = 6, **given: Any) -> float:
    """The leak about the next token after 1, 2, ... length-1 tokens, when nothing follows it; their mean."""
    return sum(leak(router, layers, length=t, **given) for t in range(2, length + 1)) / (length - 1)
