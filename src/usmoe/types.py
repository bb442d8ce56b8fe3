"""The values that everything in usmoe consumes: `Routing`, `RouterOutput`, `Promises`.

Axis letters, used in prose, annotations and einsum everywhere:

    B  sequences in a batch      E  experts                 N  routed (token, expert) pairs
    L  tokens in a sequence      K  experts per token (mean) D  model width
    T  tokens in a batch, B*L    G  pools that compete       F  expert width
                                 S  tokens in a pool

The flat index of token l of sequence b is b*L + l.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Budget = Literal["exact", "expected", "capped", "none"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """Which token goes to which expert, and with what weight: what every router returns.

    Pair n sends token `token[n]` to expert `expert[n]` with weight `weight[n]`. Pairs are sorted by expert, then by
    token, so that each expert reads one contiguous slice. A token may appear once, several times or never.
    """

    token: Int[Tensor, " N"]
    """Flat index b*L + l of the token of each pair."""
    expert: Int[Tensor, " N"]
    """Expert of each pair, ascending."""
    weight: Float[Tensor, " N"]
    """Weight of each pair; differentiable with respect to the logits."""
    num_tokens: int
    """T: all tokens of the batch, padding included."""
    num_experts: int
    """E."""
    cut: Float[Tensor, "..."] | None = None
    """Where the selection fell, one value a pool (for expert and bounded choice one a pool and expert, (G, E); of a
    threshold router, its threshold, (1,) or (E,)): midway between the last score that was chosen and the first that was
    not; -inf where all were chosen, +inf where none was."""
    state: Any = None
    """What a streaming router needs to go on with the next chunk; None for routers without memory."""
    valid: Bool[Tensor, " T"] | None = None
    """False for padding; None where every token is real. Metrics count real tokens alone."""
    sequences: int = 1
    """B: into how many sequences of equal length the tokens divide."""

    @property
    def load(self) -> Int[Tensor, " E"]:
        """Tokens that each expert receives."""
        return torch.bincount(self.expert, minlength=self.num_experts)

    @property
    def experts_per_token(self) -> Int[Tensor, " T"]:
        """Experts that each token receives, 0 for a dropped one."""
        return torch.bincount(self.token, minlength=self.num_tokens)

    @property
    def pair(self) -> Int[Tensor, " N"]:
        """token * E + expert: the flat index of each pair in a (T, E) matrix."""
        return self.token * self.num_experts + self.expert

    def mask(self) -> Bool[Tensor, "T E"]:
        """True where a token goes to an expert."""
        flat = torch.zeros(self.num_tokens * self.num_experts, dtype=torch.bool, device=self.token.device)
        flat[self.pair] = True
        return flat.view(self.num_tokens, self.num_experts)

    def dense(self) -> Float[Tensor, "T E"]:
        """Weights as a matrix, 0 where there is no pair; differentiable."""
        flat = self.weight.new_zeros(self.num_tokens * self.num_experts)
        return flat.scatter(0, self.pair, self.weight).view(self.num_tokens, self.num_experts)

    @staticmethod
    def from_dense(
        weights: Float[Tensor, "*tokens E"],
        mask: Bool[Tensor, "*tokens E"],
        *,
        cut: Tensor | None = None,
        state: Any = None,
        valid: Bool[Tensor, "*tokens"] | None = None,
        sequences: int | None = None,
    ) -> Routing:
        """The Routing of a matrix of weights and a matrix that says which pairs are chosen.

        This is the short way to a router of one's own: compute weights (T, E) or (B, L, E), a mask of the same shape,
        and return `Routing.from_dense(weights, mask)`. Weights outside of the mask are not read. Gradients flow to the
        weights of the chosen pairs.

        Raises ValueError where the two shapes differ or the mask is not boolean.
        """
        if weights.shape != mask.shape or weights.ndim < 2:
            raise ValueError(
                f"from_dense() was given weights of shape {tuple(weights.shape)} and a mask of shape "
                f"{tuple(mask.shape)}. Give two matrices of one shape, (T, E) or (B, L, E)."
            )
        if mask.dtype != torch.bool:
            raise ValueError(f"from_dense() was given a mask of dtype {mask.dtype}. Give a boolean one: mask > 0, say.")
        experts = weights.shape[-1]
        if sequences is None:
            sequences = weights.shape[0] if weights.ndim == 3 else 1
        flat_mask = mask.reshape(-1, experts)
        expert, token = flat_mask.T.nonzero().unbind(1)
        weight = weights.reshape(-1).gather(0, token * experts + expert)
        return Routing(
            token=token,
            expert=expert,
            weight=weight,
            num_tokens=flat_mask.shape[0],
            num_experts=experts,
            cut=cut,
            state=state,
            valid=None if valid is None else valid.reshape(-1),
            sequences=sequences,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterOutput:
    """What a MoE layer says beside its output: a loss, a metric or a plot is a function of this value."""

    routing: Routing
    logits: Float[Tensor, "B L E"]
    """What the router ranked: the gate's logits, before any score; differentiable."""
    distilled: Float[Tensor, "B L E"] | None = None
    """Logits of a second router that learns the route of the first (StableMoE); None where nothing is distilled."""


@dataclass(frozen=True, kw_only=True)
class Promises:
    """What a router guarantees, whatever the logits. Property tests hold each router to each of its promises."""

    causal: bool
    """No token's routing depends on a later token of its sequence."""
    batch_independent: bool
    """No token's routing depends on another sequence of its batch."""
    padding_independent: bool
    """Padding changes nothing for the real tokens, wherever it stands and whatever it holds."""
    streamable: bool
    """Routing a sequence in chunks equals routing it whole (with the state passed on, where there is one)."""
    budget: Budget
    """exact: floor(k*S + 0.5) pairs a pool, always; expected: k pairs a token on average; capped: never more than the
    budget; none: no such promise."""


LOOK_AHEAD = Promises(causal=False, batch_independent=False, padding_independent=False, streamable=False, budget="none")
"""What is assumed of a router that does not say: nothing."""


def is_causal(router: Any) -> bool:
    """Whether a router can serve as it is: no token depends on a later one, nor on another sequence of the batch."""
    promises = promises_of(router)
    return promises.causal and promises.batch_independent


def looks_at_one_token(router: Any) -> bool:
    """Whether the route of a token is its own matter, so that nothing need be known of the others: it is the same when
    every token comes alone, and nothing is handed on from one to the next."""
    return is_causal(router) and promises_of(router).streamable and not getattr(router, "remembers", False)


def promises_of(router: Any) -> Promises:
    """The promises that a router carries; none at all for a callable that carries none."""
    return router.promises if makes_promises(router) else LOOK_AHEAD


def makes_promises(router: Any) -> bool:
    """Whether a router says what it guarantees. One that does not counts as one that looks ahead, and may be none."""
    return isinstance(getattr(router, "promises", None), Promises)


SAY_SO = "If it does keep to that, say so: fn.promises = usmoe.Promises(...)."
"""What to do about a router that makes no promises."""
