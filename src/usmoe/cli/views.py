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
    widths, padding = _widths(view, console.width)
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, padding))
    for at, (word, width) in enumerate(zip(view.head, widths, strict=True)):
        table.add_column(Text(word), justify="left" if at < view.labels else "right", overflow="fold", width=width)
    for at, row in enumerate(view.rows):
        cells = (Text(word, "bold" if (at, column) in view.bold else "") for column, word in enumerate(row))
        table.add_row(*cells, style="dim" if row[0] == PAPER else None)
    console.print(table)
    parts = list(view.says)
    for heading, words in view.remarks:
        parts += [heading, *(f"- {word}" for word in words)]
    console.print("\n".join(parts), highlight=False, markup=False)


def _widths(view: View, room: int) -> tuple[list[int], int]:
    """How wide each column is, and how many blanks stand between two of them beside one that always does.

    Where the table is wider than `room` characters the blanks go first, then heads are broken at spaces, then figures
    and labels; a word is broken only where all that is not enough.
    """
    columns = [list(words) for words in zip(view.head, *view.rows, strict=True)]
    widths = [max(len(line) for word in words for line in word.split("\n")) for words in columns]
    figures = [max((len(word) for word in words), default=0) for _, *words in columns]
    least = [max(len(part) for word in words for part in word.split()) for words in columns]
    number = len(columns)
    if sum(widths) + 2 * number <= room:
        return widths, 1
    for floor in ([*map(max, figures, least)], least):
        while sum(widths) + number + 1 > room and any(map(int.__gt__, widths, floor)):
            at = max(range(number), key=lambda at, floor=floor: widths[at] - floor[at])
            widths[at] -= 1
    return widths, 0
