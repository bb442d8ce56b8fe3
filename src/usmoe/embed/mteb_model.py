"""An Encoder as a model for mteb.evaluate(), with a results folder of its own for each setting."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from usmoe.embed.digest import digest
from usmoe.embed.encoder import Encoder
from usmoe.embed.extra import of_extra
from usmoe.embed.memory import FeatureMemory
from usmoe.embed.prompts import PROMPTS
from usmoe.hf.identity import identity, text_of
from usmoe.hf.packed import packed_experts
from usmoe.hf.wrapped import unwrapped
from usmoe.models import SHIPPED
from usmoe.routing import OwnChoice
from usmoe.routing.router import Router

with of_extra("Encoder.as_mteb()"):
    from mteb.models.model_meta import ModelMeta, ScoringFunction

READS_SIMILARITIES = (
    "BitextMining",
    "InstructionReranking",
    "InstructionRetrieval",
    "PairClassification",
    "Reranking",
    "Retrieval",
    "STS",
    "Summarization",
)
"""Types of tasks, in mteb's words, that compare two texts; all others read the vector of one."""


class MTEBModel:
    """What mteb.evaluate() takes as a model: mteb's EncoderProtocol.

    encoder       whose vectors are evaluated, and whose similarity
    instructions  put each task's own instruction before its texts, in the encoder's wrapper; tasks without one get none
    memory        of texts that were run before, shared with the models of other embeddings; the caller clears it
    about         what else the results depend on, such as {"quantize": "nf4"}: it counts as a setting
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        instructions: bool = False,
        memory: FeatureMemory | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.encoder = encoder
        self.instructions = instructions
        self._about = dict(about or {})
        self._forgets = memory is None
        self._memory = FeatureMemory() if memory is None else memory
        self._memory.join(encoder)

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: Any = None,
        batch_size: int = 32,
        show_progress_bar: bool = True,
        precision: str | None = None,
        **_: Any,
    ) -> np.ndarray:
        """(n, D): the vectors of the texts in mteb's batches, in float32. A text that stands twice is run once.

        Raises ValueError for a MoEE sum in a task that reads vectors, and for a precision other than float32.
        """
        if self.encoder.settings.is_sum:
            refuse_sum(task_metadata)
        if precision not in (None, "float32"):
            raise ValueError(f"precision={precision!r} is impossible: these vectors are in float32. Leave it out.")
        texts = [text for batch in inputs for text in batch["text"]]
        instruction = _instruction(task_metadata, prompt_type) if self.instructions else None
        said = self._memory.features(self.encoder, texts, batch_size, show_progress_bar, instruction=instruction)
        if self._forgets:
            self._memory.clear()
        return self.encoder.combine(said)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """(n, m): the encoder's similarity of each of (n, D) with each of (m, D)."""
        return torch.from_numpy(self.encoder.similarity(_array(embeddings1), _array(embeddings2)))

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """(n,): the encoder's similarity of each of (n, D) with the one in the same place."""
        return torch.from_numpy(self.encoder.similarity_pairwise(_array(embeddings1), _array(embeddings2)))

    @cached_property
    def mteb_model_meta(self) -> ModelMeta:
        """Name, weights and setting. What is not known is None."""
        encoder, model = self.encoder, unwrapped(self.encoder.model)
        routers = list(encoder.routers.values())
        return ModelMeta.create_empty(
            overwrites={
                "name": name_of(encoder.source),
                "revision": digest(model, encoder.tokenizer),
                "loader_kwargs": encoder.about() | self._about,
                "experiment_kwargs": self._setting(routers),
                "n_parameters": None if packed_experts(model) else model.num_parameters(),
                "max_tokens": encoder.max_length,
                "embed_dim": encoder.dimension,
                "similarity_fn_name": ScoringFunction(encoder.similarity_name),
                "framework": ["PyTorch"],
                "use_instructions": self.instructions,
            }
        )

    def _setting(self, routers: Sequence[Any]) -> dict[str, Any]:
        """What names the folder of results: router, alpha, embedding and prompt always, the others where they differ
        from what is left out. loader_kwargs hold all of it in full."""
        encoder, settings = self.encoder, self.encoder.settings
        listens, statistics = settings.embedding != "hidden", encoder.statistics
        dtype = str(unwrapped(encoder.model).dtype).removeprefix("torch.")
        optional = {
            "pooling": None if settings.pooling == "last" else settings.pooling,
            "moee": "sum" if settings.is_sum else None,
            "w": float(settings.w) if settings.is_sum and settings.w != 1 else None,
            "features": settings.router_features if listens and settings.router_features != "logits" else None,
            "layers": None if settings.layers is None else short(", ".join(map(str, settings.layers))),
            "instruction": True if self.instructions else None,
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
            **{name: short(str(value)) for name, value in self._about.items()},
        }


def refuse_sum(task_metadata: Any) -> None:
    """Raise ValueError for a task that reads the vector of one text, where a MoEE sum has none to give."""
    if task_metadata.type not in READS_SIMILARITIES:
        raise ValueError(
            f"The sum of MoEE compares two texts, and has no meaning for {task_metadata.type} ({task_metadata.name}), "
            "which reads the vector of one. Use moee='concat'."
        )


def _instruction(task_metadata: Any, prompt_type: Any) -> str | None:
    """What the task's author says to do, for queries or documents where these differ; None where nothing is said."""
    said = task_metadata.prompt
    if isinstance(said, Mapping):
        said = None if prompt_type is None else said.get(getattr(prompt_type, "value", prompt_type))
    return said or None


def _array(vectors: Any) -> np.ndarray:
    return vectors.detach().cpu().float().numpy() if isinstance(vectors, Tensor) else np.asarray(vectors)


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
