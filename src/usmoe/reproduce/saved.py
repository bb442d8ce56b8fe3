"""Results of experiments on disk: one JSON file each, written whole, and as a section of Markdown."""

from __future__ import annotations

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


def kept(path: Path, plan: Plan) -> Any | None:
    """The result that is there, where it is of the same plan; None where there is none.

    Raises ValueError where it is of another.
    """
    if not path.exists():
        return None
    result = load(path)
    if fields := changed(result.plan, plan):
        raise ValueError(
            f"{path} holds a result of other settings ({', '.join(fields)}). Give --force to replace it, or another "
            "--results."
        )
    return result


def markdown(result: Result) -> str:
    """The result as sections of Markdown, the first with the command that gives it."""
    plan = result.plan
    command = f"usmoe reproduce {plan.experiment} --scale {plan.scale}"
    views = of_result(result).views(result, wide=True)
    return "\n".join(as_markdown(view, command if at == 0 else "") for at, view in enumerate(views))
