"""What to install for the names that need mteb or sentence-transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def of_extra(name: str) -> Iterator[None]:
    """Imports of the extra `embed`, for the sake of `name`. Where a package is not installed, the ModuleNotFoundError
    says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("mteb", "sentence_transformers"):
            raise
        message = f"{name} needs {error.name}. Install it: pip install 'usmoe[embed]'."
        raise ModuleNotFoundError(message, name=error.name) from error
