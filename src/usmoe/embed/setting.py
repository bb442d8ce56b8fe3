"""By what the results of an encoder are told from those of others: name, weights and setting."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from usmoe.embed.digest import digest
from usmoe.embed.encoder import Encoder
from usmoe.embed.prompts import PROMPTS
from usmoe.hf.identity import identity, text_of
from usmoe.hf.wrapped import unwrapped
from usmoe.models import SHIPPED
from usmoe.routing import OwnChoice
from usmoe.routing.router import Router


def name_of(source: str | None) -> str:
    """organization/model, as mteb wants it: the id on the hub, or usmoe/FOLDER."""
    if source is None or source == "shipped":
        return "usmoe/model" if source is None else f"usmoe/{SHIPPED.name}"
    path = Path(source)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source, re.ASCII) and not path.exists():
        return source
    folder = re.sub(r"[^\w.-]+", "-", path.resolve().name, flags=re.ASCII)[:100]
    return f"usmoe/{folder or 'model'}"


def short(text: str) -> str:
    """A text that a folder may be called, and that says which one it was: itself where it is short and plain, or else
    its beginning and a digest."""
    if re.fullmatch(r"[\w .,=()+-]{1,80}", text, re.ASCII):
        return text
    begins = re.sub(r"[^a-zA-Z0-9]+", "-", text).strip("-")[:24]
    return f"{begins}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _text_of_all(routers: Sequence[Any]) -> str:
    """The router of all layers, or those of each; own_choice for a model that is not patched."""
    texts = [text_of(router) for router in routers] or [str(OwnChoice())]
    return texts[0] if len(set(texts)) == 1 else f"{len(texts)} routers: {'; '.join(texts)}"


def _code(routers: Sequence[Any]) -> str | None:
    """Of routers of the user's own, which a name does not tell apart: a digest of what they are; of those that cannot
    be told apart at all, something new each time, so that nothing is read that another has written."""
    own = [identity(router) for router in routers if not isinstance(router, Router)]
    if not own:
        return None
    said = uuid.uuid4().hex if None in own else json.dumps(own, sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:12]


def _alpha(routers: Sequence[Any]) -> float | None:
    """The share of the expert score, where all layers have the same: 0 where a unified router leaves it to the model;
    None for routers that have no such share."""
    alphas = {getattr(router, "alpha", "none") for router in routers}
    found = alphas.pop() if len(alphas) == 1 else "none"
    return None if found == "none" else 0.0 if found is None else float(found)


def setting_of(
    encoder: Encoder, *, instructions: bool = False, about: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What names the folder of results: router, alpha, embedding and prompt always, the others where they differ from
    what is left out.

    instructions  whether each task's own instruction stands before its texts
    about         what else the results depend on, such as {"quantize": "nf4"}
    """
    settings, routers = encoder.settings, list(encoder.routers.values())
    listens, statistics = settings.embedding != "hidden", encoder.statistics
    dtype = str(unwrapped(encoder.model).dtype).removeprefix("torch.")
    optional = {
        "pooling": None if settings.pooling == "last" else settings.pooling,
        "moee": "sum" if settings.is_sum else None,
        "w": float(settings.w) if settings.is_sum and settings.w != 1 else None,
        "features": settings.router_features if listens and settings.router_features != "logits" else None,
        "layers": None if settings.layers is None else short(", ".join(map(str, settings.layers))),
        "instruction": True if instructions else None,
        "standardize": None if statistics is None else short(f"{statistics.name} {statistics.digest[:8]}"),
        "max_length": settings.max_length,
        "dtype": None if dtype == "float32" else dtype,
        "code": _code(routers),
    }
    return {
        "router": short(_text_of_all(routers)),
        "alpha": _alpha(routers),
        "embedding": settings.embedding,
        "prompt": settings.prompt if settings.prompt in PROMPTS else short(settings.prompt),
        **{name: value for name, value in optional.items() if value is not None},
        **{name: short(str(value)) for name, value in (about or {}).items()},
    }


def revision_of(encoder: Encoder) -> str:
    """Twelve digits of the encoder's weights and tokenizer: the revision of its model."""
    return digest(encoder.model, encoder.tokenizer)
