"""`usmoe train`: a language model from scratch, under any router."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from usmoe.cli import options
from usmoe.cli.options import AsJson, Debug, Device, Offline

if TYPE_CHECKING:
    from usmoe.train.config import TrainConfig
    from usmoe.train.loop import Finished


def train(
    config: Annotated[
        str | None,
        typer.Argument(
            help="A .toml or .json file, or a preset: enwik8, text8, wikitext103, lm1b, wikitext103-large, lm1b-large."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Without CONFIG: the text to learn from. With it: local corpora in place of the hub."),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Choose size, batch, steps and learning rate for so much time, by the speed that is measured."
        ),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="The folder of the run; without it usmoe-runs/NAME, a new one.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --run.")] = False,
    method: Annotated[
        str | None,
        typer.Option(
            help="A row of the paper's tables: usmoe, token_choice, xmoe, stablemoe; docs/training.md has all."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Its kind and size by name: transformer-xl-small, decoder-small, ...-base, ...-large."),
    ] = None,
    router: Annotated[str | None, typer.Option(help='Such as "usmoe(k=1.5)", or module:name of your own.')] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.", min=1)] = None,
    level: Annotated[str | None, typer.Option(help="Of a text: byte, char, word or bpe.")] = None,
    corrupt_mode: Annotated[
        str | None, typer.Option(help="Words become AAA (replace), or AAA is put between them (insert).")
    ] = None,
    corrupt_rate: Annotated[float | None, typer.Option(help="Share of words; without it 0.04.")] = None,
    corrupt_splits: Annotated[list[str] | None, typer.Option(help="train, validation, test; without it test.")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Any field: --set lr=1e-3 --set model.layers=6; may be repeated.")
    ] = None,
    cache: Annotated[Path, typer.Option(help="Where prepared corpora are kept.")] = Path("usmoe-runs/.corpora"),
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write events into the run's folder.")] = False,
    export: Annotated[
        Path | None, typer.Option(help="Write the best model as transformers loads it; of decoders alone.")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the configuration as JSON, and train nothing.")] = False,
    seed: Annotated[int | None, typer.Option(help="In place of the configuration's.")] = None,
    device: Device = "cpu",
    offline: Offline = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train a language model: Transformer-XL or a modern decoder with experts, and any router.

    A run that was stopped, by whatever, goes on with --resume to the same numbers. Several processes:
    accelerate launch -m usmoe train ...

    Examples: usmoe train --data book.txt --minutes 10; usmoe train enwik8 --method xmoe; usmoe train my.toml --resume
    --run usmoe-runs/my
    """
    from usmoe.train.folder import RunFolder
    from usmoe.train.loop import train as go

    if resume and run is None:
        raise typer.BadParameter("--resume goes on with a run. Say which: --run FOLDER")
    if minutes is not None and steps is not None:
        raise typer.BadParameter("--minutes chooses the steps. Give one of --minutes and --steps")
    going_on = run is not None and resume and RunFolder(run).begun
    if going_on and config is None:
        chosen = RunFolder(Path(str(run))).config()
        if minutes is not None:
            raise typer.BadParameter("The run's size is chosen already. Leave --minutes out, or begin another --run")
    else:
        chosen = _chosen(config, data)
    if data is not None and not data.is_dir():
        if str(data) != chosen.corpus.source:
            raise ValueError(
                f"--data {data} is a text, and the text of this run is {chosen.corpus.source}. Leave one out."
            )
        data = None
    elif data is not None and config is None and str(data) == chosen.corpus.source:
        data = None  # a folder of texts, which is the source itself
    if corrupt_mode is None and (corrupt_rate is not None or corrupt_splits):
        raise typer.BadParameter("--corrupt-rate and --corrupt-splits belong to --corrupt-mode, which is not given")
    asked = chosen
    chosen = _changed(
        chosen,
        method=method,
        model=model,
        top={"steps": steps, "seed": seed},
        corpus={
            "level": level,
            "corrupt_mode": corrupt_mode,
            "corrupt_rate": corrupt_rate,
            "corrupt_splits": tuple(options.listed(corrupt_splits)) if corrupt_splits else None,
        },
        router=router,
        changes=change or (),
        sized=minutes is not None,
    )
    if config is not None and Path(config).suffix in (".toml", ".json"):
        named = {one.partition("=")[0].strip() for one in change or ()}
        _refuse_discarded(Path(config), asked, chosen, named, method, model)
    folder = run or _fresh(chosen)
    if not show:  # what cannot be written is said before the work, not after it
        options.work_folder(folder, "--run")
        if export is not None:
            options.output_folder(export, False, "--export")
    if not show or minutes is not None:
        options.work_folder(cache, "--cache")
    if minutes is not None:
        chosen = _sized(chosen, minutes, data, cache, offline, device)
    if show:
        options.write_json(chosen.to_dict())
        return
    if export is not None:
        from usmoe.train.export import refuse_what_is_no_olmoe

        refuse_what_is_no_olmoe(chosen.model)
    keep_memory()
    try:
        finished = go(
            chosen,
            folder,
            cache=cache,
            data=data,
            offline=offline,
            device=device,
            resume=resume,
            tensorboard=tensorboard,
            tell=options.tell,
            begun=lambda whole: sys.stderr.write(
                f"{folder}: {whole.steps} steps of {whole.batch} x {whole.segment} tokens\n"
            ),
        )
    except KeyboardInterrupt as stop:  # which typer would end without a word
        raise typer.Abort(*stop.args) from stop
    if export is not None:
        _export(folder, export)
    _tell(finished, as_json)


