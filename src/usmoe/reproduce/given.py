"""What a configuration says, without what is at its default: so that a field that is added later changes no digest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection
from typing import Any


def given(config: Any, unread: Collection[str] = ()) -> dict[str, Any]:
    """Fields of a dataclass that differ from their defaults, of tables within it too; those `unread` are left out."""
    found: dict[str, Any] = {}
    for one in dataclasses.fields(config):
        value = getattr(config, one.name)
        if one.name in unread:
            continue
        if dataclasses.is_dataclass(value):
            found[one.name] = given(value, unread)
        elif value != one.default:
            found[one.name] = value
    return found


def digest_of(said: Any) -> str:
    """Eight hexadecimal digits of a sha256 over what can be written as JSON."""
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:8]
