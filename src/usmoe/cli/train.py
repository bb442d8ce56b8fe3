"""`usmoe train`: a language model from scratch, under any router."""

from __future__ import annotations

import dataclasses
import json
import sys
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
        str | None, typer.Argument(help="A .toml or .json file, or a preset: enwik8, text8, wikitext103, lm1b.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Without CONFIG: the text to learn from. With it: local corpora in place of the hub."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Choose a size of model for so much time, by the speed that is measured here.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="The folder of the run; without it usmoe-runs/NAME, a new one.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --run.")] = False,
    method: Annotated[
        str | None, typer.Option(help="A method of the paper's tables: usmoe, token_choice, xmoe, stablemoe, ...")
    ] = None,
    router: Annotated[str | None, typer.Option(help='Such as "usmoe(k=1.5)", or module:name of your own.')] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.", min=1)] = None,
    level: Annotated[str | None, typer.Option(help="Of a text: byte, char, word or bpe.")] = None,
    corrupt_mode: Annotated[
        str | None, typer.Option(help="Words become AAA (replace), or AAA is put between them (insert).")
    ] = None,
    corrupt_rate: Annotated[float, typer.Option(help="Share of words.")] = 0.04,
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
    begun = RunFolder(run) if run is not None and resume and RunFolder(run).begun else None
    if begun is not None and config is None:
        chosen = begun.config()
        data = None if data is not None and str(data) == chosen.corpus.source else data
        if minutes is not None:
            raise typer.BadParameter("The run's size is chosen already. Leave --minutes out, or begin another --run")
    else:
        chosen, data = _chosen(config, data, level)
    chosen = _changed(
        chosen, method, router, steps, seed, change or (), corrupt_mode, corrupt_rate, tuple(corrupt_splits or ())
    )
    if minutes is not None:
        chosen = _sized(chosen, minutes, data, cache, offline, device)
    if show:
        options.write_json(chosen.to_dict())
        return
    folder = run or _fresh(chosen)
    sys.stderr.write(f"{folder}: {chosen.steps} steps of {chosen.batch} x {chosen.segment} tokens\n")
    if export is not None:
        from usmoe.train.export import refuse_what_is_no_olmoe

        refuse_what_is_no_olmoe(chosen.model)  # asked before the work, not after it
        options.output_folder(export, force=False)
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
        )
    except KeyboardInterrupt as stop:  # which typer would end without a word
        raise typer.Abort(*stop.args) from stop
    if export is not None:
        _export(folder, export)
    _tell(finished, as_json)


def _chosen(config: str | None, data: Path | None, level: str | None) -> tuple[TrainConfig, Path | None]:
    """The configuration, and the folder in place of the hub."""
    from usmoe.data.corpus import Corpus
    from usmoe.models.config import MODELS
    from usmoe.train.config import TrainConfig, read_config
    from usmoe.train.presets import PRESETS

    if config is None:
        if data is None:
            raise typer.BadParameter("Give a configuration (usmoe train enwik8), or a text (usmoe train --data FILE)")
        fields: dict[str, Any] = {"source": str(data)} | ({} if level is None else {"level": level})
        small: dict[str, Any] = dict(batch=8, segment=128, memory=128, steps=3000, lr=2e-3, warmup=100)
        return TrainConfig(corpus=Corpus(**fields), model=MODELS["transformer-xl-small"], **small), None
    if config in PRESETS:
        chosen = PRESETS[config]
    elif Path(config).suffix in (".toml", ".json"):
        chosen = read_config(Path(config))
    else:
        raise ValueError(f"There is no preset {config!r}. Known: {', '.join(PRESETS)}; or give a .toml or .json file.")
    return (chosen if level is None else chosen.replace(corpus__level=level)), data


def _changed(
    config: TrainConfig,
    method: str | None,
    router: str | None,
    steps: int | None,
    seed: int | None,
    changes: Any,
    corrupt_mode: str | None,
    corrupt_rate: float,
    corrupt_splits: tuple[str, ...],
) -> TrainConfig:
    """The configuration with what the options say; all at once, so that no state between is refused."""
    from usmoe.train.config import TrainConfig
    from usmoe.train.methods import method as method_of

    if method is not None:
        config = method_of(method).apply(config)
    said = config.to_dict()
    for name, value in (("steps", steps), ("seed", seed)):
        if value is not None:
            said[name] = value
    if router is not None:
        from usmoe.routing.text import parse_router

        parse_router(router)  # a wrong text is refused before anything is read
        said["model"]["router"] = router
    if corrupt_mode is not None:
        said["corpus"] |= {"corrupt_mode": corrupt_mode, "corrupt_rate": corrupt_rate}
        said["corpus"] |= {"corrupt_splits": corrupt_splits} if corrupt_splits else {}
    for one in changes:
        name, equals, text = one.partition("=")
        if not equals:
            raise typer.BadParameter(f"--set {one} sets nothing. Write --set lr=1e-3, or --set model.layers=6")
        place, *path = [part.strip() for part in name.split(".")][::-1]
        inner = said
        for part in reversed(path):
            if not isinstance(inner.get(part), dict):
                raise ValueError(f"--set {one}: there is no table {part!r}. Known: corpus, model, evaluation.")
            inner = inner[part]
        inner[place] = _value(text.strip())
    return TrainConfig.from_dict(said)


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
    from usmoe.data.bpe import Pieces
    from usmoe.train.export import export as write
    from usmoe.train.folder import load_run

    trained = load_run(folder)
    words, context = trained.vocabulary, trained.config.segment
    tokenizer = words.for_transformers(context) if isinstance(words, Pieces) else None
    write(trained.model, tokenizer, export, context=context)
    without = "" if tokenizer else " (without a tokenizer, which level=bpe has)"
    sys.stderr.write(f"Exported: {export}{without}\n")


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
    Path("usmoe-runs").mkdir(exist_ok=True)
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
