"""`grouped_linear`: one matrix product an expert over contiguous slices of rows, forward and backward.

Autograd over a Python loop would leave one full (E, F, D) gradient buffer an expert behind; here every expert writes
its gradient into its own slice of one buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        out = x.new_empty(x.shape[0], weight.shape[1])
        for expert, rows in slices(counts):
            torch.mm(x[rows], weight[expert].T, out=out[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            full = all(ctx.counts)
            grad_weight = torch.empty_like(weight) if full else torch.zeros_like(weight)
        for expert, rows in slices(ctx.counts):
            if grad_x is not None:
                torch.mm(grad[rows], weight[expert], out=grad_x[rows])
            if grad_weight is not None:
                torch.mm(grad[rows].T, x[rows], out=grad_weight[expert])
        return grad_x, grad_weight, None


def grouped_linear(
    x: Float[Tensor, "N D"],
    weight: Float[Tensor, "E F D"],
    counts: Sequence[int],
    bias: Float[Tensor, "E F"] | None = None,
) -> Float[Tensor, "N F"]:
    """x @ weight[e].T + bias[e] for the rows of each expert e.

    x is sorted by expert; counts[e] rows belong to expert e and sum to N. Gradients flow to x, weight and bias; an
    expert without rows gets a zero gradient. Differentiable once.
    """
    counts = tuple(counts)
    out = _GroupedLinear.apply(x, weight, counts)
    if bias is None:
        return out  # pyright: ignore[reportReturnType]
    repeats = torch.tensor(counts, device=x.device)
    return out + bias.to(out.dtype).repeat_interleave(repeats, 0, output_size=len(x))  # pyright: ignore


def slices(counts: Sequence[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) for every expert that has rows."""
    ends = list(accumulate(counts))
    return [(e, slice(end - count, end)) for e, (end, count) in enumerate(zip(ends, counts, strict=True)) if count]
