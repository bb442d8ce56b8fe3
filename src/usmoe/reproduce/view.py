"""`View`: a table in words, with what is to be said of it; usmoe.cli.views prints it, `as_markdown` writes it."""

from __future__ import annotations

from dataclasses import dataclass

PAPER = "  paper"
"""Where a row of the paper's has no task."""


FOR_THEIR_ORDER = (
    "The paper's figures stand beside ours for their order alone: other text, another size, other steps. No difference "
    "between the two means anything."
)
"""Of training at small scale."""


@dataclass(frozen=True, kw_only=True)
class View:
    """What is to be shown of results."""

    title: str
    head: tuple[str, ...]
    """Of each column; a new line where a terminal may break it."""
    labels: int
    """How many of its columns say what a row is; figures follow."""
    rows: tuple[tuple[str, ...], ...]
    """Words, as many as the head has; a row of the paper's begins with PAPER, under ours."""
    bold: tuple[tuple[int, int], ...]
    """(row, column) of the best figures that stand clear of all others."""
    says: tuple[str, ...]
    """How to read it."""
    about: tuple[str, ...] = ()
    """What the methods are, where their names do not say it."""
    differs: tuple[str, ...] = ()
    """What is not as in the paper."""
    notes: tuple[str, ...] = ()
    """What does not add up in the paper's own figures."""

    @property
    def remarks(self) -> list[tuple[str, tuple[str, ...]]]:
        """(heading, sentences) of what stands under the table, as far as there is any."""
        found = [
            ("The methods:", self.about),
            ("What differs from the paper:", self.differs),
            ("What does not add up in the paper:", self.notes),
        ]
        return [(heading, words) for heading, words in found if words]


def as_markdown(view: View, command: str = "") -> str:
    """The view as a section of Markdown, with the command that gives it."""
    bold = set(view.bold)
    rows = [
        [f"**{word}**" if (at, column) in bold else word.strip() for column, word in enumerate(row)]
        for at, row in enumerate(view.rows)
    ]
    parts = [
        f"## {view.title}",
        "",
        *([f"`{command}`", ""] if command else []),
        "| " + " | ".join(word.replace("\n", ", ") for word in view.head) + " |",
        "|---" * view.labels + "|" + "--:|" * (len(view.head) - view.labels),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        " ".join(view.says),
        "",
    ]
    for heading, words in view.remarks:
        parts += [heading, "", *(f"- {word}" for word in words), ""]
    return "\n".join(parts)
