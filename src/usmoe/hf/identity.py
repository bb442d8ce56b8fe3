"""Which router it is: as text that is the same in every process, and as data that another router does not share."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path
from types import FunctionType
from typing import Any

from usmoe.routing.router import Router


def text_of(router: Any) -> str:
    """A router as text, the same in every process: code of the user's own by its name, without an address in memory."""
    if isinstance(router, FunctionType):
        return f"{router.__module__}:{router.__qualname__}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(router))


def identity(router: Any) -> dict[str, Any] | None:
    """A router of ours as its fields; one of the user's own by its name, its fields and the digest of its file; None
    where it cannot be told from another: a function within a function, a lambda, or code without a file."""
    if isinstance(router, Router):
        return router.to_dict()
    kind = router if hasattr(router, "__qualname__") else type(router)
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if file is None or "<" in kind.__qualname__:
        return None
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return {"own": f"{kind.__module__}:{kind.__qualname__}", "file": digest, "fields": repr(vars(router))}
