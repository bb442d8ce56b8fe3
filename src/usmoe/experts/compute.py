"""The output of the experts for a Routing: gather, project up, activate, project down, weigh, add up."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from usmoe.experts.grouped import Packed, grouped_linear, slices
from usmoe.types import Routing

Activation = Callable[[Tensor], Tensor]
"""From the up projection of a pair to its hidden value: (N, 2F) -> (N, F) where it is gated, else (N, F) -> (N, F)."""


_CACHE = 4 * 2**20
"""Bytes of hidden values beyond which they no longer stay in a processor's cache."""


def experts_by_loop(
    x: Float[Tensor, "T D"],
    routing: Routing,
    up: Float[Tensor, "E H D"],
    down: Float[Tensor, "E D F"],
    activation: Activation,
    up_bias: Float[Tensor, "E H"] | None = None,
    down_bias: Float[Tensor, "E D"] | None = None,
) -> Float[Tensor, "T D"]:
    """The oracle: one pair after the other, in plain autograd. For tests, not for use."""
    rows = [torch.zeros_like(x[0]) for _ in range(len(x))]
    for token, expert, weight in zip(routing.token.tolist(), routing.expert.tolist(), routing.weight, strict=True):
        hidden = activation(F.linear(x[token], up[expert], None if up_bias is None else up_bias[expert]))
        out = F.linear(hidden, down[expert], None if down_bias is None else down_bias[expert])
        rows[token] = rows[token] + out * weight.to(out.dtype)
    return torch.stack(rows) if rows else torch.zeros_like(x)


def experts_by_pairs(
    x: Float[Tensor, "T D"],
    routing: Routing,
    up: Float[Tensor, "E H D"] | Packed,
    down: Float[Tensor, "E D F"] | Packed,
    activation: Activation,
    up_bias: Float[Tensor, "E H"] | None = None,
    down_bias: Float[Tensor, "E D"] | None = None,
    finish: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "T D"]:
    """The fast path: every expert multiplies its contiguous slice of the pairs.

    Memory grows with the N pairs, whatever their number a token; there is no buffer of T*Kmax. Under autocast the
    products run in its dtype. The output has the dtype of the products. `finish` is applied to the output (N, D)
    of each pair before it is weighed (a norm, in some models).
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, up, down = x.to(dtype), up.to(dtype), down.to(dtype)
    elif x.dtype != up.dtype:
        x = x.to(up.dtype)
    counts = routing.load if torch.compiler.is_compiling() else routing.load.tolist()
    wide = len(routing.token) * up.shape[1] * x.element_size()
    if isinstance(counts, list) and not torch.is_grad_enabled() and x.device.type == "cpu" and wide > _CACHE:
        return _expert_after_expert(x, routing, counts, up, down, activation, up_bias, down_bias, finish)
    gathered = x.index_select(0, routing.token)
    hidden = activation(grouped_linear(gathered, up, counts, up_bias))
    out = grouped_linear(hidden, down, counts, down_bias)
    out = out if finish is None else finish(out)
    return combine(out, routing.weight, routing.token, len(x))


def _expert_after_expert(
    x: Tensor,
    routing: Routing,
    counts: list[int],
    up: Tensor | Packed,
    down: Tensor | Packed,
    activation: Activation,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    finish: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """The same without gradients, in buffers of one expert's tokens: what fits in a cache need not be fetched again,
    and memory that was just freed need not be mapped anew."""
    total = x.new_zeros(len(x), down.shape[1])
    for expert, rows in slices(counts):
        token = routing.token[rows]
        hidden = F.linear(
            x.index_select(0, token), up[expert], None if up_bias is None else up_bias[expert].to(x.dtype)
        )
        out = F.linear(activation(hidden), down[expert], None if down_bias is None else down_bias[expert].to(x.dtype))
        out = out if finish is None else finish(out)
        total.index_add_(0, token, out.mul_(routing.weight[rows].to(out.dtype).unsqueeze(-1)))
    return total


def combine(
    out: Float[Tensor, "N D"], weight: Float[Tensor, " N"], token: Int[Tensor, " N"], num_tokens: int
) -> Float[Tensor, "T D"]:
    """The weighted sum of the outputs of each token's pairs; 0 for a token without one."""
    factors = weight.to(out.dtype).unsqueeze(-1)
    weighted = out * factors if torch.is_grad_enabled() else out.mul_(factors)  # fresh memory costs as much as the work
    return out.new_zeros(num_tokens, out.shape[-1]).index_add(0, token, weighted)


def swiglu(x: Float[Tensor, "N H"]) -> Float[Tensor, "N F"]:
    """silu(gate) * up, of the two halves of x (Shazeer 2020, arXiv 2002.05202)."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


ACTIVATIONS: dict[str, Activation] = {"swiglu": swiglu, "relu": F.relu}
"""Activations by name."""

GATED = frozenset({"swiglu"})
"""Those that halve the width."""


def up_width(activation: str, d_ff: int) -> int:
    """Rows of the up projection of an expert of width d_ff. Raises ValueError for an activation that is not known."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"There is no activation {activation!r}. Known: {', '.join(ACTIVATIONS)}.")
    return d_ff * (2 if activation in GATED else 1)


def refuse_no_size(**sizes: int) -> None:
    """Raise ValueError for a size below 1, by its name."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value} is impossible. Give at least 1.")
