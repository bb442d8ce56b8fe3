"""A processor that exists nowhere: products whose order of summation is another one for each shape.

Which order a product is summed in depends on the processor, on the number of threads, on the number of rows (on many
processors) and on where the factors lie in memory (their distance from a multiple of 64 bytes); a test that asks for
equal bits of products of other shapes passes or fails by the machine it runs on. Here such a test fails on every
machine. The same operation on the same shapes at like places gives the same bits, as everywhere, and a sum that is
exact in any order (of zeros, of small whole numbers, of copies) stays so.

`pytest --sums by-shape` installs it (conftest.py).
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_KERNELS: list[torch.library.Library] = []
"""Kernels are unregistered when their library is collected."""


@functools.cache
def order(inner: int, *others: int) -> Tensor:
    """The order in which `inner` products are summed: a permutation that the other numbers decide."""
    random = torch.Generator().manual_seed(hash((inner, *others)) % 2**31)
    with torch.inference_mode(False):
        return torch.randperm(inner, generator=random, device="cpu")


def _product(one: Tensor, other: Tensor, *, add: Tensor | None = None, beta: Any = 1, alpha: Any = 1) -> Tensor:
    """beta * add + alpha * one @ other of (B, M, K) and (B, K, N), through the one kernel that is not replaced."""
    places = (factor.data_ptr() % 64 for factor in (one, other))
    by = order(one.shape[2], one.shape[0], one.shape[1], other.shape[2], *places)
    shape = one.shape[0], one.shape[1], other.shape[2]
    into = one.new_zeros(()) if add is None else add
    return torch.baddbmm(into.expand(shape), one[:, :, by], other[:, by], beta=0 if add is None else beta, alpha=alpha)


def _written(found: Tensor, out: Tensor) -> Tensor:
    return out.resize_(found.shape).copy_(found) if out.shape != found.shape else out.copy_(found)


def _mm(one: Tensor, other: Tensor) -> Tensor:
    return _product(one[None], other[None])[0]


def _mm_out(one: Tensor, other: Tensor, *, out: Tensor) -> Tensor:
    return _written(_mm(one, other), out)


def _addmm(add: Tensor, one: Tensor, other: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return _product(one[None], other[None], add=add, beta=beta, alpha=alpha)[0]


def _addmm_out(add: Tensor, one: Tensor, other: Tensor, *, beta: Any = 1, alpha: Any = 1, out: Tensor) -> Tensor:
    return _written(_addmm(add, one, other, beta=beta, alpha=alpha), out)


def _bmm(one: Tensor, other: Tensor) -> Tensor:
    return _product(one, other)


def _bmm_out(one: Tensor, other: Tensor, *, out: Tensor) -> Tensor:
    return _written(_bmm(one, other), out)


def install() -> None:
    """Replace the products of the CPU, and let attention multiply queries and keys in an order of their shapes."""
    if _KERNELS:
        return
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*Overriding a previously registered kernel")
        for name, kernel in {
            "mm": _mm,
            "mm.out": _mm_out,
            "addmm": _addmm,
            "addmm.out": _addmm_out,
            "bmm": _bmm,
            "bmm.out": _bmm_out,
        }.items():
            library.impl(name, kernel, "CPU")
    _KERNELS.append(library)
    attention = functional.scaled_dot_product_attention

    @functools.wraps(attention)
    def by_shape(query: Tensor, key: Tensor, *given: Any, **named: Any) -> Tensor:
        if torch.compiler.is_compiling():  # an order is no part of a graph
            return attention(query, key, *given, **named)
        by = order(query.shape[-1], *query.shape[:-1], *key.shape[:-1])
        return attention(query[..., by], key[..., by], *given, **named)

    functional.scaled_dot_product_attention = by_shape
