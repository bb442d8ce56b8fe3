"""`usmoe reproduce`: a table or figure of the paper, run here, and the paper's figures beside ours."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm import tqdm

from usmoe.cli import options
from usmoe.cli.options import AsJson, Debug, Device, Offline, Seed
from usmoe.cli.views import print_view
from usmoe.reproduce.experiment import EXPERIMENTS, Scale, find

if TYPE_CHECKING:
    from usmoe.evaluate.run import Score
    from usmoe.reproduce.plan import Plan
    from usmoe.reproduce.run import Result


def reproduce(
    name: Annotated[str | None, typer.Argument(help="table1 to table16, figure1 to figure12.")] = None,
    listed: Annotated[
        bool, typer.Option("--list", help="A line for each: at which scales it has been run, or not built yet.")
    ] = False,
    scale: Annotated[
        Scale, typer.Option(help="small: the shipped model on what lies in --data. paper: the paper's three models.")
    ] = "small",
    part: Annotated[str | None, typer.Option(help="Of a figure that has parts: a or b.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="One model in place of the scale's own: a folder, a hub id, or shipped."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A folder of local data sets, in the hub's columns, in place of the hub.")
    ] = None,
    results: Annotated[
        Path, typer.Option(help="The folder for results, and for what a run that was stopped had finished.")
    ] = Path("usmoe-results"),
    tasks: Annotated[
        list[str] | None, typer.Option(help="A task by mteb's name or the paper's; may be given again.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Texts in a batch; without it 32, or 128 at paper scale.", min=1)
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG: figure3, figure4, figure7, figure8.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the comparison as Markdown.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Run again, and replace the result and the files that are there.")
    ] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; without it float32, or bfloat16 at paper scale.")
    ] = None,
    offline: Offline = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run a table or figure of arXiv 2503.22996, and print the paper's figures and ours, with what differs.

    A run that was stopped goes on where it was, and tables share what they have in common. A result that is there for
    the same settings is shown, not run again.

    Examples: usmoe reproduce --list; usmoe reproduce table5 --data DIR; usmoe reproduce table7 --scale paper
    """
    if listed:
        _list(results, as_json)
        return
    if name is None:
        raise typer.BadParameter("Give the name of a table or figure, such as table5; --list shows them all")
    experiment = find(name, part)
    from usmoe.reproduce import render
    from usmoe.reproduce.plan import downloads
    from usmoe.reproduce.plan import plan as plan_of
    from usmoe.reproduce.run import run, save

    if plot is not None and experiment.built:
        render.refuse_picture(experiment.name)
    picture, page = (options.output_path(path, force) for path in (plot, markdown))
    plan = plan_of(
        experiment,
        scale,
        model=model,
        data=data,
        tasks=tasks or (),
        batch_size=batch_size,
        seed=seed,
        device=device,
        dtype=dtype,
    )
    path = experiment.path(results, scale)
    result = None if force else _kept(path, plan)
    if result is None:
        if not offline and (said := downloads(plan)):
            sys.stderr.write(f"{said}\n")
        with tqdm(total=plan.scores, file=sys.stderr, disable=None, unit="score", desc=experiment.name) as bar:
            result = run(plan, results, offline=offline, anew=force, done=lambda score: _tick(bar, score))
        save(result, path)
    try:  # a pipe that was closed costs no file
        if as_json:
            options.write_json(result.to_dict())
        else:
            print_view(render.view(result, deviations=False))
            options.console().print(f"Saved: {path}", highlight=False, markup=False)
    finally:
        if picture is not None:
            render.plot(result, picture)
        if page is not None:
            page.write_text(render.markdown(result), encoding="utf-8")


def _tick(bar: tqdm, score: Score) -> None:
    bar.set_postfix_str(score.task, refresh=False)
    bar.update()


def _kept(path: Path, plan: Plan) -> Result | None:
    """The result that is there, where it is of the same plan; the folder of the data may have moved.

    Raises ValueError where it is of another.
    """
    from usmoe.reproduce.run import load

    if not path.exists():
        return None
    result = load(path)
    one, other = (dataclasses.replace(some, data=None) for some in (result.plan, plan))
    if one != other:
        fields = [field.name for field in dataclasses.fields(one)]
        changed = ", ".join(name for name in fields if getattr(one, name) != getattr(other, name))
        raise ValueError(
            f"{path} holds a result of other settings ({changed}). Give --force to replace it, or another --results."
        )
    sys.stderr.write(f"Shown from {path}; --force runs it again.\n")
    return result


def _list(results: Path, as_json: bool) -> None:
    """One line an experiment, beginning with its name as typed."""
    folders = [folder for folder in (_own_results(), results) if folder is not None]
    run = {name: one.scales_run(folders) for name, one in EXPERIMENTS.items()}
    if as_json:
        options.write_json([dataclasses.asdict(one) | {"run": run[name]} for name, one in EXPERIMENTS.items()])
        return
    for name, one in EXPERIMENTS.items():
        status = "not built yet" if not one.built else f"run: {', '.join(run[name])}" if run[name] else "not run yet"
        later = "" if one.built else f" (comes with {one.waits_for})"
        sys.stdout.write(f"{name:<17}  {status:<17}  {one.title}{later}\n")


def _own_results() -> Path | None:
    """The project's results folder, where usmoe runs from a checkout."""
    import usmoe

    root = Path(usmoe.__file__).parents[2]
    return root / "results" if (root / "pyproject.toml").is_file() else None
