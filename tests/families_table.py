"""The table of families in docs/families.md, made of what was run: `python tests/families_table.py` writes it.

Each family of the installed transformers whose experts are behind its interface, tiny, from its configuration: what
usmoe finds its routers to do, and the largest difference of an output under OwnChoice(), through our routing and our
experts, relative to the largest output. tests/test_families.py holds every row to it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

import usmoe
from families import FAMILIES, OUTSIDERS, Family, build, inputs

PAGE = Path(__file__).parent.parent / "docs/families.md"
BEGIN, END = "<!-- families: written by tests/families_table.py -->", "<!-- end of families -->"


def answer(model: PreTrainedModel, given: dict) -> torch.Tensor:
    """The logits of the real tokens, or the last hidden states of a model without a head."""
    torch.manual_seed(0)  # some families draw what they are not given
    out = model(**given)
    out = out.logits if hasattr(out, "logits") else out.last_hidden_state
    mask = given.get("attention_mask")
    return out[mask.bool()] if mask is not None and out.shape[:2] == mask.shape else out


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((one - other).abs().max() / other.abs().max()).item()


@torch.no_grad()
def row(name: str, family: Family) -> str:
    """One family, run."""
    model, given = build(family), inputs(family)
    rows = usmoe.supported(model)
    rules = dict.fromkeys(one.own_choice or one.reason or "" for one in rows)
    if not any(one.supported for one in rows):
        return f"| {name} | `{family.model}` | refused: {rows[0].reason} | |"
    before = answer(model, given)
    with usmoe.patched(model, usmoe.OwnChoice()):
        difference = distance(answer(model, given), before)
    return f"| {name} | `{family.model}` | {'; '.join(rules)} | {difference:.0e} |"


def table() -> Iterator[str]:
    """The lines of the table."""
    yield "| family (and variant of its router) | class | its own choice | own choice, largest difference |"
    yield "|---|---|---|--:|"
    for name, family in (FAMILIES | OUTSIDERS).items():
        yield row(name, family)


def shown() -> list[list[str]]:
    """The cells of the rows that the page shows."""
    body = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body]


def main() -> None:
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    lines = list(table())
    PAGE.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}", encoding="utf-8")
    sys.stdout.write(f"{PAGE.name}: {len(lines) - 2} rows\n")


if __name__ == "__main__":
    main()
