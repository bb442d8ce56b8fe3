"""`usmoe info`: what is installed, which routers there are and what they promise, what a model is made of."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from usmoe.cli import options
from usmoe.cli.options import AsJson, Debug, Device, Dtype, Offline, Seed

_OPTIONAL = ("transformers", "tokenizers", "safetensors", "accelerate", "peft", "bitsandbytes", "matplotlib")


def info(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help='A folder, a hub id, or "shipped"; without it usmoe itself.')
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    offline: Offline = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what is installed and what the routers promise; with MODEL, what each of its MoE layers does.

    Example: usmoe info allenai/OLMoE-1B-7B-0924
    """
    options.refuse_unread(context, (model is None, ("dtype", "device"), "of a model, and none is given"))
    said = _of_usmoe() if model is None else _of_model(model, seed, dtype, device, offline)
    if as_json:
        options.write_json(said)
        return
    console = options.console()
    for title, part in said.items():
        if isinstance(part, list):
            _table(console, title, part)
        else:
            console.print(f"{title:14s}{part}", highlight=False, markup=False)


def _of_usmoe() -> dict[str, Any]:
    import torch

    from usmoe import ROUTERS, __version__
    from usmoe.models import SHIPPED

    versions = {"usmoe": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in _OPTIONAL:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    promises = []
    for router in _examples(ROUTERS):
        promises.append({"router": str(router)} | dataclasses.asdict(router.promises))
    return versions | {"devices": ", ".join(devices), "shipped model": str(SHIPPED), "routers": promises}


def _examples(routers: dict[str, Any]) -> list[Any]:
    """Every router, with every pool that it knows."""
    found = []
    for router in routers.values():
        field = next((f for f in dataclasses.fields(router) if f.name == "pool"), None)
        if field is None:
            found.append(router())
        else:
            from typing import get_args, get_type_hints

            found += [router(pool=pool) for pool in get_args(get_type_hints(router)["pool"])]
    return found


def _of_model(model: str, seed: int, dtype: str, device: str, offline: bool) -> dict[str, Any]:
    import torch

    from usmoe.cli.routers import in_words, saved_with
    from usmoe.hf.load import load_model
    from usmoe.hf.supported import supported

    torch.manual_seed(seed)
    saved = saved_with(model, offline, "usmoe runs it under them unless --router says otherwise")
    loaded = load_model(model, router={}, dtype=dtype, device=device, offline=offline)
    rows = with_saved(supported(loaded), saved)
    if not rows:
        raise ValueError(f"{model} ({type(loaded).__name__}) has no MoE layer that transformers declares.")
    parameters = sum(p.numel() for p in loaded.parameters())
    return {
        "model": model,
        "class": type(loaded).__name__,
        "parameters": f"{parameters:,}",
        "saved with": in_words(saved) if saved else "no routers of usmoe: its own choice",
        "layers": rows,
    }


def with_saved(layers: list[Any], saved: Mapping[str, str]) -> list[dict[str, Any]]:
    """A row a MoE layer, of `usmoe.supported()`, with the router that it was saved with, where there are such."""
    return [dataclasses.asdict(row) | ({"saved_with": saved.get(row.layer)} if saved else {}) for row in layers]


def print_layers(model: str, layers: list[Any], saved: Mapping[str, str], as_json: bool) -> None:
    """A row a MoE layer, as `with_saved` has it."""
    rows = with_saved(layers, saved)
    if as_json:
        options.write_json({"model": model, "layers": rows})
    elif rows:
        _table(options.console(), model, rows)


def _table(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)
