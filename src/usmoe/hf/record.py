"""`record`: what every layer's router says while a model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedModel

from usmoe.hf.patch import listening, patch_of, patched
from usmoe.routing import OwnChoice
from usmoe.types import RouterOutput, Routing


class Trace(Mapping[str, list[RouterOutput]]):
    """{layer name: [RouterOutput, ...]}, one RouterOutput for each forward of the model.

    with usmoe.record(model) as trace:
        model(tokens)
    trace.last["model.layers.0.mlp"].routing
    """

    def __init__(self, names: list[str]) -> None:
        self._said: dict[str, list[RouterOutput]] = {name: [] for name in names}

    def __getitem__(self, name: str) -> list[RouterOutput]:
        return self._said[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._said)

    def __len__(self) -> int:
        return len(self._said)

    @property
    def last(self) -> dict[str, RouterOutput]:
        """What each layer said at the last forward; layers that have not run yet are left out."""
        return {name: said[-1] for name, said in self._said.items() if said}

    @property
    def routings(self) -> dict[str, list[Routing]]:
        """The Routing of every layer and forward."""
        return {name: [one.routing for one in said] for name, said in self._said.items()}

    @property
    def logits(self) -> dict[str, list[Any]]:
        """The logits (B, L, E) of every layer and forward."""
        return {name: [one.logits for one in said] for name, said in self._said.items()}

    def clear(self) -> None:
        """Forget all forwards, for long runs that read `last` after each."""
        for said in self._said.values():
            said.clear()


@contextlib.contextmanager
def record(model: PreTrainedModel) -> Iterator[Trace]:
    """A Trace of every forward in the with block: the Routing and the logits of every MoE layer.

    A model that is not patched is recorded under its own choice, through our path. Tensors are kept as they are, graph
    included: run under torch.no_grad() unless gradients are wanted.
    """
    with contextlib.ExitStack() as stack:
        if patch_of(model) is None:
            stack.enter_context(patched(model, OwnChoice()))
        state = patch_of(model)
        assert state is not None
        trace = Trace([layer.name for layer in state.layers])

        def listen(name: str, said: RouterOutput) -> None:
            trace[name].append(said)

        with listening(model, listen):
            yield trace
