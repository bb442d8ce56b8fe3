"""The table of promises in docs/routing.md, made of what is tested: `python tests/promises_table.py` writes it.

Each row is one kind of router; each entry is what searches for an exception find (violations.kept_promises), and
tests/test_promises.py holds it to what the router says of itself and to what the page shows.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from every_router import PLAIN, Hosted
from usmoe import BoundedChoice, ExpertChoice, OwnChoice, ReLUChoice, TokenChoice, USMoE
from usmoe.types import Promises
from violations import kept_promises

PAGE = Path(__file__).parent.parent / "docs/routing.md"
BEGIN, END = "<!-- promises: written by tests/promises_table.py -->", "<!-- end of promises -->"

ROWS: dict[str, Any] = {
    "TokenChoice": TokenChoice(k=2),
    "OwnChoice": Hosted(OwnChoice(), PLAIN),
    'USMoE(pool="token")': USMoE(k=2, pool="token"),
    'USMoE(pool="threshold")': USMoE(pool="threshold", threshold=0.3),
    'USMoE(pool="threshold", min_experts=)': USMoE(pool="threshold", threshold=0.3, min_experts=1),
    'USMoE(pool="threshold", burst=)': USMoE(k=1, pool="threshold", threshold=0.25, burst=2),
    'USMoE(pool="prefix")': USMoE(
        k=2, pool="prefix"
    ),  # a whole k: what floor(k*t + 0.5) rounds in short sequences is not at issue
    'USMoE(pool="prefix", min_experts=)': USMoE(k=2, pool="prefix", min_experts=2),
    'USMoE(pool="prefix", burst=)': USMoE(k=1.5, pool="prefix", burst=2),
    'USMoE(pool="sequence")': USMoE(k=1.5),
    'USMoE(pool="batch")': USMoE(k=1.5, pool="batch"),
    'USMoE(pool="time_step")': USMoE(k=1.5, pool="time_step"),
    "USMoE(mask_padding=False)": USMoE(k=1.5, mask_padding=False),
    'ExpertChoice(pool="sequence")': ExpertChoice(k=0.5),
    'ExpertChoice(pool="batch")': ExpertChoice(k=0.5, pool="batch"),
    'ExpertChoice(pool="threshold")': ExpertChoice(pool="threshold", threshold=(0.5, 0.6, 0.3, 0.7)),
    "ReLUChoice": ReLUChoice(k=1),
    'BoundedChoice(pool="sequence")': BoundedChoice(k=1.5),
    'BoundedChoice(pool="batch")': BoundedChoice(k=1.5, pool="batch"),
    'BoundedChoice(pool="time_step")': BoundedChoice(k=1.5, pool="time_step"),
    'BoundedChoice(pool="token")': BoundedChoice(k=2, pool="token"),
}


def table() -> tuple[str, dict[str, Promises]]:
    """The table in Markdown, and what was found for each row."""
    found = {name: kept_promises(router) for name, router in ROWS.items()}
    lines = ["| router | causal | batch | padding | streamable | budget |", "|---|---|---|---|---|---|"]
    for name, kept in found.items():
        held = (kept.causal, kept.batch_independent, kept.padding_independent, kept.streamable)
        lines.append(f"| `{name}` | {' | '.join('yes' if one else 'no' for one in held)} | {kept.budget} |")
    return "\n".join(lines), found


def shown() -> str:
    """The table that the page shows."""
    return PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()[0]}\n\n{END}{after}", encoding="utf-8")
    sys.stdout.write(f"{PAGE.name}: {len(ROWS)} routers\n")


if __name__ == "__main__":
    main()
