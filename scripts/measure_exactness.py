"""What share of like computations has other bits, and how far apart they lie: the figures of docs/exactness.md.

python scripts/measure_exactness.py
ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 python scripts/measure_exactness.py
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn.functional import linear

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SHAPES = list(itertools.product((2, 3, 7, 16, 33, 130), (3, 8, 31, 64, 257), (1, 4, 17, 64, 129)))
"""Rows, width that is summed over, outputs."""


def elsewhere(x: Tensor) -> Tensor:
    """A copy that begins three elements behind a multiple of 64 bytes."""
    room = torch.empty(x.numel() + 3, dtype=x.dtype)[3:].view(x.shape)
    return room.copy_(x)


def compare(pairs: list[tuple[Tensor, Tensor]]) -> str:
    """How many pairs have other bits, and the largest difference over the largest value."""
    apart = [(one.double() - other.double()).abs().max() / one.double().abs().max() for one, other in pairs]
    differ = sum(not torch.equal(one, other) for one, other in pairs)
    return f"{differ} of {len(pairs)}, by {max(apart).item():.1e} at most"


def main() -> None:
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    for dtype in DTYPES:
        random = torch.Generator().manual_seed(0)
        rows, places, again, layouts = [], [], [], []
        for length, width, outputs in SHAPES:
            x, weight = (torch.randn(n, width, generator=random).to(dtype) for n in (length, outputs))
            whole = linear(x, weight)
            again.append((whole, linear(x.clone(), weight.clone())))
            rows.append((whole[: length // 2], linear(x[: length // 2], weight)))
            places.append((whole, linear(x, elsewhere(weight))))
            layouts.append((whole.sigmoid(), whole.T.contiguous().T.sigmoid()))
        print(f"{dtype}\n  the same again: {compare(again)}\n  half of the rows: {compare(rows)}")
        print(f"  weights elsewhere in memory: {compare(places)}\n  sigmoid of another layout: {compare(layouts)}")


if __name__ == "__main__":
    main()
