"""What a run says while it goes: a bar, lines of JSON, and tensorboard."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm


class Log:
    """The bar on stderr, log.jsonl, and tensorboard's events where asked for."""

    def __init__(self, path: Path, *, step: int, steps: int, progress: bool, tensorboard: bool) -> None:
        self._path = path
        self._bar = tqdm(
            total=steps, initial=step, unit="step", file=sys.stderr, disable=None if progress else True, smoothing=0.05
        )
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(path.parent / "tensorboard"), purge_step=step)

    def tick(self) -> None:
        self._bar.update()

    def show(self, row: dict[str, Any]) -> None:
        """What stands behind the bar from now on."""
        shown = {name: f"{value:.4g}" for name, value in row.items() if name in SHOWN and value is not None}
        self._bar.set_postfix(shown, refresh=False)

    def write(self, row: dict[str, Any]) -> None:
        """A line of the log: a number that is none becomes null."""
        said = {name: None if isinstance(one, float) and not math.isfinite(one) else one for name, one in row.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(said, allow_nan=False) + "\n")
        if self._writer is not None:
            for name, value in said.items():
                if name != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._bar.close()
        if self._writer is not None:
            self._writer.close()


SHOWN = ("loss", "bits", "perplexity", "experts", "dropped", "load_cv", "tokens_per_second", "validation", "accuracy")
"""What stands behind the bar, beside the rate and the remaining time."""
