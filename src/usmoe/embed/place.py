"""Where an encoder's model runs: under its router for as long as it is needed, one thread at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from usmoe.hf.patch import patch, patch_of, patched
from usmoe.hf.wrapped import unwrapped
from usmoe.layers.mode import evaluating
from usmoe.routing import OwnChoice

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_MAKING = threading.Lock()


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """A model and the router that it is to run under."""

    model: Any
    router: Any
    """As in usmoe.patch(); None: what the model does by itself, patched or not."""
    kept: bool
    """Whether the patch stays: so for a model that nobody else has. One of the user's own is patched while it runs."""

    @contextlib.contextmanager
    def routed(self, listens: bool) -> Iterator[None]:
        """The model under the router, in evaluation mode, and as it was afterwards; other threads wait.

        listens: whether its routers must be heard, for which a model under its own choice is patched, too
        """
        inner = unwrapped(self.model)
        with _lock_of(inner), evaluating(inner):
            if self.router is None and (not listens or patch_of(inner) is not None):
                yield
            elif self.kept:
                if patch_of(inner) is None:
                    patch(inner, self._chosen)
                yield
            else:
                with patched(inner, self._chosen):
                    yield

    def routers(self, listens: bool) -> dict[str, Any]:
        """{layer name: router} while the model runs; empty where it is not patched then."""
        with self.routed(listens):
            state = patch_of(self.model)
            layers = [] if state is None else state.layers
            return {layer.name: router for layer, router in zip(layers, state.routers if state else (), strict=True)}

    @property
    def _chosen(self) -> Any:
        return OwnChoice() if self.router is None else self.router


def _lock_of(model: nn.Module) -> threading.RLock:
    """One lock a model, whatever encoders there are of it."""
    with _MAKING:
        return _LOCKS.setdefault(model, threading.RLock())
