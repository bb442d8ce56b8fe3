"""The table of `usmoe demo` and `usmoe patch`: a row a router, and a legend that a newcomer understands."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.table import Table

from usmoe.cli import options
from usmoe.hf.compare import Row
from usmoe.types import SAY_SO

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


def print_rows(heading: str, rows: Sequence[Row], dtype: str, footer: str = "") -> None:
    """Print heading, table, legend and footer on stdout; dtype: that the model computes in."""
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
    noise, unpromised = rounding(rows, dtype), any(row.unpromised for row in rows)
    legend = [
        "perplexity   teacher-forced, lower is better. * this router looks ahead: later tokens move the experts of "
        "earlier ones, so the figure is no autoregressive model's.",
        *([f"             ? this router does not promise that it is causal. {SAY_SO}"] if unpromised else []),
        f"honest       each token predicted from those before it alone, on {sampled} sampled positions (± 95 %)."
        if sampled
        else "honest       left out (--positions 0).",
        *([] if noise is None else [_rounded(dtype, noise)]),
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


def _rounded(dtype: str, noise: float) -> str:
    size = f"by up to {noise:.2g} here" if noise else "though not by what can be seen here"
    return f"             {dtype} rounds, which alone moves honest figures, {size}."


def rounding(rows: Sequence[Row], dtype: str) -> float | None:
    """By how much rounding alone moves a perplexity: the largest difference between the honest and the teacher-forced
    figure of a router that does not look ahead, of which the two are one. None in float32, and where none was taken."""
    gaps = [
        abs(row.honest_perplexity - row.perplexity)
        for row in rows
        if row.causal and row.honest_perplexity is not None and dtype != "float32"
    ]
    return max(gaps, default=None)


def _cells(row: Row) -> list[str]:
    honest = "-"
    if row.honest_perplexity is not None and row.honest_interval is not None:
        half = (row.honest_interval[1] - row.honest_interval[0]) / 2
        honest = f"{row.honest_perplexity:.2f}" + (f" ±{half:.2f}" if math.isfinite(half) else "")
    return [
        row.label,
        f"{row.perplexity:.2f}{'' if row.causal else '?' if row.unpromised else '*'}",
        honest,
        f"{row.bits_per_byte:.3f}",
        f"{row.experts_mean:.2f} ({row.experts_min}-{row.experts_max})",
        "-" if row.budget is None else f"{100 * row.experts_mean / row.budget:.0f} %",
        f"{100 * row.dropped:.1f} %",
        f"{row.load_cv:.2f}",
        f"{row.moe_flops / 1e6:.2f}",
        f"{row.seconds:.1f}",
    ]
