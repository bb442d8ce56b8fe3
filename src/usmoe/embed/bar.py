"""A bar that says how much is done; in a process that is forked, too."""

from __future__ import annotations

import os
import threading
from typing import Any

import torch
from tqdm import tqdm
from tqdm.std import TqdmDefaultWriteLock  # pyright: ignore[reportAttributeAccessIssue]


def bar(total: int | None, what: str, unit: str, *, shown: bool, done: int = 0, stays: bool = False) -> tqdm[Any]:
    """A bar on stderr, where that is a terminal and it is to be shown; stays: also when all is done."""
    return tqdm(total=total, initial=done, desc=what, unit=unit, disable=None if shown else True, leave=stays)


def _renew() -> None:
    """Whatever thread held tqdm's lock, also for a bar that is not shown, is not there in the child. The part of it
    that processes share goes, too: taken and given back by the child it would stay taken, and the parent would hang."""
    if isinstance(tqdm.get_lock(), TqdmDefaultWriteLock):  # and not one of the user's own
        TqdmDefaultWriteLock.th_lock = threading.RLock()
        if "mp_lock" in vars(TqdmDefaultWriteLock):
            del TqdmDefaultWriteLock.mp_lock
        tqdm.set_lock(TqdmDefaultWriteLock())
    torch.set_num_threads(1)  # OpenMP's threads are not there either, and a product of several would wait for them


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
