"""Printing a `usmoe.reproduce.view.View` as a table."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from usmoe.cli import options
from usmoe.reproduce.view import PAPER, View


def print_view(view: View) -> None:
    """Print heading, table and remarks on stdout; the paper's rows stand out by being pale."""
    console = options.console()
    console.print(view.title, highlight=False, markup=False)
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    for at, word in enumerate(view.head):
        table.add_column(Text(word), justify="left" if at < view.labels else "right", overflow="fold")
    for at, row in enumerate(view.rows):
        cells = (Text(word, "bold" if (at, column) in view.bold else "") for column, word in enumerate(row))
        table.add_row(*cells, style="dim" if row[0] == PAPER else None)
    console.print(table)
    parts = list(view.says)
    for heading, words in view.remarks:
        parts += [heading, *(f"- {word}" for word in words)]
    console.print("\n".join(parts), highlight=False, markup=False)
