"""The router of a run that is not one of usmoe's: which it was, so that no run goes on, or is read, under another.

router.json    how it was named, the digest of its source and of each file, and its parameters
router/        these files, under the paths by which they are imported: PYTHONPATH=RUN/router reads them again
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from usmoe.report.whole import whole_json
from usmoe.routing.source import Source, is_of_usmoe, source_of
from usmoe.routing.text import parse_router

SCHEMA = 1
"""Version of router.json."""

_SAID, _FILES = "router.json", "router"

Tell = Callable[[str], object]


def pin(run: Path, text: str, given: Any, tell: Tell) -> None:
    """Write which router a run has, where it is not one that its configuration says whole.

    text   the configuration's router
    given  an object in its place; None: there is none
    tell   called with a sentence where its source, or a part of it, cannot be had
    """
    router = parse_router(text) if given is None else given
    shutil.rmtree(run / _FILES, ignore_errors=True)
    if given is None and is_of_usmoe(router):
        (run / _SAID).unlink(missing_ok=True)
        return
    source = source_of(router, text if given is None else None)
    if source is not None:
        for name, content in source.files.items():
            (run / _FILES / name).parent.mkdir(parents=True, exist_ok=True)
            (run / _FILES / name).write_text(content, encoding="utf-8")
        if source.unread:
            tell(
                f"The source of the router {_name(text, given)} cannot be read ({', '.join(source.unread)} has no file "
                "of it), so that nothing will tell whether it is the same when the run goes on or is read."
            )
    whole_json(_as_said(text, given, source), run / _SAID)


def refuse_edited(run: Path, text: str, given: Any, tell: Tell, *, edited: bool = False) -> None:
    """Raise ValueError, in one sentence, where the router of a run is not the one that it was begun under.

    text, given  the configuration's router, and an object in its place, as `pin` has them
    tell         called with a sentence where nothing is known of the router of a run, and where it is another one
    edited       go on with another one
    """
    router = parse_router(text) if given is None else given
    said = _said(run)
    if said is None:
        if not is_of_usmoe(router):
            tell(
                f"Nothing is known of the source of {_name(text, given)} that the run in {run} was begun under: an "
                "earlier usmoe kept none of it. The figures are of the source as it is now."
            )
        return
    now = _as_said(text, given, None if is_of_usmoe(router) else source_of(router, text if given is None else None))
    if said == now:
        return
    sentence = _difference(run, said, now)
    if not edited:
        raise ValueError(sentence)
    tell(f"{sentence} Read all the same, under the router as it is now.")


def router_given(run: Path) -> str | None:
    """The router that was given to a run as an object, in place of its configuration's, as text; None where the
    configuration says it."""
    said = _said(run)
    return said["router"] if said is not None and said["given"] else None


def _name(text: str, given: Any) -> str:
    if given is None:
        return text
    if is_of_usmoe(given):
        return str(given)
    kind = given if hasattr(given, "__qualname__") else type(given)
    return f"{kind.__module__}:{kind.__qualname__}"


def _as_said(text: str, given: Any, source: Source | None) -> dict[str, Any]:
    said: dict[str, Any] = {"schema": SCHEMA, "router": _name(text, given), "given": given is not None}
    if source is None:
        return said | {"digest": None, "fields": None, "files": {}, "unread": []}
    return said | {
        "digest": source.digest,
        "fields": json.loads(source.fields),
        "files": source.digests,
        "unread": list(source.unread),
    }


def _said(run: Path) -> dict[str, Any] | None:
    """What router.json says; None where there is none. Raises ValueError, naming it, where it is damaged."""
    path = run / _SAID
    if not path.is_file():
        return None
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}). Put the one of the run back.") from error
    if not isinstance(said, dict) or said.get("schema") != SCHEMA:
        raise ValueError(f"{path} is of another version of usmoe, and this one reads schema {SCHEMA}.")
    return said


def _difference(run: Path, before: dict[str, Any], now: dict[str, Any]) -> str:
    """In one sentence, what differs and what to do."""
    other = f"or begin a new run in another folder than {run}"
    if (before["router"], before["given"]) != (now["router"], now["given"]):
        return (
            f"The run in {run} was begun under the router {before['router']}"
            f"{' (an object)' if before['given'] else ''}, and is gone on with under {now['router']}"
            f"{' (an object)' if now['given'] else ''}: give the first again, {other}."
        )
    changed = sorted(
        name for name in {*before["files"], *now["files"]} if before["files"].get(name) != now["files"].get(name)
    )
    if not changed:
        return (
            f"The parameters of the router {now['router']} are others than when the run in {run} was begun: they were "
            f"{json.dumps(before['fields'])} and are {json.dumps(now['fields'])} (digest {_short(before['digest'])}, "
            f"now {_short(now['digest'])}): put them back, {other}."
        )
    told = "; ".join(
        f"{name} had the digest {_short(before['files'].get(name))} and has {_short(now['files'].get(name))}"
        for name in changed
    )
    return (
        f"The source of the router {now['router']} was edited since the run in {run} was begun: {told}: put the saved "
        f"source back (it lies in {run / _FILES}; with PYTHONPATH={run / _FILES} it is read from there), {other}."
    )


def _short(digest: str | None) -> str:
    return "none (no such file)" if digest is None else digest[:12]