def _chosen(config: str | None, data: Path | None) -> TrainConfig:
    """The configuration that is named, or that of a text."""
    from usmoe.data.corpus import Corpus
    from usmoe.models.config import MODELS
    from usmoe.train.config import TrainConfig, read_config
    from usmoe.train.presets import PRESETS

    if config is None:
        if data is None:
            raise typer.BadParameter("Give a configuration (usmoe train enwik8), or a text (usmoe train --data FILE)")
        if not data.exists():
            raise ValueError(f"There is no text {data}. Give a file, or a folder with train, validation and test.")
        small: dict[str, Any] = dict(batch=8, segment=128, memory=128, steps=3000, lr=2e-3, warmup=100)
        return TrainConfig(corpus=Corpus(source=str(data)), model=MODELS["transformer-xl-small"], **small)
    if config in PRESETS:
        return PRESETS[config]
    if Path(config).suffix in (".toml", ".json"):
        return read_config(Path(config))
    raise ValueError(f"There is no preset {config!r}. Known: {', '.join(PRESETS)}; or give a .toml or .json file.")


def _refuse_discarded(
    path: Path, before: TrainConfig, after: TrainConfig, named: Collection[str], method: str | None, model: str | None
) -> None:
    """Refuse --method and --model where a value that the file states would be lost to them without a word: not the
    router of --method, which is what it is, and not what --set names."""
    from usmoe.train.config import read_tables
    from usmoe.train.methods import REPLACED

    stated = read_tables(path)
    inner = stated.get("model")
    fields = {f"model.{name}" for name in inner} - {"model.like"} if isinstance(inner, Mapping) else set()
    gone = [
        (name, flag)
        for name in [*(name for name in stated if name != "model"), *sorted(fields)]
        for flag in [f"--method {method}" if name in REPLACED else f"--model {model}"]
        if (method is not None if name in REPLACED else model is not None and name in fields)
        and name not in named
        and _at(before, name) != _at(after, name)
    ]
    if gone:
        name, flag = gone[0]
        raise ValueError(
            f"{path} states {name} = {json.dumps(_at(before, name))}, and {flag} makes it "
            f"{json.dumps(_at(after, name))}. Take it out of the file, or say which: --set {name}=VALUE."
        )


def _at(config: TrainConfig, name: str) -> Any:
    """A field by its name, of the model behind a dot."""
    return functools.reduce(getattr, name.split("."), config)


CHOSEN = ("batch", "segment", "memory", "steps", "lr", "warmup", "evaluate_every", "checkpoint_every", "log_every")
CHOSEN += ("evaluation", "model.layers", "model.d_model", "model.heads", "model.head_size", "model.d_ff", "accumulate")
"""Fields that --minutes chooses; those of a configuration are replaced."""


