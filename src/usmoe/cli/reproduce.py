"""`usmoe reproduce`: a table or figure of the paper, run here, and the paper's figures beside ours."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from usmoe.cli import options
from usmoe.cli.options import AsJson, Debug, Device, Offline, Seed
from usmoe.cli.views import print_view
from usmoe.report.whole import whole_text
from usmoe.reproduce.experiment import EXPERIMENTS, Scale, find
from usmoe.reproduce.saved import committed, markdown

if TYPE_CHECKING:
    from usmoe.reproduce.kind import Kind

_OF_RUNS = ("model", "data", "tasks", "batch_size", "rows", "corpora", "routers", "seeds", "steps", "seed", "device")
_OF_RUNS += ("dtype", "offline")
_OF_FILES = ("plot", "markdown_path")


def reproduce(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="table1 to table16, figure1 to figure12.")] = None,
    listed: Annotated[
        bool, typer.Option("--list", help="A line for each: at which scales it has been run, or not built yet.")
    ] = False,
    show: Annotated[
        bool,
        typer.Option(
            "--show", help="Run nothing: print what lies in --results, or else the result that comes with usmoe."
        ),
    ] = False,
    scale: Annotated[
        Scale, typer.Option(help="small: what two cores can do, on what lies in --data. paper: the paper's own models.")
    ] = "small",
    part: Annotated[str | None, typer.Option(help="Of a figure that has parts: a or b.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="Of embeddings: one model in place of the scale's own: a folder, a hub id, shipped."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A folder of local data sets, in the hub's columns, in place of the hub.")
    ] = None,
    results: Annotated[
        Path, typer.Option(help="The folder for results, and for what a run that was stopped had finished.")
    ] = Path("usmoe-results"),
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Of embeddings and table13: a data set, by the paper's name or mteb's; may be given again."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Of embeddings: texts in a batch; without it 32, or 128 at paper scale.", min=1)
    ] = None,
    rows: Annotated[
        list[str] | None,
        typer.Option(
            "--row", help="Of training and table13: a row, or another method (usmoe, remoe); may be given again."
        ),
    ] = None,
    corpora: Annotated[
        list[str] | None,
        typer.Option("--corpus", help="Of training and table13: one of the texts trained on; may be given again."),
    ] = None,
    routers: Annotated[
        list[str] | None,
        typer.Option(
            "--router", help='Of training and table13: a row of your own, "usmoe(k=2, alpha=0.3)" or module:name.'
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Of training and table13: how many, counted from --seed.", min=1)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Of training: optimizer steps in place of the scale's.", min=1)
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a figure: .png, .svg or .pdf.")] = None,
    markdown_path: Annotated[Path | None, typer.Option("--markdown", help="Write the comparison as Markdown.")] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Run again, and replace the result and files. Trained models and classifiers stay."
        ),
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
    the same settings is shown, not run again. table5-small.json is the table as it is; with options (--row, --router,
    --corpus, --tasks, --seeds, --steps ...) a digest of the settings stands behind its name.

    Examples: usmoe reproduce --list; usmoe reproduce table5 --data DIR; usmoe reproduce table7 --scale paper;
    usmoe reproduce table14 --data DIR --corpus novels --row usmoe --router "usmoe(k=2, alpha=0.3)"
    """
    options.refuse_unread(
        context,
        (
            listed,
            ("name", "show", "scale", "part", *_OF_RUNS, *_OF_FILES, "force"),
            "of one experiment, and --list is of all",
        ),
        (show, _OF_RUNS, "of a run, and --show runs nothing"),
    )
    if listed:
        _list(results, as_json)
        return
    if name is None:
        raise typer.BadParameter("Give the name of a table or figure, such as table5; --list shows them all")
    experiment = find(name, part)
    from usmoe.cli.routers import saved_with
    from usmoe.cli.train import keep_memory
    from usmoe.reproduce.kind import Asked, kind_of
    from usmoe.reproduce.saved import load, place_of, save, there

    kind = kind_of(experiment)
    if plot is not None:
        kind.refuse_picture(experiment)
    picture = options.picture_path(plot, force)
    page = options.output_path(markdown_path, force, "--markdown")
    if show:
        shown = there(experiment, scale, results)
        if shown is None:
            raise ValueError(
                f"{experiment.name} has not been run at {scale} scale: there is no result in {results}, and none comes "
                "with usmoe. Leave --show out to run it."
            )
        _print(kind, load(shown), f"Shown from {shown}.", as_json, picture, page)
        return
    options.work_folder(results, "--results")
    asked = Asked(
        scale=scale,
        data=data,
        seed=seed,
        device=device,
        dtype=dtype,
        model=model,
        tasks=tuple(tasks or ()),
        batch_size=batch_size,
        rows=tuple(rows or ()),
        corpora=tuple(corpora or ()),
        routers=tuple(routers or ()),
        seeds=seeds,
        steps=steps,
    )
    plan = kind.plan(experiment, asked)
    if model is not None:
        saved_with(model, offline, "the experiment has routers of its own, and own is the model's own choice")
    path = place_of(plan, experiment.path(results, scale), anew=force)
    result = load(path) if path.exists() and not force else None
    if result is not None:
        sys.stderr.write(f"Shown from {path}; --force runs it again.\n")
    else:
        if said := kind.announce(plan, offline, force):
            sys.stderr.write(f"{said}\n")
        if kind.TRAINS:
            keep_memory()
        with tqdm(total=plan.parts, file=sys.stderr, disable=None, unit=kind.UNIT, desc=experiment.name) as bar:
            result = kind.run(plan, results, offline=offline, anew=force, done=lambda word: _tick(bar, word))
        try:
            save(result, path)
        except OSError:  # a full disk costs a file, not the figures
            _print(kind, result, f"Not saved: {path}", as_json, None, None)
            raise
    _print(kind, result, f"Saved: {path}", as_json, picture, page)


def _print(kind: Kind, result: Any, where: str, as_json: bool, picture: Path | None, page: Path | None) -> None:
    """Print a result, and write its picture and its page where they are asked for."""
    try:  # a pipe that was closed costs no file
        if as_json:
            options.write_json(result.to_dict())
        else:
            for view in kind.views(result, wide=False):
                print_view(view)
            options.console().print(where, highlight=False, markup=False)
    finally:
        if picture is not None:
            kind.plot(result, picture)
        if page is not None:
            whole_text(markdown(result), page)


def _tick(bar: tqdm, word: str) -> None:
    bar.set_postfix_str(word, refresh=False)
    bar.update()


def _list(results: Path, as_json: bool) -> None:
    """One line an experiment, beginning with its name as typed."""
    from usmoe.reproduce.embeddings.study import one_run

    folders = [folder for folder in (committed(), results) if folder is not None]
    run = {name: one.scales_run(folders) for name, one in EXPERIMENTS.items()}
    others = {name: one.with_options(folders) for name, one in EXPERIMENTS.items()}
    if as_json:
        options.write_json(
            [
                dataclasses.asdict(one) | {"scales": one.scales, "run": run[name], "with_options": others[name]}
                for name, one in EXPERIMENTS.items()
            ]
        )
        return
    for name, one in EXPERIMENTS.items():
        first = one_run(name)[0] if one.kind == "embeddings" else name
        status = "not built yet" if not one.built else f"run: {', '.join(run[name])}" if run[name] else "not run yet"
        later = "" if one.built else f" (comes with {one.waits_for})"
        later += f" ({others[name]} with options)" if others[name] else ""
        later += f" (small: the run of {first})" if first != name and "small" in run[name] else ""
        sys.stdout.write(f"{name:<17}  {status:<17}  {one.title}{later}\n")
