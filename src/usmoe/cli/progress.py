"""A progress bar on stderr, with rate and remaining time; silent where stderr is no terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm


@contextlib.contextmanager
def steps_bar(total: int) -> Iterator[Callable[[str], None]]:
    """A function to call with the label of the work after each of `total` steps."""
    with tqdm(total=total, file=sys.stderr, disable=None, unit="step", leave=False) as bar:

        def tick(label: str) -> None:
            bar.set_description(label, refresh=False)
            bar.update()

        yield tick
