"""Results of experiments on disk: one JSON file each, written whole, and as a section of Markdown."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from usmoe.report.whole import whole_json
from usmoe.reproduce.experiment import EXPERIMENTS
from usmoe.reproduce.kind import Plan, Result, changed, kind_of, of_result
from usmoe.reproduce.view import as_markdown


def save(result: Result, path: Path) -> None:
    """Write a result, whole or not at all."""
    whole_json(result.to_dict(), path, allow_nan=False)


def load(path: Path) -> Any:
    """A result that `save` wrote, of whatever kind. Raises ValueError, naming the file, for what is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("schema") != 1:
            raise ValueError(f"It has schema {data.get('schema')!r}, and this usmoe reads 1. Run it again.")
        return kind_of(EXPERIMENTS[data["plan"]["experiment"]]).read(data)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{path} is no result of usmoe reproduce: {error}") from error


def place_of(plan: Plan, path: Path, *, anew: bool = False) -> Path:
    """Where the result of a plan lies, or is to be written: at `path`, or where that holds a result of other settings,
    beside it, under a digest of these.

    anew  what holds none at all is to be replaced; without it ValueError is raised
    """
    try:
        if not path.exists() or not changed(load(path).plan, plan):
            return path
    except ValueError:
        if anew:
            return path
        raise
    said = {name: value for name, value in plan.to_dict().items() if name != "data"}  # which may have moved
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:8]
    return path.with_name(f"{path.stem}-{digest}{path.suffix}")


def markdown(result: Result) -> str:
    """The result as sections of Markdown, the first with the command that gives it."""
    plan = result.plan
    command = f"usmoe reproduce {plan.experiment} --scale {plan.scale}"
    views = of_result(result).views(result, wide=True)
    return "\n".join(as_markdown(view, command if at == 0 else "") for at, view in enumerate(views))
