"""Writing routers and patched models: whole, or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model and its tokenizer, whole or not at all; files of the same names in the folder are replaced."""
    part = folder.with_name(f".{folder.name}.part")
    try:
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
