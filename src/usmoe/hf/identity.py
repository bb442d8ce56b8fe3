"""Which router it is: as text that is the same in every process, and as data that another router does not share."""

from __future__ import annotations

import re
from types import FunctionType
from typing import Any

from usmoe.routing.router import Router
from usmoe.routing.source import source_of


def text_of(router: Any) -> str:
    """A router as text, the same in every process: code of the user's own by its name, without an address in memory."""
    if isinstance(router, FunctionType):
        return f"{router.__module__}:{router.__qualname__}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(router))


def identity(router: Any) -> dict[str, Any] | None:
    """A router of ours as its fields; one of the user's own by its name, its parameters and the digest of its source,
    with that of the files of one's own that it imports; None where it cannot be told from another: a function within a
    function, a lambda, or code without a file."""
    if isinstance(router, Router):
        return router.to_dict()
    kind = router if hasattr(router, "__qualname__") else type(router)
    source = source_of(router)
    if source is None or not source.files or source.unread or "<" in kind.__qualname__:
        return None
    return {"own": f"{kind.__module__}:{kind.__qualname__}", "file": source.digest, "fields": source.fields}
