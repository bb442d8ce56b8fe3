"""What all routers share: a frozen value that is its own configuration, checked when made, and a text form."""

from __future__ import annotations

import abc
import dataclasses
import functools
import numbers
import re
import types
import typing
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from usmoe.routing.host import ROUTE, Host
from usmoe.routing.scores import in_float32_at_least
from usmoe.types import Promises, Routing

Segments = Int[Tensor, "B L"] | None

Experts = float | str | None
"""Experts a token: a number, "0.75x" of the host's, or None for the host's."""

_TIMES_HOST = re.compile(r"(\d+\.?\d*|\.\d+)x")


class Router(abc.ABC):
    """The text form, the dictionary form and the checks of a router's fields."""

    name: ClassVar[str]
    """The name in text: usmoe, token_choice, ..."""

    @property
    @abc.abstractmethod
    def promises(self) -> Promises:
        """What the router guarantees, whatever the logits."""

    @property
    def heeds_bias(self) -> bool:
        """Whether the host's bias moves what competes: not where the router brings a score of its own."""
        return False

    @abc.abstractmethod
    def __call__(
        self,
        logits: Float[Tensor, "B L E"],
        valid: Bool[Tensor, "B L"] | None = None,
        *,
        segments: Segments = None,
        state: Any = None,
        host: Host = ROUTE,
    ) -> Routing:
        """The Routing of a batch. Logits are not checked here, but in `usmoe.route()`."""

    def __str__(self) -> str:
        """The fields that differ from their defaults, in a form that parse_router reads."""
        given = [
            f"{field.name}={_as_text(getattr(self, field.name))}"
            for field in dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
            if getattr(self, field.name) != field.default
        ]
        return f"{self.name}({', '.join(given)})" if given else self.name

    def to_dict(self) -> dict[str, Any]:
        """All fields and the router's name, ready for JSON; `parse_router` reads it back."""
        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
        values = {field.name: getattr(self, field.name) for field in fields}
        return {"router": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def _check(self) -> None:
        """Refuse a value outside of a closed choice, and a k that cannot be one."""
        for name, known in _closed_choices(type(self)).items():
            if getattr(self, name) not in known:
                listed = ", ".join(str(value) for value in known)
                raise ValueError(f"{self.name} does not know {name}={getattr(self, name)!r}. Choose one of: {listed}.")
        k = getattr(self, "k", None)
        if isinstance(k, numbers.Real) and not isinstance(k, int | float):  # a numpy scalar, say
            k = int(k) if isinstance(k, numbers.Integral) else float(k)
            object.__setattr__(self, "k", k)
        if isinstance(k, str):
            if not _TIMES_HOST.fullmatch(k) or float(k[:-1]) <= 0:
                raise ValueError(f'k={k!r} is not a budget. Give a number above 0, or a text such as "0.75x".')
        elif k is not None and (isinstance(k, bool) or not isinstance(k, int | float) or not 0 < k < float("inf")):
            raise ValueError(f"A budget of k={k!r} experts per token is impossible. Give a number above 0.")


@functools.cache
def _closed_choices(router: type) -> dict[str, tuple[Any, ...]]:
    """The values that each field with a closed choice of them may have."""
    found = {name: _choices(hint) for name, hint in typing.get_type_hints(router).items()}
    return {name: known for name, known in found.items() if known}


def _choices(hint: Any) -> tuple[Any, ...]:
    """The values of a Literal, or of a Literal | None; empty for any other annotation."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = typing.get_args(hint)
        inner = [value for part in parts for value in _choices(part)]
        return (*inner, None) if inner and type(None) in parts else ()
    return ()


def _as_text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_as_text, value))}{',' if len(value) == 1 else ''})"
    return str(value)


def refuse_what_is_no_router(router: Any) -> None:
    """Raise TypeError, in a sentence, for what cannot be called as a router."""
    if isinstance(router, str):
        raise TypeError(f"The router is a text, {router!r}. Make it a router first: usmoe.parse_router({router!r}).")
    if isinstance(router, type):
        raise TypeError(f"The router is the class {router.__name__}. Make one of it: {router.__name__}(k=2), say.")
    if not callable(router):
        raise TypeError(f"router={router!r} is not a router. Give one of usmoe's, or a callable (logits, valid, **kw).")


def call(router: Any, logits: Tensor, valid: Tensor | None, **given: Any) -> Routing:
    """What a router says; `given` without what is None, so that a router of the user's own need not know it. Where it
    does not say what is padding, its Routing does all the same.

    Raises TypeError where it returns anything but a Routing.
    """
    routing = router(logits, valid, **{name: value for name, value in given.items() if value is not None})
    if not isinstance(routing, Routing):
        raise TypeError(
            f"The router {router} returned a {type(routing).__name__}. A router returns a usmoe.Routing; "
            "Routing.from_dense(weights, mask) makes one."
        )
    if routing.valid is None and valid is not None:
        return dataclasses.replace(routing, valid=valid.reshape(-1).bool())
    return routing


def padding_counts(router: Any) -> bool:
    """Whether padding competes and adds to the budget, as in the released code."""
    return getattr(router, "mask_padding", True) is False


def experts_per_token(k: Experts, host: Host, num_experts: int) -> float:
    """k as a number: the host's where it is None, a share of the host's where it is text.

    Raises ValueError where the host has none to offer and where k exceeds the number of experts.
    """
    if k is None or isinstance(k, str):
        if host.k is None:
            raise ValueError(
                "The number of experts per token is not given: "
                + ("k is missing." if k is None else f'k="{k}" is a share of a pretrained model\'s own number.')
                + " Give the router a number, such as k=2; only under usmoe.patch() does the model provide one."
            )
        k = host.k * (1.0 if k is None else float(k[:-1]))
    if k > num_experts:
        raise ValueError(
            f"A budget of k={k:g} experts per token is impossible with {num_experts} experts. "
            f"Choose k with 0 < k <= {num_experts}."
        )
    return k


def refuse_state(state: Any, router: Router) -> None:
    """No router here has memory: a state that would be ignored is refused."""
    if state is not None:
        raise ValueError(f"{router} keeps no state between chunks, but was given one. Call it without state.")


def competing(
    logits: Float[Tensor, "B L E"], valid: Bool[Tensor, "B L"] | None, mask_padding: bool = True
) -> tuple[Float[Tensor, "T E"], Bool[Tensor, "B L"]]:
    """Flat logits in float32 at least, and which tokens compete.

    What padding holds is replaced by 0, so that not even a NaN in it reaches a score or a gradient.
    """
    logits = in_float32_at_least(logits)
    if valid is None or not mask_padding:
        competes = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    else:
        competes = valid
        logits = logits.masked_fill(~valid.unsqueeze(-1), 0.0)
    return logits.flatten(0, 1), competes


def is_number(value: Any) -> bool:
    """Whether a field holds an int or a float; True and False are neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)
