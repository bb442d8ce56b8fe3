"""`usmoe patch`: one router on one model, beside the model's own choice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from usmoe.cli import options
from usmoe.cli.options import AsJson, Debug, Device, Dtype, Force, Offline, Seed, Text


def patch(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help='A folder, a hub id, or "shipped".')],
    router: Annotated[
        str | None,
        typer.Option(
            help='Such as "usmoe(k=0.75x)" or "own_choice(k=6)"; own: the model\'s own choice; saved: the routers that '
            "it was saved with; package.module:name of your own; or a .json file that usmoe tune wrote."
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only say what each MoE layer does, and whether it can be patched.")
    ] = False,
    calibrated: Annotated[
        bool, typer.Option("--calibrate", help="Find thresholds at the router's budget first, and use those: causal.")
    ] = False,
    save: Annotated[
        Path | None, typer.Option(help="Write the patched model into this folder, for usmoe.from_pretrained().")
    ] = None,
    force: Force = False,
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

    Examples: usmoe patch allenai/OLMoE-1B-7B-0924 --check; usmoe patch shipped --router "usmoe(k=0.75x)" --calibrate
    """
    import torch

    from usmoe.cli.info import print_layers
    from usmoe.cli.measure import measure
    from usmoe.cli.routers import chosen, load_beside, refuse_none_saved, save_model, saved_contender, saved_with
    from usmoe.cli.table import print_rows, rounding
    from usmoe.cli.tokens import corpus
    from usmoe.hf.compare import Contender, settled
    from usmoe.hf.load import load_model
    from usmoe.hf.patch import patch as patch_model
    from usmoe.hf.patch import routers, supported_layers
    from usmoe.hf.supported import supported
    from usmoe.routing import ExpertChoice, OwnChoice, USMoE

    measuring = ("router", "calibrated", "save", "force", "text", "tokens", "length", "positions")
    options.refuse_unread(
        context,
        (check, measuring, "for a model that is patched, and --check only looks"),
        (save is None, ("force",), "for the folder of --save, which is not given"),
    )
    if check:
        saved = saved_with(model, offline, "usmoe runs it under them unless --router says otherwise")
        loaded = load_model(model, router={}, dtype=dtype, device=device, offline=offline)
        print_layers(model, supported(loaded), saved, as_json)
        supported_layers(loaded)  # says in a sentence where the model cannot be patched
        return
    if router is None:
        raise typer.BadParameter('Missing option --router: give one, such as "usmoe(k=0.75x)", or --check')
    choice = chosen(router)
    if calibrated and not isinstance(choice, USMoE | ExpertChoice | Mapping | None):
        raise ValueError(f"--calibrate finds thresholds for usmoe and expert_choice routers, not for {router}.")
    folder = options.output_folder(save, force)
    torch.manual_seed(seed)
    loaded, tokenizer = load_beside(model, dtype=dtype, device=device, offline=offline)
    refuse_none_saved(router, routers(loaded), model)
    layers = supported_layers(loaded)
    saved = [] if router == "saved" else saved_contender(loaded)
    choice = routers(loaded) if choice is None else choice
    data = corpus(tokenizer, loaded, text, tokens, length)
    entries = [
        Contender(label="the model's own choice", router=OwnChoice()),
        *saved,
        Contender(label=f"{router}, calibrated" if calibrated else router, router=choice, calibrated=calibrated),
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
        "dtype": dtype,
        "rounding": rounding(rows, dtype),
        "seed": seed,
    }
    try:
        if as_json:
            options.write_json(about | {"rows": [row.to_dict() for row in rows]})
        else:
            print_rows(f"{model}: {len(layers)} MoE layers, all patched. Text: {data.source}.", rows, dtype)
    finally:  # also where stdout was closed
        if folder is not None:
            save_model(patch_model(loaded, entries[-1].router), tokenizer, folder)
