"""Encoding in several processes: each holds the model once and runs the batches that it is handed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch

from usmoe.embed.features import Extractor, Features
from usmoe.hf.patch import patch, unpatch
from usmoe.hf.view import view_of
from usmoe.hf.wrapped import unwrapped

_Batch = Sequence[Sequence[int]]


class Workers:
    """Processes that extract features; a context manager that ends them, also after an error or Ctrl-C."""

    def __init__(self, model: Any, extract: Extractor, routers: Any, processes: int) -> None:
        """routers: what the model is to be patched with in each process; None for no patch."""
        bare = unpatch(unwrapped(view_of(model)))  # hooks do not travel; weights are shared, not copied
        self._pool = ProcessPoolExecutor(
            processes,
            mp_context=torch.multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(bare, extract, routers, max(1, torch.get_num_threads() // processes)),
        )
        list(self._pool.map(_ready, range(processes)))  # they start, and are sent the model

    def __call__(self, batches: Sequence[_Batch]) -> Iterator[Features]:
        """The features of each batch, in their order."""
        return self._pool.map(_extract, batches)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: Any) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


_here: dict[str, partial[Features]] = {}
"""In a process of the pool: what it runs."""


def _begin(model: Any, extract: Extractor, routers: Any, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its processes
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    model.eval()
    if routers is not None:
        patch(model, routers)
    _here["extract"] = partial(extract, model)


def _end_with_parent() -> None:
    """A process whose parent was killed would wait for work for ever, and hold the model."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _ready(index: int) -> int:
    return index


def _extract(batch: _Batch) -> Features:
    return _here["extract"](batch)
