"""Bounds of the linear program: how many pairs each token, each expert and the whole may have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Bounds:
    """Bounds of G programs of S tokens and E experts, feasible and within what there is: 0 <= floor <= cap <= E for a
    token, and <= S for an expert."""

    tokens: tuple[Int[Tensor, "G S"], Int[Tensor, "G S"]]
    """Floors and caps."""
    experts: tuple[Int[Tensor, "G E"], Int[Tensor, "G E"]]
    """Floors and caps."""
    budget: Int[Tensor, " G"] | None
    """Pairs in all; None: as many as pay."""

    def bind_tokens(self) -> bool:
        """Whether any token is bound to anything."""
        floors, caps = self.tokens
        return bool((floors > 0).any() or (caps < self.experts[0].shape[1]).any())

    def bind_experts(self) -> bool:
        """Whether any expert is bound to anything."""
        floors, caps = self.experts
        return bool((floors > 0).any() or (caps < self.tokens[0].shape[1]).any())

    def of(self, rows: Tensor) -> Bounds:
        """The bounds of some of the programs."""
        return Bounds(
            tokens=(self.tokens[0][rows], self.tokens[1][rows]),
            experts=(self.experts[0][rows], self.experts[1][rows]),
            budget=None if self.budget is None else self.budget[rows],
        )

    def conflict(self) -> str | None:
        """Why the bounds of the first program cannot be met, in a sentence with the numbers; None where they can.

        The program is a flow from the tokens to the experts, so Hoffman's circulation theorem (1960) says when: for
        every set of tokens and every set of experts, what one side must send is at most what the other may take. For a
        given number of experts the worst set is found by sorting, and the worst tokens one by one: S*E comparisons.
        """
        (token_low, token_high), (expert_low, expert_high) = (
            (side[0][0].long(), side[1][0].long()) for side in (self.tokens, self.experts)
        )
        tokens, experts = len(token_low), len(expert_low)
        budget = None if self.budget is None else int(self.budget[0])
        if budget is not None and not 0 <= budget <= tokens * experts:
            return f"{tokens} tokens x {experts} experts have 0 to {tokens * experts} pairs, and the budget is {budget}"
        size = torch.arange(experts + 1, device=token_low.device)
        # of j experts: the j with the highest floors must get most, the j with the lowest caps can get least
        must = _running(expert_low.sort(descending=True).values)
        may = _running(expert_high.sort().values)
        # tokens beside j experts: over and above one pair with each of those
        over = (token_low[:, None] - size).clamp(min=0).sum(0)
        room = token_high[:, None].minimum(size).sum(0)
        short = must - room
        if (short > 0).any():
            j = int(short.argmax())
            return (
                f"{j} of the {experts} experts must get {int(must[j])} pairs, and the {tokens} tokens may give them "
                f"{int(room[j])}"
            )
        short = over.flip(0) - may  # j experts of the lowest caps; the tokens have the other experts - j whole
        if (short > 0).any():
            j = int(short.argmax())
            return (
                f"the tokens must have {int(over[experts - j])} pairs beyond one with each of {experts - j} experts, "
                f"and the other {j} experts may take {int(may[j])}"
            )
        if budget is None:
            return None
        least = must + over
        if (least > budget).any():
            j = int(least.argmax())
            return f"the floors ask for at least {int(least[j])} pairs, and the budget is {budget}"
        most = room.flip(0) + may
        if (most < budget).any():
            j = int(most.argmin())
            return f"the caps allow at most {int(most[j])} pairs, and the budget is {budget}"
        return None


def _running(values: Int[Tensor, " E"]) -> Int[Tensor, " E+1"]:
    """Sums of the first 0, 1, 2, ... values."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)])
