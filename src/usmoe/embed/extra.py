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
        package = (error.name or "").split(".")[0]
        if package not in ("mteb", "sentence_transformers"):
            raise
        message = f"{name} needs {package}. Install it: pip install 'usmoe[embed]'."
        raise ModuleNotFoundError(message, name=package) from error
