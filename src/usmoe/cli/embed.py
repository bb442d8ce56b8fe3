"""`usmoe embed`: a vector for each text of a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from usmoe.cli import options
from usmoe.cli.options import AsJson, Debug, Device, Offline, Seed

if TYPE_CHECKING:
    from usmoe.embed.encoder import Encoder
    from usmoe.embed.stream import Written


def embed(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help='A folder, a saved encoder\'s too; a hub id; or "shipped".')],
    texts: Annotated[str, typer.Argument(help="UTF-8, a text a line; .jsonl; .parquet; or - for lines from stdin.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write: .npy, .parquet or .jsonl.")],
    column: Annotated[str | None, typer.Option(help='Of .jsonl and .parquet: where the text stands; "text".')] = None,
    router: Annotated[
        str | None,
        typer.Option(
            help='Such as "usmoe(alpha=0.5)"; package.module:name of your own; a .json file that usmoe tune wrote; '
            "own: the model's own choice. Without it, or as saved: the routers that the model was saved with."
        ),
    ] = None,
    embedding: Annotated[str | None, typer.Option(help="hidden (without it), router, or moee: both.")] = None,
    prompt: Annotated[str | None, typer.Option(help='A name such as "prompteol", or a template with {text}.')] = None,
    pooling: Annotated[str | None, typer.Option(help="last (without it), mean or weighted_mean.")] = None,
    moee: Annotated[str | None, typer.Option(help="concat (without it) or sum.")] = None,
    w: Annotated[float | None, typer.Option("--w", help="Weight of the routers in the sum; 1 without it.")] = None,
    router_features: Annotated[str | None, typer.Option(help="logits (without it) or probabilities.")] = None,
    layers: Annotated[str | None, typer.Option(help='MoE layers whose routers count, as "0,3,-1"; all.')] = None,
    standardize: Annotated[
        str | None, typer.Option(help='"novels", or a file with a text a line: the sample to standardise over.')
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of prompt and text that are read, at most.")] = None,
    instruction: Annotated[str | None, typer.Option(help="Put before each text, in the wrapper of MoEE.")] = None,
    batch_size: Annotated[int, typer.Option(help="Texts in a batch.", min=1)] = 32,
    processes: Annotated[int, typer.Option(help="Processes, each with the model.", min=1)] = 1,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite the output, and begun work that cannot be gone on with.")
    ] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; without it float32, or that of a saved encoder.")
    ] = None,
    offline: Offline = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Embed the texts of a file: row i of the output is text i, counted from 0, empty ones included.

    Whatever stops it, the same command goes on where it was; --batch-size and --processes may be others then.

    Example: usmoe embed shipped texts.txt -o vectors.npy --embedding moee --router "usmoe(alpha=0.5)"
    """
    import torch

    from usmoe.embed.rows import texts_of
    from usmoe.embed.stream import embed_file
    from usmoe.embed.writers import writer_of

    if not _is_saved(model):
        from usmoe.embed.settings import unread

        of_what = embedding or "hidden"
        combined = f" and --moee {moee or 'concat'}" if of_what == "moee" else ""
        without = unread(of_what, moee or "concat")
        options.refuse_unread(context, (True, without, f"not read under --embedding {of_what}{combined}"))
    target = options.output_path(output, force)
    assert target is not None
    writer_of(target)
    if texts != "-":
        next(texts_of(texts, column), None)  # what is wrong with the names is said before a model is loaded
    torch.manual_seed(seed)
    given = {
        "embedding": embedding,
        "prompt": prompt,
        "pooling": pooling,
        "moee": moee,
        "w": w,
        "router_features": router_features,
        "layers": None if layers is None else [_as_layer(layer) for layer in layers.split(",")],
        "standardize": standardize,
        "max_length": max_length,
    }
    encoder = _encoder(model, {"router": router, "dtype": dtype}, given, device, offline)
    if not encoder.text_alone:
        from usmoe.types import SAY_SO, makes_promises

        if all(map(makes_promises, encoder.routers.values())):
            _warn("under this router, a vector depends on the other texts of its batch, too.")
        else:
            _warn(f"this router does not promise that a vector depends on its text alone. {SAY_SO}")
    try:
        written = embed_file(
            encoder,
            texts,
            target,
            column=column,
            instruction=instruction,
            batch_size=batch_size,
            processes=processes,
            force=force,
        )
    except KeyboardInterrupt as stop:  # which typer would end without a word
        raise typer.Abort(*getattr(stop, "__notes__", ())) from stop
    if written.empty:
        _warn(f"{written.empty:,} of {written.rows:,} texts are empty; they have rows as any other.")
    if written.cut:
        limit = f"{encoder.max_length} tokens"
        _warn(f"{written.cut:,} of {written.rows:,} texts are longer than {limit}; their ends were cut off.")
    _print(written, as_json)


def _encoder(model: str, over: dict[str, Any], given: dict[str, Any], device: str, offline: bool) -> Encoder:
    """The encoder that lies in a folder, or one of a model with the settings that were given; over: what either takes.
    What is None was not given."""
    from usmoe.cli.routers import chosen, refuse_none_saved, saved_with
    from usmoe.embed.encoder import Encoder

    over, given = ({name: value for name, value in one.items() if value is not None} for one in (over, given))
    router = over.pop("router", None)
    choice = chosen(router)
    saved = saved_with(model, offline, "this is under them" if choice is None else f"this is under {router}")
    refuse_none_saved(router, saved, model)
    over |= {} if choice is None else {"router": choice}
    if not _is_saved(model):
        return Encoder(model, device=device, offline=offline, **over, **given)
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{model} is a saved encoder, whose settings are its own. Leave out {flags}.")
    return Encoder.load(model, device=device, **over)


def _is_saved(model: str) -> bool:
    """Whether a folder holds an encoder that was saved."""
    return (Path(model) / "usmoe_encoder.json").is_file()


def _as_layer(text: str) -> int | str:
    """An index where the text is one, else a name."""
    try:
        return int(text)
    except ValueError:
        return text.strip()


def _warn(line: str) -> None:
    sys.stderr.write(f"usmoe: {line}\n")


def _print(written: Written, as_json: bool) -> None:
    done = written.rows - written.kept
    rate = done / written.seconds
    if as_json:
        said = {name: getattr(written, name) for name in ("rows", "dimension", "kept", "seconds", "empty", "cut")}
        said |= {"output": str(written.output), "rows_per_second": rate, "settings": written.settings}
        options.write_json(said)
        return
    kept = f", {written.kept:,} of them in earlier runs" if written.kept else ""
    sys.stdout.write(
        f"{written.output}: {written.rows:,} vectors of {written.dimension:,} numbers{kept}.\n"
        f"{written.seconds:,.1f} s, {rate:,.0f} texts a second.\n"
    )
