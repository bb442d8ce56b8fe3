"""`usmoe finetune`: a classifier from a checkpoint of `usmoe train`."""

from __future__ import annotations

import functools
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from usmoe.cli import options
from usmoe.cli.options import AsJson, Debug, Device, Offline, Seed
from usmoe.cli.train import keep_memory
from usmoe.cli.views import print_view

if TYPE_CHECKING:
    from usmoe.reproduce.view import View
    from usmoe.train.finetune_config import FinetuneConfig
    from usmoe.train.scored import Scored


def finetune(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="The folder of a run of usmoe train.")],
    texts: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="sst2, sst5, imdb, banking77; or a .csv, .parquet or .jsonl file, or a folder of them."
        ),
    ],
    run: Annotated[
        Path | None, typer.Option("--run", "-o", help="The folder of the run; without it usmoe-runs/NAME, a new one.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Begin anew where --run holds a run.")] = False,
    router: Annotated[
        str | None, typer.Option(help='In place of the checkpoint\'s: "usmoe(k=1.5)", or module:name of your own.')
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Fresh parameters in place of the checkpoint's: the control.")
    ] = False,
    which: Annotated[str, typer.Option(help="Of the checkpoint: best or last.")] = "best",
    epochs: Annotated[int | None, typer.Option(help="How often every text is read; without it 15.", min=1)] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, at most.", min=1)] = None,
    batch: Annotated[int | None, typer.Option(help="Texts a step; without it 16, of IMDB 4.", min=1)] = None,
    lr: Annotated[float | None, typer.Option(help="Of Adam; without it 1e-4.")] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a text, at most, from its beginning; 512.", min=1)
    ] = None,
    balance: Annotated[
        float | None, typer.Option(help="Coefficient of the balance loss; without it as in training.", min=0)
    ] = None,
    clip: Annotated[float | None, typer.Option(help="Largest norm of the gradient; without it 1.", min=0)] = None,
    dropout: Annotated[float | None, typer.Option(help="In the head; without it 0.1.")] = None,
    pooling: Annotated[
        str | None, typer.Option(help="Of the states that the head reads: mean, weighted_mean; without it last.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Without it text, sentence, content, ...")] = None,
    label_column: Annotated[str | None, typer.Option(help="Without it label, label_text, category, ...")] = None,
    held_out: Annotated[
        float | None, typer.Option(help="Share of the training texts for selection, where there are no others; 0.1.")
    ] = None,
    train_rows: Annotated[int | None, typer.Option(help="Rows, drawn by class; all.", min=1)] = None,
    validation_rows: Annotated[int | None, typer.Option(help="Rows, drawn by class; all.", min=1)] = None,
    test_rows: Annotated[int | None, typer.Option(help="Rows, drawn by class; all.", min=1)] = None,
    data: Annotated[
        Path | None, typer.Option(help="A folder of local data sets, in the hub's columns, in place of the hub.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs, with --seed and those after it.", min=1)] = 1,
    seed: Seed = 0,
    device: Device = "cpu",
    offline: Offline = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a trained language model to classify texts, under its own router or another.

    After each epoch the texts for selection are classified; the best epoch is tested, once, on texts that were for
    neither. A run that was stopped, by whatever, goes on with --resume to the same numbers.

    Examples: usmoe finetune usmoe-runs/book sst2 -o usmoe-runs/sst2; usmoe finetune usmoe-runs/book reviews.csv
    --text-column review --router "usmoe(k=1.5)" --seeds 3
    """
    if resume and run is None:
        raise typer.BadParameter("--resume goes on with a run. Say which: --run FOLDER")
    if resume and force:
        raise typer.BadParameter("--resume goes on with a run, and --force begins anew. Give one of them")
    options.refuse_unread(
        context, (from_scratch, ("which",), "of the checkpoint's parameters, and --from-scratch has fresh ones")
    )
    if offline:  # read where these libraries are imported, below
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    from usmoe.train.finetune import finetune as go
    from usmoe.train.finetune import refuse_what_is_there
    from usmoe.train.finetune_config import finetune_preset

    given = {
        "epochs": epochs,
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "length": length,
        "balance": balance,
        "clip": clip,
        "dropout": dropout,
        "pooling": pooling,
        "precision": precision,
        "data__text_column": text_column,
        "data__label_column": label_column,
        "data__held_out": held_out,
        "data__train_rows": train_rows,
        "data__validation_rows": validation_rows,
        "data__test_rows": test_rows,
    }
    said: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    config = finetune_preset(texts).replace(router=router, from_scratch=from_scratch, **said)
    folder = run or _fresh(checkpoint, texts)
    keep_memory()
    found: list[Scored] = []
    shared: dict[str, Any] = dict(checkpoint=checkpoint, which=which, data=data, offline=offline, device=device)
    shared["tell"] = options.tell
    _refuse_another_kind(folder, seeds)
    options.work_folder(folder, "--run")
    places = {number: folder if seeds == 1 else folder / f"seed-{number}" for number in range(seed, seed + seeds)}
    for place in places.values():  # before the first is trained
        refuse_what_is_there(place, going_on=resume or force)
    for number, place in places.items():
        one = config.replace(seed=number)
        shared["begun"] = functools.partial(_announce, one, place)
        try:
            found.append(go(one, place, resume=resume, anew=force, **shared))
        except KeyboardInterrupt as stop:  # which typer would end without a word
            raise typer.Abort(*stop.args) from stop
    if as_json:
        options.write_json({"run": str(folder), "seeds": [one.to_dict() for one in found], **_summary(found)})
    else:
        print_view(_view(found, folder))


def _announce(config: FinetuneConfig, folder: Path, steps: int) -> None:
    sys.stderr.write(f"{folder}: {steps} steps of {config.batch} texts of {config.data.source}, seed {config.seed}\n")


def _refuse_another_kind(folder: Path, seeds: int) -> None:
    """Raise ValueError where a folder of runs, one a seed, would become one of a run, or the other way round."""
    inner = sorted(path.parent.name for path in folder.glob("seed-*/config.json"))
    if seeds == 1 and inner:
        raise ValueError(
            f"{folder} holds a run for each of several seeds ({', '.join(inner)}). Give --seeds 2 or more, or another "
            "--run."
        )
    if seeds > 1 and (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds one run, and {seeds} seeds need a folder of theirs. Give another --run.")


def _fresh(checkpoint: Path, texts: str) -> Path:
    return options.fresh_path(f"usmoe-runs/{checkpoint.resolve().name}-{Path(texts).stem}")


def _summary(found: Sequence[Scored]) -> dict[str, Any]:
    """Mean and deviation over the seeds; nothing of one."""
    if len(found) == 1:
        return {}
    said: dict[str, Any] = {}
    for name in ("accuracy", "macro_f1"):
        values = [getattr(one, name) for one in found]
        said[name] = {"mean": statistics.fmean(values), "deviation": statistics.stdev(values)}
    return said


def _view(found: Sequence[Scored], folder: Path) -> View:
    from usmoe.reproduce.view import View

    first = found[0]
    rows: list[tuple[str, ...]] = [
        (
            f"seed {one.config.seed}",
            _per_cent(one.accuracy, one.accuracy_band),
            _per_cent(one.macro_f1, one.macro_f1_band),
            f"{100 * one.best.accuracy:.1f} ({one.best.epoch:g})",
            *(["-"] * 3 if one.experts is None else _routed(one)),
            f"{one.flops / 1e6:.2f}",
            f"{one.seconds + one.test_seconds:.0f}",
        )
        for one in found
    ]
    for said in [_summary(found)] if len(found) > 1 else []:
        mean = [f"{100 * said[name]['mean']:.1f} ± {100 * said[name]['deviation']:.1f}" for name in said]
        rows.append(("mean ± deviation", *mean, *[""] * 6))
    body = "fresh parameters" if first.config.from_scratch else f"{first.start['run']} ({first.start['model']})"
    return View(
        title=f"{first.config.data.source}, {first.classes} classes: {body}"
        + (f", {first.router}" if first.router else ", dense"),
        head=(
            "run",
            "test\naccuracy, %",
            "macro F1, %",
            "selected by\n(epoch)",
            "experts\na token",
            "dropped",
            "load\nCV",
            "MFLOPs\na token",
            "seconds",
        ),
        labels=1,
        rows=tuple(rows),
        bold=(),
        says=(*_sentences(first), f"Saved: {folder}"),
    )


def _per_cent(value: float, band: tuple[float, float]) -> str:
    return f"{100 * value:.1f} ({100 * band[0]:.1f}-{100 * band[1]:.1f})"


def _routed(one: Scored) -> list[str]:
    assert one.experts is not None
    assert one.dropped is not None
    assert one.load_cv is not None
    return [f"{one.experts:.2f}", f"{100 * one.dropped:.1f} %", f"{one.load_cv:.2f}"]


def _sentences(one: Scored) -> list[str]:
    """How to read the table."""
    said = [
        f"Learnt from: {one.rows['train']}.",
        f"Selected by: {one.rows['validation']}.",
        f"Tested on: {one.rows['test']}. In brackets, 95 % of resamples of these rows.",
    ]
    if one.known:
        said.append(f"{one.known:,} of the {one.counts['test']:,} test texts stand among the training texts, too.")
    if one.cut:
        said.append(f"{one.cut:,} test texts are longer than {one.config.length} tokens; their ends were not read.")
    if one.empty:
        said.append(f"Texts without a word, of all that were read: {one.empty:,}; to the model each is a line end.")
    if one.unknown:
        share = f"{100 * one.unknown:.1f} %" if one.unknown >= 0.001 else "Less than 0.1 %"
        said.append(f"{share} of the test's tokens are unknown to the checkpoint's vocabulary; all of them read alike.")
    if not one.alone:
        said.append(
            "This router does not promise that a text's class depends on it alone, and not on others in a batch."
        )
    return said
