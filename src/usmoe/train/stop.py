"""What a run does when it is stopped: it ends a step, and keeps where its random numbers are."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Stopped(Exception):  # noqa: N818
    """A long reading was left because a stop was asked for; nothing is lost by it."""


@contextmanager
def stoppable() -> Iterator[threading.Event]:
    """Set by Ctrl-C or SIGTERM, so that a step is finished and saved; a second Ctrl-C stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt("what came after the last checkpoint is lost.")
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def random_states(device: torch.device) -> dict[str, Tensor | None]:
    """Where torch's generators are, of the CPU and of the GPU that is used; for a checkpoint."""
    return {
        "random": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Go on from there."""
    torch.set_rng_state(states["random"].cpu())
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
