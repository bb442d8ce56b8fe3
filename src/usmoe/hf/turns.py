"""Whoever patches a model, takes a patch off, or looks at all of its modules does so alone."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])

_TURN = threading.RLock()


def one_at_a_time(function: _Function) -> _Function:
    """The function, of which, and of all others that are so marked, one runs at a time in a process."""

    @functools.wraps(function)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with _TURN:
            return function(*args, **kwargs)

    return alone  # pyright: ignore[reportReturnType]


# A process that is forked while another thread holds the lock would wait for a thread that it does not have. So a fork
# waits for the lock, and no child begins with a model that is half patched.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_TURN.acquire, after_in_parent=_TURN.release, after_in_child=_TURN.release)