def _changed(
    config: TrainConfig,
    *,
    method: str | None,
    model: str | None,
    top: Mapping[str, Any],
    corpus: Mapping[str, Any],
    router: str | None,
    changes: Sequence[str],
    sized: bool,
) -> TrainConfig:
    """The configuration with what the options say; all at once, so that no state between is refused."""
    from usmoe.train.config import TrainConfig
    from usmoe.train.methods import method as method_of

    if method is not None:
        config = method_of(method).apply(config)
    said = config.to_dict()
    if model is not None:
        said["model"] = {"like": model, **{name: said["model"][name] for name in ("router", "gate", "moving")}}
    said |= {name: value for name, value in top.items() if value is not None}
    said["corpus"] |= {name: value for name, value in corpus.items() if value is not None}
    if router is not None:
        from usmoe.routing.text import parse_router

        parse_router(router)  # a wrong text is refused before anything is read
        said["model"]["router"] = router
    named = [_set(said, one) for one in changes]
    if sized and (twice := [name for name in named if name.split(".")[0] == "evaluation" or name in CHOSEN]):
        raise typer.BadParameter(f"--minutes chooses {', '.join(twice)}. Give one of --minutes and --set {twice[0]}")
    if top["steps"] is not None and "warmup" not in named:  # a warm-up that nobody asked for
        said["warmup"] = min(said["warmup"], top["steps"] // 10)
    return TrainConfig.from_dict(said)


def _set(said: dict[str, Any], one: str) -> str:
    """Put name=value into the tables; the name."""
    name, equals, text = one.partition("=")
    if not equals:
        raise typer.BadParameter(f"--set {one} sets nothing. Write --set lr=1e-3, or --set model.layers=6")
    *tables, field = [part.strip() for part in name.split(".")]
    if name.strip() == "model.like":
        raise typer.BadParameter(f"--set {one} would change nothing. Write --model {text.strip()}")
    inner = said
    for table in tables:
        if table not in ("corpus", "model", "evaluation") or inner is not said:
            raise ValueError(f"--set {one}: there is no table {table!r}. Known: corpus, model, evaluation.")
        inner[table] = inner[table] or {}  # an evaluation as in training
        inner = inner[table]
    inner[field] = _value(text.strip())
    return name.strip()


def _value(text: str) -> Any:
    """What is written as JSON writes it; else a text."""
    try:
        return json.loads({"none": "null", "None": "null", "True": "true", "False": "false"}.get(text, text))
    except ValueError:
        return text


def _sized(
    config: TrainConfig, minutes: float, data: Path | None, cache: Path, offline: bool, device: str
) -> TrainConfig:
    from usmoe.data.prepare import prepare
    from usmoe.train.loop import resolved
    from usmoe.train.size import suggest

    prepared = prepare(config.corpus, cache, data=data, offline=offline)
    plain = dataclasses.replace(config, model=config.model.replace(vocabulary=None))
    precise = resolved(plain, prepared, device)
    keep_memory()
    found = suggest(
        precise,
        minutes,
        len(prepared.train),
        prepared.vocabulary.size,
        device,
        lambda line: sys.stderr.write(f"{line}\n"),
    )
    return found.config


def _export(folder: Path, export: Path) -> None:
    import torch

    from usmoe.data.tokenizer import for_transformers
    from usmoe.train.export import export as write
    from usmoe.train.folder import load_run

    trained = load_run(folder, tell=options.tell)
    context = trained.config.segment
    tokenizer = for_transformers(trained.vocabulary, context)
    precision = trained.config.precision  # a run in bfloat16 loses nothing that it computed with
    write(trained.model, tokenizer, export, context=context, dtype=getattr(torch, precision))
    sys.stderr.write(f"Exported: {export} ({precision})\n")


def keep_memory() -> None:
    """Let glibc keep freed memory: fresh pages for every activation cost up to a third of a step on a CPU."""
    import ctypes

    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-4, 0)  # M_MMAP_MAX
            libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def _fresh(config: TrainConfig) -> Path:
    name = Path(config.corpus.source).name.split(".")[0] or "run"
    return options.fresh_path(f"usmoe-runs/{name}")


def _tell(finished: Finished, as_json: bool) -> None:
    from usmoe.cli.views import print_view
    from usmoe.reproduce.view import View
    from usmoe.train.folder import RunFolder

    rows = [row for row in RunFolder(finished.folder).rows() if "validation" in row]
    if as_json:
        options.write_json(
            {"run": str(finished.folder), "step": finished.step, "unit": finished.unit, "evaluations": rows}
        )
        return
    figure = next(name for name in rows[-1] if name.startswith("validation_"))
    best = min(rows, key=lambda row: row["validation"])
    named = {"validation_bits": f"bits a {finished.unit}", "validation_perplexity": "perplexity a word"}[figure]
    view = View(
        title=f"Validation, {named}",
        head=("step", named),
        labels=1,
        rows=tuple((str(row["step"]), f"{row[figure]:.4f}") for row in rows),
        bold=((rows.index(best), 1),),
        says=(f"Saved: {finished.folder} (the best model, and the last). Next: usmoe eval {finished.folder}",),
    )
    print_view(view)
