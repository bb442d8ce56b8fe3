"""What routers remember between two forwards, kept where the keys and values are: in the cache.

So it goes where the cache goes: it is reordered with it by beam search, repeated, selected, copied and dropped with it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ATTRIBUTE = "_usmoe_memory"


@dataclass(kw_only=True, eq=False)
class Memory:
    """The states of a model's routers after `length` tokens."""

    routers: list[Any]
    """Whose states these are."""
    length: int
    """Positions in the cache, padding included."""
    states: dict[str, Any]
    """By layer."""


class _Remembering:
    """A cache that carries a Memory; mixed into the class of a cache that a router with memory meets."""

    is_croppable = False

    def _select(self, index: Tensor) -> None:
        memory: Memory = getattr(self, _ATTRIBUTE)
        memory.states = {name: _selected(state, index, name) for name, state in memory.states.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # pyright: ignore[reportAttributeAccessIssue]
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # pyright: ignore[reportAttributeAccessIssue]
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # pyright: ignore[reportAttributeAccessIssue]
        memory: Memory = getattr(self, _ATTRIBUTE)
        if memory.states:
            first = next(iter(memory.states.values()))
            rows = len(getattr(first, "tokens", first))
            self._select(torch.arange(rows).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            memory: Memory = getattr(self, _ATTRIBUTE)
            raise ValueError(
                f"{memory.routers[0]} remembers the tokens before, and what it has spent on a token cannot be taken "
                "back: assisted decoding, which drops tokens again, does not work under it. Use a threshold without "
                "burst, or generate without an assistant."
            )
        super().crop(tokens_to_remove)  # pyright: ignore[reportAttributeAccessIssue]

    def reset(self) -> None:
        super().reset()  # pyright: ignore[reportAttributeAccessIssue]
        memory: Memory = getattr(self, _ATTRIBUTE)
        memory.states, memory.length = {}, 0


@functools.cache
def _remembering(kind: type) -> type:
    return type(kind.__name__, (_Remembering, kind), {})


def recall(cache: Any, routers: list[Any]) -> dict[str, Any]:
    """The states with which the routers of a model go on, by layer; empty at the beginning of a sequence.

    Raises ValueError where the cache holds tokens that these routers have not seen.
    """
    length = cached_length(cache)
    memory: Memory | None = getattr(cache, _ATTRIBUTE, None)
    if not length:
        return {}
    if memory is None or memory.length != length or memory.routers != routers:
        for router in routers:
            if getattr(router, "remembers", False):
                raise ValueError(
                    f"{router} remembers the tokens before, and this cache holds {length} tokens that it has not seen. "
                    "Begin with an empty cache, or use pool=threshold without burst."
                )
        return {}
    return memory.states


def remember(cache: Any, routers: list[Any], states: Mapping[str, Any]) -> None:
    """Leave the states in the cache, for the next forward."""
    if not isinstance(cache, _Remembering):
        cache.__class__ = _remembering(type(cache))
    setattr(cache, _ATTRIBUTE, Memory(routers=routers, length=cached_length(cache) or 0, states=dict(states)))


def refuse_continuous_batching(remembering: Iterable[Any]) -> None:
    """Raise ValueError for a router that remembers: transformers' engine says which tokens are those of one request,
    and not of which; and what a request has in common with another it does not run again."""
    for router in remembering:
        raise ValueError(
            f"{router} remembers the tokens before, and transformers' continuous batching does not say which request "
            "is which: it cannot go on with what it has spent on each. Use a threshold without burst, or generate()."
        )


def is_cache(value: Any) -> bool:
    """Whether a value is a cache of keys and values that can go on."""
    return hasattr(value, "get_seq_length") and hasattr(value, "reorder_cache")


def cached_length(cache: Any, layer: int = 0) -> int | None:
    """How many tokens a cache holds of a layer; 0 for None, and None for one that does not count (of linear attention
    alone)."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length(layer))
    except (AttributeError, ValueError):  # transformers' word for a cache without attention layers
        return None


def _selected(state: Any, index: Tensor, name: str) -> Any:
    """The state of the sequences of that index, in that order."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return state.index_select(0, index.to(state.device))
    if hasattr(state, "select"):
        return state.select(index)
    raise TypeError(
        f"The router of {name} keeps a {type(state).__name__}, and usmoe cannot put it into another order for beam "
        "search. Give it a method select(index), or generate without beams."
    )
