"""Arrays of tokens as numpy files of unknown length: written piece by piece, read memory-mapped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt

Tokens = UInt[np.ndarray, "tokens"]
"""A corpus, of the smallest unsigned type that holds the vocabulary."""

_HEADER = 128
"""Bytes before the first token, at which the array is aligned for a memory map."""


@contextlib.contextmanager
def writing(path: Path, size: int) -> Iterator[Callable[[Int[np.ndarray, "more"]], None]]:
    """A function that appends tokens to a new .npy file of ids below `size`. The file is whole after the with block."""
    dtype = np.min_scalar_type(size - 1)
    length = 0
    with path.open("wb") as file:
        file.write(bytes(_HEADER))

        def write(tokens: Int[np.ndarray, "more"]) -> None:
            nonlocal length
            length += len(tokens)
            file.write(tokens.astype(dtype, copy=False).tobytes())

        yield write
        file.seek(0)
        file.write(_header(dtype, length))


def reading(path: Path, length: int) -> Tokens:
    """The tokens of a file, memory-mapped. Raises ValueError where they are not as many as were written."""
    tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    if len(tokens) != length:
        raise ValueError(f"{path.name} holds {len(tokens)} tokens, and {length} were written")
    return tokens


def _header(dtype: np.dtype, length: int) -> bytes:
    """Of a one-dimensional array, version 1.0 (numpy.lib.format), filled up with spaces."""
    said = f"{{'descr': '{dtype.newbyteorder('=').str}', 'fortran_order': False, 'shape': ({length},), }}"
    start = b"\x93NUMPY\x01\x00" + (_HEADER - 10).to_bytes(2, "little")
    return start + said.encode().ljust(_HEADER - 11) + b"\n"
