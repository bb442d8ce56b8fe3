"""`usmoe route`: which token goes to which expert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from usmoe.cli import options
from usmoe.cli.options import AsJson, Debug, Device, Dtype, Model, Offline, Seed, text_pieces
from usmoe.models import SAMPLE


def route(
    context: typer.Context,
    file: Annotated[
        str | None,
        typer.Argument(
            help="UTF-8 text, - for stdin, or logits (B, L, E) or (T, E) as .npy; without it the shipped sample."
        ),
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(
            help='Such as "usmoe(k=1.5)", or a .json file of usmoe tune. For text, without it: the routers that the '
            "model was saved with (saved), or else its own choice (own)."
        ),
    ] = None,
    model: Model = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text to route, at most.", min=1)] = 64,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    offline: Offline = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show which token goes to which expert, in every MoE layer, and what that does to drops and load.

    Example: echo "It was a dark and stormy night." | usmoe route - --router "usmoe(k=0.75x)"
    """
    import torch

    torch.manual_seed(seed)
    if file is not None and file.endswith(".npy"):
        options.refuse_unread(
            context, (True, ("model", "tokens", "dtype", "device"), f"of a model and its text, and {file} is logits")
        )
        words, said = _of_logits(Path(file), router)
    else:
        words, said = _of_text(file, router, model, tokens, dtype, device, offline)
    if as_json:
        options.write_json(_as_dict(words, said))
    else:
        _print(words, said)


def _of_logits(path: Path, router: str | None) -> tuple[list[str], dict[str, Any]]:
    import numpy as np
    import torch

    import usmoe

    if router is None:
        raise ValueError('Logits have no model behind them. Name a router: --router "usmoe(k=1.5)".')
    if not path.is_file():
        raise ValueError(f"There is no file {path}. Give logits as .npy, or text.")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not an array that numpy.save() wrote: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} holds several arrays. Give one, as numpy.save() writes it.")
    if array.ndim not in (2, 3) or array.dtype.kind != "f":
        raise ValueError(f"{path} holds {array.dtype} of shape {array.shape}. Give floats (B, L, E) or (T, E).")
    logits = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    logits = logits.unsqueeze(0) if logits.ndim == 2 else logits
    routing = usmoe.route(logits, usmoe.parse_router(router))
    batch, length, _ = logits.shape
    return [f"{b},{position}" for b in range(batch) for position in range(length)], {path.name: routing}


def _of_text(
    file: str | None, router: str | None, model: str | None, most: int, dtype: str, device: str, offline: bool
) -> tuple[list[str], dict[str, Any]]:
    import torch

    from usmoe.cli.routers import chosen, refuse_none_saved, saved_with
    from usmoe.cli.tokens import first_tokens
    from usmoe.hf.load import load
    from usmoe.hf.patch import patch, routers
    from usmoe.hf.record import record
    from usmoe.routing import OwnChoice

    choice = chosen(router)
    pieces = [SAMPLE.read_text(encoding="utf-8")] if file is None else text_pieces(file)
    saved = saved_with(model, offline, "this is under them" if choice is None else f"this is under {router}")
    refuse_none_saved(router, saved, model)
    loaded, tokenizer = load(model, router=choice, dtype=dtype, device=device, offline=offline)
    if not routers(loaded):
        patch(loaded, OwnChoice())
    limit = getattr(loaded.config, "max_position_embeddings", None) or most
    ids = first_tokens(tokenizer, pieces, min(most, limit))
    with torch.no_grad(), record(loaded) as trace:
        loaded(input_ids=ids[None].to(loaded.device), use_cache=False)
    words = [tokenizer.decode([token]) for token in ids.tolist()]
    return words, {name: one.routing for name, one in trace.last.items()}


def _as_dict(words: list[str], said: dict[str, Any]) -> dict[str, Any]:
    return {
        "tokens": words,
        "layers": [
            {
                "layer": name,
                "experts": routing.num_experts,
                "pairs": [
                    {"token": t, "expert": e, "weight": w}
                    for t, e, w in zip(
                        routing.token.tolist(), routing.expert.tolist(), routing.weight.tolist(), strict=True
                    )
                ],
                "load": routing.load.tolist(),
            }
            | _figures(routing)
            for name, routing in said.items()
        ],
    }


def _print(words: list[str], said: dict[str, Any]) -> None:
    console = options.console()
    table = Table(header_style="bold", title="experts of each token, best first", title_justify="left")
    table.add_column("token", no_wrap=True)
    for name in said:
        table.add_column(name, overflow="fold")
    columns = [_experts_of_tokens(routing) for routing in said.values()]
    for place, word in enumerate(words):
        table.add_row(repr(word)[1:-1], *(column[place] for column in columns))
    table.add_section()
    figures = [_figures(routing) for routing in said.values()]
    table.add_row("experts a token", *(f"{one['experts_per_token']:.2f}" for one in figures))
    table.add_row("dropped", *(f"{100 * one['dropped']:.1f} %" for one in figures))
    table.add_row("load CV", *(f"{one['load_cv']:.2f}" for one in figures))
    console.print(table)


def _figures(routing: Any) -> dict[str, float]:
    from usmoe import metrics

    return {
        "experts_per_token": len(routing.token) / max(routing.num_tokens, 1),
        "dropped": metrics.dropped(routing),
        "load_cv": metrics.load_cv(routing),
    }


def _experts_of_tokens(routing: Any) -> list[str]:
    """The experts of each token, by falling weight; a dash for a dropped token."""
    lists: list[list[tuple[float, int]]] = [[] for _ in range(routing.num_tokens)]
    for token, expert, weight in zip(
        routing.token.tolist(), routing.expert.tolist(), routing.weight.tolist(), strict=True
    ):
        lists[token].append((-weight, expert))
    return [" ".join(str(expert) for _, expert in sorted(pairs)) or "-" for pairs in lists]
