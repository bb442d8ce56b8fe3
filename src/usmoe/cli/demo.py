"""`usmoe demo`: what routing does to a language model, on real text, in one table and one picture."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from usmoe.cli import options
from usmoe.cli.options import AsJson, Debug, Device, Dtype, Force, Model, Offline, Seed, Text


def demo(
    context: typer.Context,
    model: Model = None,
    text: Text = None,
    tokens: Annotated[int, typer.Option(help="Tokens to measure on, at most.", min=32)] = 16384,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.", min=8)] = 512,
    positions: Annotated[
        int, typer.Option(help="Positions at which the honest perplexity is taken; 0 leaves it out.", min=0)
    ] = 120,
    output: Annotated[
        Path | None, typer.Option(help="The router maps: .png, .svg or .pdf; without it a new usmoe-demo.png here.")
    ] = None,
    force: Force = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    offline: Offline = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare routers on one model and one text: perplexity, experts, drops, load, FLOPs.

    Example: usmoe demo --model allenai/OLMoE-1B-7B-0924 --dtype bfloat16 --text book.txt
    """
    options.refuse_unread(context, (output is None, ("force",), "for the file of --output, which is not given"))
    target = options.picture_path(output, force, "--output")
    if output is None and importlib.util.find_spec("matplotlib") is not None:
        target = options.picture_path(options.fresh_path("usmoe-demo.png"), False, "--output")
    import torch

    from usmoe.cli.measure import measure
    from usmoe.cli.routers import load_beside, saved_contender
    from usmoe.cli.table import print_rows, rounding
    from usmoe.cli.tokens import corpus
    from usmoe.hf.compare import contenders, settled
    from usmoe.hf.patch import supported_layers

    torch.manual_seed(seed)
    loaded, tokenizer = load_beside(model, dtype=dtype, device=device, offline=offline)
    layers = supported_layers(loaded)
    host = layers[0].host
    assert host is not None
    assert host.k is not None
    data = corpus(tokenizer, loaded, text, tokens, length)
    entries = settled(loaded, contenders(host.k), data.calibration)
    entries[1:1] = saved_contender(loaded)
    rows = measure(loaded, data, entries, positions, seed)
    picture, unwritten = None, None
    try:
        picture = _picture(loaded, tokenizer, data, entries, target)
    except OSError as error:  # the figures took minutes: they are shown all the same
        unwritten = error
    about = {
        "model": "novelist (ships with usmoe)" if model in (None, "shipped") else model,
        "text": data.source,
        "tokens": data.tokens.numel(),
        "length": data.tokens.shape[1],
        "layers": len(layers),
        "experts": layers[0].num_experts,
        "experts_per_token": host.k,
        "dtype": dtype,
        "rounding": rounding(rows, dtype),
        "seed": seed,
        "picture": None if picture is None else str(picture),
    }
    if as_json:
        options.write_json(about | {"rows": [row.to_dict() for row in rows]})
    else:
        heading = (
            f"{about['model']}: {len(layers)} MoE layers of {layers[0].num_experts} experts, {host.k} a token. "
            f"Text: {data.source}; {data.tokens.numel():,} tokens in sequences of {data.tokens.shape[1]}."
        )
        print_rows(heading, rows, dtype, "" if picture is None else f"Router maps: {picture}")
    if unwritten is not None:
        raise unwritten


def _picture(model: Any, tokenizer: Any, data: Any, entries: Any, target: Path | None) -> Path | None:
    """Write the router maps of the first words of the text; without a target, which nothing here can draw, say so on
    stderr."""
    if target is None:
        sys.stderr.write("No picture: it needs matplotlib. Install it: pip install 'usmoe[viz]'.\n")
        return None
    import torch

    from usmoe.hf.patch import patched
    from usmoe.hf.record import record
    from usmoe.report.maps import router_maps

    said = {}
    for entry in entries:
        if entry.title is None:
            continue
        with torch.no_grad(), patched(model, entry.router), record(model) as trace:
            model(input_ids=data.tokens[:1].to(model.device), use_cache=False)
        said[entry.title] = dict(list(trace.last.items())[:8])
    words = [tokenizer.decode([token]) for token in data.tokens[0, :24].tolist()]
    router_maps(target, said, words)
    return target
