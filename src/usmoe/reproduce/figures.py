"""What the paper prints (arXiv 2503.22996v2), as data, with a note for everything in it that does not add up."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

PAPER = Path(__file__).parent / "paper"
"""One JSON file a table or figure."""


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """One row as printed; None where the table has no such division."""

    model: str | None = None
    """As the paper writes it: OLMoE-1B-7B, Transformer-XL (20M) ..."""
    task: str | None = None
    """The type of task: Classification ..., or Average."""
    dataset: str | None = None
    """As the paper writes it: Emotion, 20Groups ..."""
    setting: str | None = None
    """None (without prompts) | Prompt | Original | Corrupt | PGD ... | k=2."""
    values: Mapping[str, float] = field(default_factory=dict)
    """A figure a column."""
    deviations: Mapping[str, float] = field(default_factory=dict)
    """What the paper prints behind ±, a column; empty where it prints none."""


@dataclass(frozen=True, kw_only=True)
class PaperFigures:
    """A table or figure of the paper."""

    name: str
    """table5, figure4 ..."""
    title: str
    unit: str
    """Of the figures, and which way is better where that is not plain."""
    columns: tuple[str, ...]
    """Methods, as printed; empty for a picture without numbers in the paper's text."""
    rows: tuple[PaperRow, ...]
    notes: tuple[str, ...]
    """What does not add up, within the table or with the paper's other tables and its text."""


@functools.cache
def paper_figures(name: str) -> PaperFigures:
    """The figures of table1 to table16, figure3, figure4, figure7 or figure8.

    Raises ValueError for any other name: the paper's text holds no figures of it.
    """
    path = PAPER / f"{name}.json"
    if name not in recorded():
        raise ValueError(f"The paper's text holds no figures of {name!r}. It does of: {', '.join(recorded())}.")
    said = json.loads(path.read_text(encoding="utf-8"))
    return PaperFigures(
        name=said["name"],
        title=said["title"],
        unit=said["unit"],
        columns=tuple(said["columns"]),
        rows=tuple(PaperRow(**row) for row in said["rows"]),
        notes=tuple(said["notes"]),
    )


@functools.cache
def recorded() -> tuple[str, ...]:
    """Names of everything that is recorded: tables, then figures, by number."""
    names = (path.stem for path in PAPER.glob("*.json"))
    return tuple(sorted(names, key=lambda name: (name.startswith("figure"), int(name.lstrip("tablefigur")))))
