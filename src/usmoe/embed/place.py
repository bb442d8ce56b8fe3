"""Where an encoder's model runs: in a view of its own, so that whoever else has the model sees nothing of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from usmoe.hf.generation import leave_engine
from usmoe.hf.patch import patch, patch_of, unpatch
from usmoe.hf.patch import routers as routers_of
from usmoe.hf.view import view_of
from usmoe.hf.wrapped import unwrapped
from usmoe.routing import OwnChoice


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """A model and the router that it is to run under."""

    model: Any
    router: Any
    """As in usmoe.patch(); None: what the model does by itself, patched or not."""

    @contextlib.contextmanager
    def routed(self, listens: bool) -> Iterator[Any]:
        """The model as it is now, in evaluation mode, under the router: a view, which shares its weights and nothing
        else. So the model itself may run, train, or be patched in other threads meanwhile. Who listens to the model
        (usmoe.record) in this thread hears the view.

        listens: whether its routers must be heard, for which a model under its own choice is patched, too
        """
        view = unwrapped(view_of(self.model)).eval()
        leave_engine(view)
        theirs = routers_of(view)
        if self.router is not None:
            patch(view, self.router)
        elif theirs:  # a patch has one forward at a time, so the view has another with the same routers
            patch(view, theirs)
        elif listens:
            patch(view, OwnChoice())
        state = patch_of(view)
        if state is not None:  # who listens to the model in another thread asked for its own forwards
            state.listeners = [one for one in state.listeners if one.thread == threading.get_ident()]
        try:
            yield view
        finally:
            unpatch(view)  # it holds itself by its patch, and with it the weights

    def routers(self, listens: bool) -> dict[str, Any]:
        """{layer name: router} while the model runs; empty where it is not patched then."""
        with self.routed(listens) as model:
            return routers_of(model)
