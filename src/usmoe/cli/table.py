"""The table of `usmoe demo` and `usmoe patch`: a row a router, and a legend that a newcomer understands."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.table import Table

from usmoe.cli import options
from usmoe.hf.compare import Row

_COLUMNS = (
    "perplexity",
    "honest",
    "bits/\nbyte",
    "experts\na token",
    "of\nbudget",
    "dropped",
    "load\nCV",
    "MoE\nMFLOPs",
    "seconds",
)
_LEFT_OUT_WHERE_NARROW = (2, 4, 8)
"""Columns that a terminal of fewer than 100 characters does without; --json has them all."""


def print_rows(heading: str, rows: Sequence[Row], footer: str = "") -> None:
    """Print heading, table, legend and footer on stdout."""
    console = options.console()
    console.print(heading, highlight=False, markup=False)
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("router", min_width=16, overflow="fold")
    shown = [i for i in range(len(_COLUMNS)) if console.width >= 100 or i not in _LEFT_OUT_WHERE_NARROW]
    for i in shown:
        table.add_column(_COLUMNS[i], justify="right", no_wrap=True)
    for row in rows:
        label, *cells = _cells(row)
        table.add_row(label, *(cells[i] for i in shown))
    console.print(table)
    sampled = rows[0].honest_positions
    legend = [
        "perplexity   teacher-forced, lower is better. * this router looks ahead: later tokens move the experts of "
        "earlier ones, so the figure is no autoregressive model's.",
        f"honest       each token predicted from those before it alone, on {sampled} sampled positions (± 95 %)."
        if sampled
        else "honest       left out (--positions 0).",
        "experts      mean (least-most) over tokens and layers; of budget: 100 % unless a threshold drifts. "
        "dropped: tokens without an expert. load CV: 0 is perfect balance.",
        "MoE MFLOPs   a token, all MoE layers, from the pairs that were routed. "
        + (
            "seconds: wall time of one pass."
            if console.width >= 100
            else "bits/byte, of budget and seconds: in --json."
        ),
    ]
    console.print("\n".join([*legend, footer] if footer else legend), highlight=False, markup=False, style="dim")


def _cells(row: Row) -> list[str]:
    honest = "-"
    if row.honest_perplexity is not None and row.honest_interval is not None:
        half = (row.honest_interval[1] - row.honest_interval[0]) / 2
        honest = f"{row.honest_perplexity:.2f}" + (f" ±{half:.2f}" if math.isfinite(half) else "")
    return [
        row.label,
        f"{row.perplexity:.2f}{'' if row.causal else '*'}",
        honest,
        f"{row.bits_per_byte:.3f}",
        f"{row.experts_mean:.2f} ({row.experts_min}-{row.experts_max})",
        "-" if row.budget is None else f"{100 * row.experts_mean / row.budget:.0f} %",
        f"{100 * row.dropped:.1f} %",
        f"{row.load_cv:.2f}",
        f"{row.moe_flops / 1e6:.2f}",
        f"{row.seconds:.1f}",
    ]
