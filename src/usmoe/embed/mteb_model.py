"""An Encoder as a model for mteb.evaluate(), with a results folder of its own for each setting."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from usmoe.embed.encoder import Encoder
from usmoe.embed.extra import of_extra
from usmoe.embed.memory import FeatureMemory
from usmoe.embed.setting import name_of, revision_of, setting_of
from usmoe.hf.packed import packed_experts
from usmoe.hf.wrapped import unwrapped

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
        **others: Any,
    ) -> np.ndarray:
        """(n, D): the vectors of the texts in mteb's batches, in float32. A text that stands twice is run once.

        Raises ValueError for a MoEE sum in a task that reads vectors, for a precision other than float32, and for what
        mteb hands on of encode_kwargs and an encoder does not read.
        """
        asked = {name: value for name, value in others.items() if value is not None}
        if asked:
            raise ValueError(
                f"{', '.join(asked)} of encode_kwargs cannot be read: of them an encoder of usmoe knows batch_size and "
                "show_progress_bar. What its vectors depend on is said to the encoder: usmoe.Encoder(..., prompt=...)."
            )
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
        return ModelMeta.create_empty(
            overwrites={
                "name": name_of(encoder.source),
                "revision": revision_of(encoder),
                "loader_kwargs": encoder.about() | self._about,
                "experiment_kwargs": setting_of(encoder, instructions=self.instructions, about=self._about),
                "n_parameters": None if packed_experts(model) else model.num_parameters(),
                "max_tokens": encoder.max_length,
                "embed_dim": encoder.dimension,
                "similarity_fn_name": ScoringFunction(encoder.similarity_name),
                "framework": ["PyTorch"],
                "use_instructions": self.instructions,
            }
        )


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
