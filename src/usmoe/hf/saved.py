"""Routers as data: in a model's configuration, written by save_pretrained() of a patched model and read by
from_pretrained(); beside an adapter of peft; and in files that `usmoe tune` writes.

With a router goes what its layer tracked in training (usmoe.layers.cut): usmoe.to_causal() finds it after loading.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from usmoe.layers.cut import MovingCut
from usmoe.routing import parse_router
from usmoe.routing.router import Router
from usmoe.routing.source import source_of

SCHEMA = 2
"""Version of config.usmoe: 2 where it holds tracked cuts, else 1. A later one is refused, since its routers may mean
something else."""

CODE = "(code of its author's own)"
"""What a router that is named, and not run from a file, is marked by where it is told of."""

_KEY = "usmoe"


@contextlib.contextmanager
def written(config: Any, routers: Mapping[str, Any], cuts: Mapping[str, MovingCut] | None = None) -> Iterator[None]:
    """The configuration with the routers, and what they tracked, in it, for the length of the with block."""
    missing = object()
    before = config.__dict__.get(_KEY, missing)
    setattr(config, _KEY, as_data(routers, cuts))
    try:
        yield
    finally:
        if before is missing:
            delattr(config, _KEY)
        else:
            setattr(config, _KEY, before)


def as_data(routers: Mapping[str, Any], cuts: Mapping[str, MovingCut] | None = None) -> dict[str, Any]:
    """{layer name: router} as JSON, with the cuts that each has tracked; those of a router before it are left out."""
    data = {"schema": 1, "routers": {name: _as_data(router) for name, router in routers.items()}}
    tracked = {
        name: {"total": cut.total.tolist(), "weight": cut.weight.tolist()}
        for name, cut in (cuts or {}).items()
        if cut.seen and cut.router in (None, routers[name])
    }
    return data | {"schema": 2, "cuts": tracked} if tracked else data


def _as_data(router: Any) -> dict[str, Any]:
    """A router as JSON. Code of the user's own is named, with a digest of its source, and not run when it is read."""
    if isinstance(router, Router):
        return router.to_dict()
    where = getattr(router, "__qualname__", type(router).__qualname__)
    named = f"{getattr(router, '__module__', None) or type(router).__module__}:{where}"
    source = source_of(router)
    return {"router": None, "own": named, "digest": None if source is None else source.digest}


def take_cuts(data: Any, routers: Mapping[str, Any], cuts: Mapping[str, MovingCut]) -> None:
    """Give the layers what `as_data` wrote of their cuts, where they route by the router that tracked them. Warns where
    code of the user's own is not the one that the model was saved with."""
    if not isinstance(data, Mapping) or data.get("schema") not in range(1, SCHEMA + 1):
        return
    saved = data.get("routers")
    saved, tracked = (one if isinstance(one, Mapping) else {} for one in (saved, data.get("cuts")))
    for name, router in routers.items():
        before = saved.get(name)
        if not isinstance(before, Mapping) or before.get("own") != _as_data(router).get("own"):
            continue
        digest, now = before.get("digest"), _as_data(router).get("digest")
        if digest is not None and now is not None and digest != now:
            warnings.warn(
                f"{before['own']} was edited since the model was saved under it: the digest of its source was "
                f"{digest[:12]} and is {now[:12]}. Put that source back, or go on with the router as it is now.",
                stacklevel=3,
            )
            return
        cut = tracked.get(name)
        if cut is not None and (not isinstance(router, Router) or dict(before) == _as_data(router)):
            _restore(cuts[name], cut, router, name)


def _restore(cut: MovingCut, said: Any, router: Any, name: str) -> None:
    try:
        found = {part: torch.tensor(said[part], dtype=torch.float64) for part in ("total", "weight")}
        cut.load_state_dict(found)
    except (TypeError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"config.usmoe holds no cuts for {name} as usmoe writes them ({error}). Save the model again."
        ) from error
    cut.router = router


def data_of(config: Any) -> Any:
    """What a configuration says of routers, as it was written; None where it says nothing."""
    return getattr(config, _KEY, None)


def told(data: Any) -> dict[str, str]:
    """{layer name: router as text} of what `as_data()` made, for a reader; code of somebody's own by its name. Empty
    for what is not of that form."""
    said = data.get("routers") if isinstance(data, Mapping) else None
    return {str(name): _told(one) for name, one in said.items()} if isinstance(said, Mapping) else {}


def _told(one: Any) -> str:
    if isinstance(one, Mapping) and one.get("router") is None and "own" in one:
        return f"{one['own']} {CODE}"
    try:
        return str(parse_router(one)) if isinstance(one, Mapping) else repr(one)
    except (TypeError, ValueError, KeyError):
        return f"{one.get('router')!r}, which this usmoe cannot read"


def routers_of(config: Any, source: str) -> dict[str, Any] | None:
    """{layer name: router} as a configuration holds it; None where it holds none. Raises as `routers_in()` does."""
    data = data_of(config)
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
