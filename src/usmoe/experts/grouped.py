"""`grouped_linear`: one matrix product an expert over contiguous slices of rows, forward and backward.

Autograd over a Python loop would leave one full (E, F, D) gradient buffer an expert behind; here every expert writes
its gradient into its own slice of one buffer. Under torch.compile the same code is an operator of its own, whose sizes
are data that the compiler need not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


class Packed(Protocol):
    """Frozen weights (E, F, D) that are kept in fewer bits, and unpacked one expert at a time."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __getitem__(self, expert: int) -> Float[Tensor, "F D"]: ...

    def transpose(self, one: int, other: int) -> Packed: ...

    def to(self, dtype: torch.dtype) -> Packed: ...


def grouped_linear(
    x: Float[Tensor, "N D"],
    weight: Float[Tensor, "E F D"] | Packed,
    counts: Sequence[int] | Int[Tensor, " E"],
    bias: Float[Tensor, "E F"] | None = None,
) -> Float[Tensor, "N F"]:
    """x @ weight[e].T + bias[e] for the rows of each expert e.

    x is sorted by expert; counts[e] rows belong to expert e and sum to N. Gradients flow to x, weight and bias; an
    expert without rows gets a zero gradient. Differentiable once. Packed weights get no gradient; of them one expert's
    matrix exists at a time, forward and backward.
    """
    if not isinstance(weight, Tensor):
        listed = counts.tolist() if isinstance(counts, Tensor) else counts
        out = _UnpackedLinear.apply(x, weight, tuple(listed))
    elif torch.compiler.is_compiling():
        counts = torch.as_tensor(counts)
        out = torch.ops.usmoe.grouped_linear(x, weight, counts)
    else:
        listed = counts.tolist() if isinstance(counts, Tensor) else counts
        out = _GroupedLinear.apply(x, weight, tuple(listed))
    if bias is None:
        return out  # pyright: ignore[reportReturnType]
    repeats = torch.as_tensor(counts, device=x.device)
    return out + bias.to(x.dtype).repeat_interleave(repeats, 0, output_size=len(x))


class _UnpackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Packed, counts: tuple[int, ...]) -> Tensor:
        ctx.weight, ctx.counts, ctx.width = weight, counts, x.shape[1]
        return _forward(x, weight, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grad = grad.contiguous()
        grad_x = grad.new_empty(len(grad), ctx.width)
        for expert, rows in slices(ctx.counts):
            torch.mm(grad[rows], ctx.weight[expert], out=grad_x[rows])
        return grad_x, None, None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        return _forward(x, weight, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        return *_backward(grad, x, weight, ctx.counts, *ctx.needs_input_grad[:2]), None


def _forward(x: Tensor, weight: Tensor | Packed, counts: Sequence[int]) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[1])
    for expert, rows in slices(counts):
        torch.mm(x[rows], weight[expert].T, out=out[rows])
    return out


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, counts: Sequence[int], for_x: bool = True, for_weight: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    grad = grad.contiguous()
    grad_x = torch.empty_like(x) if for_x else None
    grad_weight = None
    if for_weight:
        grad_weight = torch.empty_like(weight) if all(counts) else torch.zeros_like(weight)
    for expert, rows in slices(counts):
        if grad_x is not None:
            torch.mm(grad[rows], weight[expert], out=grad_x[rows])
        if grad_weight is not None:
            torch.mm(grad[rows].T, x[rows], out=grad_weight[expert])
    return grad_x, grad_weight


def slices(counts: Sequence[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) for every expert that has rows."""
    ends = list(accumulate(counts))
    return [(e, slice(end - count, end)) for e, (end, count) in enumerate(zip(ends, counts, strict=True)) if count]


@torch.library.custom_op("usmoe::grouped_linear", mutates_args=(), schema="(Tensor x, Tensor w, Tensor n) -> Tensor")
def _operator(x, w, n):
    return _forward(x, w, n.tolist())


@torch.library.custom_op(
    "usmoe::grouped_linear_backward",
    mutates_args=(),
    schema="(Tensor g, Tensor x, Tensor w, Tensor n) -> (Tensor, Tensor)",
)
def _operator_backward(g, x, w, n):
    return _backward(g, x, w, n.tolist())


@_operator.register_fake
def _(x, w, n):
    return x.new_empty(x.shape[0], w.shape[1])


@_operator_backward.register_fake
def _(g, x, w, n):
    return torch.empty_like(x), torch.empty_like(w)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _operator_gradient(ctx, grad):
    return *torch.ops.usmoe.grouped_linear_backward(grad, *ctx.saved_tensors), None


_operator.register_autograd(_operator_gradient, setup_context=_keep)
