"""Which router is meant, by one meaning in every command; and writing routers and patched models, whole or not at all.

nothing   the routers that the model was saved with; where it was saved without, its own choice
own       the model's own choice
saved     the routers that it was saved with
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def saved_with(model: str | None, offline: bool, uses: str) -> dict[str, str]:
    """{layer name: router as text} that a model was saved with, which is said on stderr; empty without.

    uses  what becomes of them: "this runs under them"
    """
    from usmoe.hf.load import saved_with as of

    said = of(model, offline=offline)
    if said:
        sys.stderr.write(f"usmoe: {model} was saved with {in_words(said)}; {uses}.\n")
    return said


def in_words(said: Mapping[str, Any]) -> str:
    """The routers of layers in words: one where all have the same, else how many."""
    texts = list(dict.fromkeys(map(str, said.values())))
    if len(texts) == 1:
        return f"the router {texts[0]} in its {len(said)} MoE layers"
    return f"a router for each of its {len(said)} MoE layers, {texts[0]} in the first"


def load_beside(model: str | None, *, dtype: str, device: str, offline: bool) -> tuple[Any, Any]:
    """Model and tokenizer for a table of routers; the model is patched with those that it was saved with, where these
    are not code of its author's own."""
    from usmoe.hf.load import load
    from usmoe.hf.saved import CODE

    said = saved_with(model, offline, "a row of the table is theirs")
    code = any(one.endswith(CODE) for one in said.values())
    if code:
        sys.stderr.write("usmoe: such code is not run from a file, so the table is without it; --router names it.\n")
    return load(model, router={} if code else None, dtype=dtype, device=device, offline=offline)


def chosen(given: str | None) -> Any:
    """A router as typed, ready for `load_model`; None where the saved ones are meant, or nothing is typed."""
    from usmoe.hf.saved import read_router

    return None if given in (None, "saved") else read_router(given)


def refuse_none_saved(given: str | None, saved: Mapping[str, Any], model: str | None) -> None:
    """Raise ValueError where the saved routers are asked for, and there are none."""
    if given == "saved" and not saved:
        raise ValueError(
            f"{model or 'The shipped model'} was saved without routers, so there is nothing that saved could mean. "
            "Give a router, or own for the model's own choice."
        )


def saved_contender(loaded: Any) -> list[Any]:
    """The row of the routers that a model was saved with, and runs under; none without."""
    from usmoe.hf.compare import Contender
    from usmoe.hf.patch import routers

    now = routers(loaded)
    first = next(iter(now.values()), None)
    router = first if all(one == first for one in now.values()) else now
    return [Contender(label="the routers it was saved with", router=router)] if now else []


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model and its tokenizer, whole or not at all; files of the same names in the folder are replaced."""
    from usmoe.report.whole import said_plainly

    part = folder.with_name(f".{folder.name}.part")
    try:
        with said_plainly(folder):
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
            folder.mkdir(exist_ok=True)
            for file in part.iterdir():
                file.replace(folder / file.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_routers(path: Path, routers: Mapping[str, Any]) -> None:
    """Write routers for `read_router`, whole or not at all."""
    from usmoe.hf.saved import as_data
    from usmoe.report.whole import whole_json

    whole_json(as_data(routers), path)
