"""`usmoe patch`: one router on one model, beside the model's own choice."""

from __future__ import annotations

from typing import Annotated

import typer

from usmoe.cli import options
from usmoe.cli.options import AsJson, Debug, Device, Dtype, Offline, Seed, Text


def patch(
    model: Annotated[str, typer.Argument(help='A folder, a hub id, or "shipped".')],
    router: Annotated[
        str, typer.Option(help='Such as "usmoe(k=0.75x)", "own_choice(k=6)", or package.module:name of your own.')
    ],
    calibrated: Annotated[
        bool, typer.Option("--calibrate", help="Find thresholds at the router's budget first, and use those: causal.")
    ] = False,
    text: Text = None,
    tokens: Annotated[int, typer.Option(help="Tokens to measure on, at most.", min=32)] = 8192,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.", min=8)] = 512,
    positions: Annotated[
        int, typer.Option(help="Positions at which the honest perplexity is taken; 0 leaves it out.", min=0)
    ] = 50,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    offline: Offline = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Patch a model with a router and measure both on text: the model's own choice, and yours.

    Example: usmoe patch shipped --router "usmoe(k=0.75x)" --calibrate
    """
    import torch

    from usmoe import parse_router
    from usmoe.cli.measure import measure
    from usmoe.cli.table import print_rows
    from usmoe.cli.tokens import corpus
    from usmoe.hf.compare import Contender, settled
    from usmoe.hf.load import load
    from usmoe.hf.patch import supported_layers
    from usmoe.routing import ExpertChoice, OwnChoice, USMoE

    chosen = parse_router(router)
    if calibrated and not isinstance(chosen, USMoE | ExpertChoice):
        raise ValueError(f"--calibrate finds thresholds for usmoe and expert_choice routers, not for {router}.")
    torch.manual_seed(seed)
    loaded, tokenizer = load(None if model == "shipped" else model, dtype=dtype, device=device, offline=offline)
    layers = supported_layers(loaded)
    data = corpus(tokenizer, loaded, text, tokens, length)
    entries = [
        Contender(label="the model's own choice", router=OwnChoice()),
        Contender(label=f"{router}, calibrated" if calibrated else router, router=chosen, calibrated=calibrated),
    ]
    entries = settled(loaded, entries, data.calibration)
    rows = measure(loaded, data, entries, positions, seed)
    about = {
        "model": model,
        "text": data.source,
        "tokens": data.tokens.numel(),
        "length": data.tokens.shape[1],
        "layers": [
            {"layer": layer.name, "experts": layer.num_experts, "own_choice": str(layer.host)} for layer in layers
        ],
        "seed": seed,
    }
    if as_json:
        options.write_json(about | {"rows": [row.to_dict() for row in rows]})
    else:
        print_rows(f"{model}: {len(layers)} MoE layers, all patched. Text: {data.source}.", rows)
