"""`usmoe tune`: a cheaper model: what each budget costs, and the routers that spend it best."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from usmoe.cli import options
from usmoe.cli.options import AsJson, Debug, Device, Dtype, Force, Offline, Seed, Text

if TYPE_CHECKING:
    from usmoe.cli.tokens import Corpus
    from usmoe.hf.compare import Row
    from usmoe.hf.layers import Layer
    from usmoe.routing import USMoE


def tune(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help='A folder, a hub id, or "shipped".')],
    budget: Annotated[
        list[str], typer.Option(help='Experts a token: a number, or "0.75x" of the model\'s own; may be given again.')
    ] = ["0.75x"],  # noqa: B006
    text: Text = None,
    tokens: Annotated[int, typer.Option(help="Tokens to tune on, and to measure on, at most.", min=32)] = 8192,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.", min=8)] = 512,
    output: Annotated[
        Path | None, typer.Option(help="Write the routers of the last budget, as JSON for `usmoe patch --router`.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the frontier: .png, .svg or .pdf.")] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write the model with the routers of the last budget into this folder.")
    ] = None,
    force: Force = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    offline: Offline = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Find where a model can do with fewer experts: tune thresholds on one part of a text, measure on another.

    Three ways to spend each budget are compared: fewer of the model's own top-k, a threshold a layer with the budget
    spread evenly, and the tuned one, where layers compete for it. All are causal, so the figures are honest.

    Example: usmoe tune shipped --budget 0.75x --budget 0.5x --plot frontier.png
    """
    import torch

    from usmoe.cli.measure import measure
    from usmoe.cli.routers import load_beside, saved_contender
    from usmoe.cli.tokens import corpus
    from usmoe.hf.frontier import frontier
    from usmoe.hf.patch import supported_layers
    from usmoe.hf.tune import trials
    from usmoe.routing import USMoE

    nowhere = output is None and plot is None and save is None
    options.refuse_unread(context, (nowhere, ("force",), "for --output, --plot and --save, and none is given"))
    targets = [options.output_path(output, force), options.picture_path(plot, force)]
    folder = options.output_folder(save, force)
    budgets = [USMoE(k=_as_budget(one)).k for one in budget]
    torch.manual_seed(seed)
    loaded, tokenizer = load_beside(model, dtype=dtype, device=device, offline=offline)
    layers = supported_layers(loaded)
    data = corpus(tokenizer, loaded, text, tokens, length)
    runs = len(budgets) * trials(len(layers))
    with tqdm(total=runs, file=sys.stderr, disable=None, unit="pass", leave=False, desc="tuning") as bar:

        def tick() -> None:
            bar.update()

        entries = frontier(loaded, data.calibration, budgets, tick=tick)
    entries[1:1] = saved_contender(loaded)
    rows = measure(loaded, data, entries, 0, seed)
    best = entries[-1].router
    about = {"model": model, "text": data.source, "tokens": data.tokens.numel(), "length": data.tokens.shape[1]}
    about |= {"routers": {layer.name: str(router) for layer, router in zip(layers, best, strict=True)}, "seed": seed}
    try:  # a full disk then costs a file, not the search; and a pipe that was closed costs no file
        if as_json:
            options.write_json(about | {"rows": [row.to_dict() for row in rows]})
        else:
            _print(model, len(layers), data, rows, best, dtype)
    finally:
        _write(loaded, tokenizer, layers, rows, best, targets, folder, f"{model}: {data.source}")


def _print(model: str, layers: int, data: Corpus, rows: Sequence[Row], best: list[USMoE], dtype: str) -> None:
    from usmoe.cli.table import print_rows

    heading = f"{model}: {layers} MoE layers. Text: {data.source}; {data.tokens.numel():,} tokens."
    split = ", ".join(f"{router.k:.2f}" for router in best)
    print_rows(heading, rows, dtype, f"tuned        experts a token by layer, last budget: {split}")


def _as_budget(text: str) -> float | str:
    """A number where the text is one; what is neither that nor a share is refused by the router."""
    try:
        return float(text)
    except ValueError:
        return text


def _write(
    model: Any,
    tokenizer: Any,
    layers: Sequence[Layer],
    rows: Sequence[Row],
    best: list[USMoE],
    targets: Sequence[Path | None],
    folder: Path | None,
    title: str,
) -> None:
    """Routers and plot into `targets`, the patched model into the folder, where they are asked for."""
    from usmoe.cli.routers import save_model, write_routers
    from usmoe.hf.frontier import WAYS
    from usmoe.hf.patch import patch
    from usmoe.report.frontier import frontier_plot

    routers, plot = targets
    if routers is not None:
        write_routers(routers, {layer.name: router for layer, router in zip(layers, best, strict=True)})
    if plot is not None:
        own = rows[0]
        points = {way: [(1.0, 0.0)] for way in WAYS}
        for way, row in ((way, row) for way in WAYS for row in rows if row.label.startswith(f"{way}, ")):
            points[way].append((row.moe_flops / own.moe_flops, row.bits_per_byte - own.bits_per_byte))
        frontier_plot(plot, points, title)
    if folder is not None:
        save_model(patch(model, best), tokenizer, folder)
