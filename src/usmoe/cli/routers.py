"""Writing routers and patched models: whole, or not at all."""

from __future__ import annotations

import json
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

    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(json.dumps(as_data(routers), indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
