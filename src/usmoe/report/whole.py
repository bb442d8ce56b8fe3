"""Pictures are written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def whole_picture(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG."""
    part = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(part, dpi=150, format="png")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
