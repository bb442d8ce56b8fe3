"""`grouped_linear`: one matrix product an expert over contiguous slices of rows, forward and backward.

Autograd over a Python loop would leave one full (E, F, D) gradient buffer an expert behind; here every expert writes
its gradient into its own slice of one buffer. Under torch.compile the same code is an operator of its own, whose sizes
are data that the compiler need not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor


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
    expert without rows gets a zero gradient. Differentiable any number of times, backward, forward (jvp) and under
    torch.func; once under torch.compile. Packed weights get no gradient; of them one expert's matrix exists at a time,
    forward and backward.
    """
    if isinstance(weight, Tensor) and torch.compiler.is_compiling():
        counts = torch.as_tensor(counts)
        out = torch.ops.usmoe.grouped_linear(x, weight, counts)
    else:
        listed = counts.tolist() if isinstance(counts, Tensor) else counts
        out = _GroupedLinear.apply(x, weight, tuple(listed))
    if bias is None:
        return out  # pyright: ignore[reportReturnType]
    repeats = torch.as_tensor(counts, device=x.device)
    return out + bias.to(x.dtype).repeat_interleave(repeats, 0, output_size=len(x))


class _GroupedLinear(torch.autograd.Function):
    """x_e @ weight_e.T for the rows of each expert e: (N, D), (E, F, D) -> (N, F). Packed weights have no gradient."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor | Packed, counts: tuple[int, ...]) -> Tensor:
        return _forward(x, weight, counts)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, ctx.counts = inputs
        ctx.packed = None if isinstance(weight, Tensor) else weight
        kept = (x, weight) if ctx.packed is None else ()
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.contiguous()
        x, weight = ctx.saved_tensors if ctx.packed is None else (None, ctx.packed)
        for_x, for_weight, _ = ctx.needs_input_grad
        grad_x = _GroupedLinear.apply(grad, weight.transpose(1, 2), ctx.counts) if for_x else None
        return grad_x, _GroupedOuter.apply(grad, x, ctx.counts) if for_weight else None, None

    @staticmethod
    def jvp(ctx, x_tangent: Tensor | None, weight_tangent: Tensor | None, _: None) -> Tensor:
        x, weight = ctx.saved_tensors if ctx.packed is None else (None, ctx.packed)
        of_x: Any = 0.0 if x_tangent is None else _GroupedLinear.apply(x_tangent, weight, ctx.counts)
        return of_x + (0.0 if weight_tangent is None else _GroupedLinear.apply(x, weight_tangent, ctx.counts))

    @staticmethod
    def vmap(info, in_dims, x: Tensor, weight: Tensor | Packed, counts: tuple[int, ...]):
        return _one_by_one(_GroupedLinear, info, in_dims, x, weight, counts)


class _GroupedOuter(torch.autograd.Function):
    """grad_e.T @ x_e for the rows of each expert e: (N, F), (N, D) -> (E, F, D), the gradient of its weight."""

    @staticmethod
    def forward(grad: Tensor, x: Tensor, counts: tuple[int, ...]) -> Tensor:
        shape = (len(counts), grad.shape[1], x.shape[1])
        out = x.new_empty(shape) if all(counts) else x.new_zeros(shape)
        for expert, rows in slices(counts):
            torch.mm(grad[rows].T, x[rows], out=out[expert])
        return out

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *kept, ctx.counts = inputs
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx, grad_weight: Tensor):
        grad, x = ctx.saved_tensors
        for_grad, for_x, _ = ctx.needs_input_grad
        grad_grad = _GroupedLinear.apply(x, grad_weight, ctx.counts) if for_grad else None
        return grad_grad, _GroupedLinear.apply(grad, grad_weight.transpose(1, 2), ctx.counts) if for_x else None, None

    @staticmethod
    def jvp(ctx, grad_tangent: Tensor | None, x_tangent: Tensor | None, _: None) -> Tensor:
        grad, x = ctx.saved_tensors
        of_grad: Any = 0.0 if grad_tangent is None else _GroupedOuter.apply(grad_tangent, x, ctx.counts)
        return of_grad + (0.0 if x_tangent is None else _GroupedOuter.apply(grad, x_tangent, ctx.counts))

    @staticmethod
    def vmap(info, in_dims, grad: Tensor, x: Tensor, counts: tuple[int, ...]):
        return _one_by_one(_GroupedOuter, info, in_dims, grad, x, counts)


def _one_by_one(function: Any, info: Any, in_dims: Any, one: Any, other: Any, counts: Any) -> tuple[Tensor, int]:
    """torch.vmap of a product of two: one element of the batch after the other, since the slices are of any length."""
    at = [
        lambda n, x=x, dim=dim: x if dim is None else x.select(dim, n)
        for x, dim in zip((one, other), in_dims[:2], strict=True)
    ]
    return torch.stack([function.apply(at[0](n), at[1](n), counts) for n in range(info.batch_size)]), 0


def _forward(x: Tensor, weight: Tensor | Packed, counts: Sequence[int]) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[1])
    for expert, rows in slices(counts):
        torch.mm(x[rows], weight[expert].T, out=out[rows])
    return out


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
    counts, g = tuple(n.tolist()), g.contiguous()
    return _forward(g, w.transpose(1, 2), counts), _GroupedOuter.forward(g, x, counts)


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
