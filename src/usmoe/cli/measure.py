"""What `usmoe demo` and `usmoe patch` share: contenders measured on a corpus, with a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from usmoe.cli.tokens import Corpus
from usmoe.hf.compare import Contender, Row, compare, steps


def measure(model: Any, data: Corpus, entries: Sequence[Contender], positions: int, seed: int) -> list[Row]:
    """A Row for each contender. The bar goes to stderr, and is left out where that is no terminal."""
    with tqdm(total=steps(entries, positions), file=sys.stderr, disable=None, unit="step", leave=False) as bar:

        def tick(label: str) -> None:
            bar.set_description(label, refresh=False)
            bar.update()

        return compare(
            model,
            data.tokens,
            entries,
            bytes_per_token=data.bytes_per_token,
            positions=positions,
            seed=seed,
            tick=tick,
        )
