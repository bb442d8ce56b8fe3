"""Pools: who competes with whom. That is the very idea of the paper, so it is an explicit value, never a reshape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Axis = Literal["sequence", "batch", "time_step", "token"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Pools:
    """G pools as rows of token indices, padded to the largest pool."""

    rows: Int[Tensor, "G S"]
    """Flat token indices, ascending in each row; arbitrary where `present` is False."""
    present: Bool[Tensor, "G S"]
    """True where a token competes."""

    def gather(self, values: Float[Tensor, "T E"]) -> Float[Tensor, "G S E"]:
        """Values of the tokens, arranged by pool."""
        return values.index_select(0, self.rows.reshape(-1)).view(*self.rows.shape, values.shape[-1])

    def scatter(self, values: Tensor, num_tokens: int) -> Tensor:
        """(T, E): the inverse of gather; 0 for tokens that are in no pool. Every token is in one pool at most."""
        flat = values.flatten(0, 1)
        row = self.rows.where(self.present, num_tokens).reshape(-1, 1).expand_as(flat)  # one row more, for the absent
        return flat.new_zeros(num_tokens + 1, flat.shape[-1]).scatter(0, row, flat)[:num_tokens]


def pools(
    axis: Axis,
    batch: int,
    length: int,
    competes: Bool[Tensor, "B L"],
    segments: Int[Tensor, "B L"] | None = None,
) -> Pools:
    """The pools of a batch of B sequences of L tokens.

    sequence   all tokens of a sequence (the paper, Algorithm 1)
    batch      all tokens of the batch
    time_step  the tokens at one position of all sequences (the released Transformer-XL)
    token      each token by itself

    `segments` cuts every pool: tokens compete only with those of the same sequence and the same segment. A pool may
    be empty. Tokens of which `competes` is False are in no pool.
    """
    grid = torch.arange(batch * length, device=competes.device).view(batch, length)
    if segments is not None and axis != "token":
        return _ragged(grid, competes, segments, axis)
    arrange = {
        "sequence": lambda x: x,
        "batch": lambda x: x.reshape(1, -1),
        "time_step": lambda x: x.T,
        "token": lambda x: x.reshape(-1, 1),
    }[axis]
    return Pools(rows=arrange(grid), present=arrange(competes))


def _ragged(grid: Tensor, competes: Tensor, segments: Tensor, axis: Axis) -> Pools:
    """One pool for each (sequence, segment), or (sequence, segment, time step): no pool crosses a packed example."""
    keys = [torch.arange(len(grid), device=grid.device)[:, None].expand_as(grid), segments]
    if axis == "time_step":
        keys.insert(0, torch.arange(grid.shape[1], device=grid.device).expand_as(grid))
    tokens = grid[competes]
    if not len(tokens):
        return Pools(rows=grid[:0, :0], present=competes[:0, :0])
    _, pool = torch.stack([key[competes] for key in keys], 1).unique(dim=0, return_inverse=True)
    order = pool.argsort(stable=True)
    sizes = torch.bincount(pool)
    present = torch.arange(int(sizes.max()), device=grid.device) < sizes[:, None]
    rows = torch.zeros_like(present, dtype=grid.dtype)
    rows[present] = tokens[order]
    return Pools(rows=rows, present=present)
