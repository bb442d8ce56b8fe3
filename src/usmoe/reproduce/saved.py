"""Results of experiments on disk: one JSON file each, written whole, and as a section of Markdown."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from usmoe.report.whole import whole_json
from usmoe.reproduce.experiment import EXPERIMENTS, Experiment, Scale
from usmoe.reproduce.given import digest_of
from usmoe.reproduce.kind import Plan, Result, kind_of, of_result
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
    """Where the result of a plan lies, or is to be written.

    At `path` that of the experiment as it is; beside it, under a digest of its settings, that of a plan with options,
    which may be a trial, and one for which `path` is taken by other settings. What lies at `path` already and is of the
    same settings stays there, with options or without.

    anew  a file at `path` that holds no result is to be replaced; without it ValueError is raised
    """
    digest = _digest(plan)
    own = path.with_name(f"{path.stem}-{digest}{path.suffix}")
    if not path.exists():
        return own if plan.options() else path
    try:
        return path if _digest(load(path).plan) == digest else own
    except ValueError:
        if plan.options():
            return own
        if anew:
            return path
        raise


def _digest(plan: Plan) -> str:
    return digest_of({"experiment": plan.experiment, "scale": plan.scale, **plan.basis()})


def committed() -> Path | None:
    """The folder of the results that come with usmoe: in a wheel beside this file, in a checkout at its root."""
    packed = Path(__file__).parent / "results"
    if packed.is_dir():
        return packed
    root = Path(__file__).parents[3]
    return root / "results" if (root / "pyproject.toml").is_file() else None


def there(experiment: Experiment, scale: Scale, results: Path) -> Path | None:
    """The result of an experiment as it is: in a folder of results, else the one that comes with usmoe, else None."""
    paths = [experiment.path(folder, scale) for folder in (results, committed()) if folder is not None]
    return next((path for path in paths if path.is_file()), None)


def command(plan: Plan) -> str:
    """The command line that gives a plan, but for the folder of data."""
    return " ".join([f"usmoe reproduce {plan.experiment} --scale {plan.scale}", *map(shlex.quote, plan.options())])


def markdown(result: Result) -> str:
    """The result as sections of Markdown, the first with the command that gives it."""
    views = of_result(result).views(result, wide=True)
    return "\n".join(as_markdown(view, "" if at else command(result.plan)) for at, view in enumerate(views))
