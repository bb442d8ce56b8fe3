"""How far apart two computations of one value may lie, and how far apart a leak lies.

Equal to the bit, on every processor: what is copied, counted, chosen or whole; an exact zero times anything; the same
operation on the same shapes at like places in memory, with as many threads. All else that is a product or a sum is
equal to rounding: over another number of rows, in another batch, from weights that lie elsewhere (docs/exactness.md).
Where a test asserts that nothing leaks, it shows that a leak is far beyond: `assert_leaks`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROUNDINGS = 64
"""Enough for two layers of the widths that stand in tests: errors of a sum grow with the root of its length."""

LEAK = 1000
"""A leak is so many times larger than what rounding may do."""


def tolerance(expected: Tensor, roundings: int = ROUNDINGS, dtype: torch.dtype | None = None) -> float:
    """So many roundings of the largest value, in the dtype that it was computed in (None: its own)."""
    largest = expected.detach().abs().max().item() if expected.numel() else 0.0
    return roundings * torch.finfo(dtype or expected.dtype).eps * largest


def assert_to_rounding(
    found: Any, expected: Any, roundings: int = ROUNDINGS, *, dtype: torch.dtype | None = None
) -> None:
    """Equal but for the order in which sums were added up: tensors or arrays of one dtype and shape."""
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance(expected, roundings, dtype))


def assert_leaks(found: Any, expected: Any, roundings: int = ROUNDINGS) -> None:
    """The positive control of `assert_to_rounding`: another value, by far more than rounding."""
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    moved = (found - expected).abs().max().item()
    assert moved > LEAK * tolerance(expected, roundings), moved
