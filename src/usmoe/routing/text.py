"""Routers from text and from dictionaries, for command lines and saved configurations. Nothing is ever evaluated."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from usmoe.routing.bounded import BoundedChoice
from usmoe.routing.expert_choice import ExpertChoice
from usmoe.routing.relu_choice import ReLUChoice
from usmoe.routing.router import Router
from usmoe.routing.token_choice import OwnChoice, TokenChoice
from usmoe.routing.unified import USMoE

ROUTERS: dict[str, type[Router]] = {
    router.name: router for router in (TokenChoice, ExpertChoice, USMoE, BoundedChoice, OwnChoice, ReLUChoice)
}
"""Every router by its name in text."""

_CALL = re.compile(r"\s*([A-Za-z_]\w*)\s*(?:\((.*)\))?\s*", re.DOTALL)
_FIELD = re.compile(r"\s*(\w+)\s*=\s*((?:\([^()]*\)|\[[^\[\]]*\]|[^,()\[\]])+?)\s*(?:,|$)", re.DOTALL)


def parse_router(text: str | Mapping[str, Any] | Router) -> Router | Callable[..., Any]:
    """The router that a text or a dictionary describes: the inverse of `str(router)` and `router.to_dict()`.

        parse_router("usmoe(k=1.5, alpha=0.5)") == USMoE(k=1.5, alpha=0.5)
        parse_router("own") == OwnChoice()        # a pretrained model's own choice
        parse_router("my_package.routers:mine")   # a router of one's own: that object, imported

    Raises ValueError for an unknown name or field (with the known ones) and for what is not of that form.
    """
    if isinstance(text, Router):
        return text
    if not isinstance(text, str | Mapping):
        raise TypeError(f"A {type(text).__name__} is no description of a router. Give a text or a dictionary.")
    if isinstance(text, Mapping):
        fields = dict(text)
        return _make(str(fields.pop("router", "")), fields)
    if text.strip() == "own":
        return OwnChoice()
    if ":" in text and "(" not in text:
        return _imported(text.strip())
    match = _CALL.fullmatch(text)
    if not match:
        raise ValueError(f'{text!r} is not a router. Write name(field=value, ...), such as "usmoe(k=1.5, alpha=0.5)".')
    name, inside = match.groups()
    return _make(name, _fields(inside or "", text))


def _make(name: str, fields: dict[str, Any]) -> Router:
    router = ROUTERS.get(name) or {r.__name__: r for r in ROUTERS.values()}.get(name)
    if router is None:
        raise ValueError(f"There is no router {name!r}.{_nearest(name, ROUTERS)} Known: {', '.join(ROUTERS)}.")
    known = [field.name for field in dataclasses.fields(router)]  # pyright: ignore[reportArgumentType]
    for field in fields:
        if field not in known:
            raise ValueError(
                f"{router.name} has no field {field!r}.{_nearest(field, known)} Known: {', '.join(known)}."
            )
    return router(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def _fields(inside: str, text: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    place = 0
    while inside[place:].strip():
        match = _FIELD.match(inside, place)
        if not match:
            raise ValueError(f"{text!r} cannot be read from {inside[place:].strip()!r} on. Write field=value, ...")
        if match[1] in fields:
            raise ValueError(f"{text!r} gives {match[1]} twice. Give it once.")
        fields[match[1]] = _value(match[2])
        place = match.end()
    return fields


def _value(word: str) -> Any:
    """A number (inf too), a tuple, None, True, False or a quoted text; any other word is itself."""
    if word.startswith(("(", "[")):
        return tuple(_value(part.strip()) for part in word[1:-1].split(",") if part.strip())
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return float(word) if word in ("inf", "-inf") else word


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _imported(text: str) -> Callable[..., Any]:
    module, _, name = text.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the imported module raises
        raise ValueError(f"The router {text!r} cannot be imported: {error}. Write package.module:name.") from error
    if not callable(found):
        raise ValueError(
            f"{text!r} is a {type(found).__name__}, not a router. A router is a callable (logits, valid, **kw)."
        )
    return found
