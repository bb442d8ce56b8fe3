"""Values of configurations are of the types that their fields say, be they from TOML, JSON or a command line."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from typing import Any, Literal


def refuse_wrong_types(config: Any) -> None:
    """Raise ValueError for the first field of a dataclass whose value is not of its type, in the field's words.

    A whole number is a float, too; True is no number, nor are NaN and infinities; a tuple has the length that its type
    says.
    """
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        if not _is(value, hint):
            raise ValueError(f"{name}={value!r} is not possible. Give {_said(hint)}.")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {one.name: hints[one.name] for one in dataclasses.fields(kind)}


def _is(value: Any, hint: Any) -> bool:
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(_is(value, part) for part in parts)
    if kind is Literal:
        return isinstance(value, str | int | bool | None) and value in parts
    if kind is tuple:
        if not isinstance(value, tuple):
            return False
        if parts[-1] is Ellipsis:
            return all(_is(one, parts[0]) for one in value)
        return len(value) == len(parts) and all(map(_is, value, parts))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _said(hint: Any) -> str:
    """A type in words."""
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return " or ".join("none" if part is type(None) else _said(part) for part in parts)
    if kind is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if kind is tuple:
        if parts[-1] is Ellipsis:
            return f"a list, of each {_said(parts[0])}"
        return f"a list of {len(parts)}: {', '.join(map(_said, parts))}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return words.get(hint) or f"a table, {getattr(hint, '__name__', hint)}"
