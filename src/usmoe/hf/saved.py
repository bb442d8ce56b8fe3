"""Routers as data: in a model's configuration, written by save_pretrained() of a patched model and read by
from_pretrained(), and in files that `usmoe tune` writes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from usmoe.routing import parse_router
from usmoe.routing.router import Router

SCHEMA = 1
"""Version of config.usmoe. A later one is refused, since its routers may mean something else."""

_KEY = "usmoe"


@contextlib.contextmanager
def written(config: Any, routers: Mapping[str, Any]) -> Iterator[None]:
    """The configuration with the routers in it, for the length of the with block."""
    missing = object()
    before = config.__dict__.get(_KEY, missing)
    setattr(config, _KEY, as_data(routers))
    try:
        yield
    finally:
        if before is missing:
            delattr(config, _KEY)
        else:
            setattr(config, _KEY, before)


def as_data(routers: Mapping[str, Any]) -> dict[str, Any]:
    """{layer name: router} as JSON."""
    return {"schema": SCHEMA, "routers": {name: _as_data(router) for name, router in routers.items()}}


def _as_data(router: Any) -> dict[str, Any]:
    """A router as JSON. Code of the user's own is named, and not run when it is read."""
    if isinstance(router, Router):
        return router.to_dict()
    where = getattr(router, "__qualname__", type(router).__qualname__)
    return {"router": None, "own": f"{getattr(router, '__module__', None) or type(router).__module__}:{where}"}


def routers_of(config: Any, source: str) -> dict[str, Any] | None:
    """{layer name: router} as a configuration holds it; None where it holds none. Raises as `routers_in()` does."""
    data = getattr(config, _KEY, None)
    return None if data is None else routers_in(data, f"config.usmoe of {source}")


def routers_in(data: Any, source: str, give: str = "usmoe.from_pretrained(path, router=...)") -> dict[str, Any]:
    """{layer name: router} of what `as_data()` made; give: how to give a router instead, for the message.

    Raises ValueError for a newer schema, for a router of somebody's own code, and for what is no router.
    """
    schema = data.get("schema") if isinstance(data, Mapping) else None
    if type(schema) is not int or schema < 1 or not isinstance(data.get("routers"), Mapping):
        raise ValueError(f"{source} holds no routers that usmoe has written. Give a router of your own instead.")
    if schema > SCHEMA:
        raise ValueError(
            f"{source} has schema {schema}, and this usmoe reads schema {SCHEMA}. Update usmoe (pip install -U "
            "usmoe), or give a router of your own instead."
        )
    found: dict[str, Any] = {}
    for name, one in data["routers"].items():
        if isinstance(one, Mapping) and one.get("router") is None and "own" in one:
            raise ValueError(
                f"{source} names a router of its author's own, {one['own']}, which usmoe does not run from a file. "
                f"Give it: {give}."
            )
        try:
            if not isinstance(one, Mapping):  # a text could name code, and code is not run from a file
                raise TypeError(f"{one!r} is no router.")
            found[name] = parse_router(one)
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"{source} holds no router for {name}: {error}") from error
    return found


def read_router(given: str) -> Any:
    """A router from its text, or {layer name: router} from a file that ends in .json.

    Raises ValueError where the file is missing, or holds no routers.
    """
    if not given.endswith(".json"):
        return parse_router(given)
    path = Path(given)
    if not path.is_file():
        raise ValueError(f"There is no file {given}. Give a router, or a file that usmoe tune --output wrote.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{given} is not JSON: {error}. Give a file that usmoe tune --output wrote.") from error
    return routers_in(data, given)


def without_routers(config: Any) -> None:
    """Drop the routers from a configuration: the model carries them now, and writes them again when it is saved."""
    if _KEY in config.__dict__:
        delattr(config, _KEY)
