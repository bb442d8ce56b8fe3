"""An Encoder as a SentenceTransformer, of one module that reads, runs and pools."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from usmoe.embed.encoder import Encoder
from usmoe.embed.extra import of_extra
from usmoe.embed.saved import load, save
from usmoe.hf.load import DTYPES
from usmoe.hf.wrapped import unwrapped

with of_extra("Encoder.as_sentence_transformer()"):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import InputModule


def hosted(encoder: Encoder) -> SentenceTransformer:
    """A SentenceTransformer with the vectors of an encoder, and with its similarity: the cosine, or, for a MoEE sum,
    the dot product.

    The model is shared, and stays where it is. `.to(device)` moves it for both; a model of the user's own is patched
    while a batch runs, and only then. `prompt=` of its encode() goes right before each text, inside of the encoder's
    own prompt. It gives no gradients, so it cannot be trained.

    What its save() wrote, Encoder.load(folder) reads, and SentenceTransformer(folder, trust_remote_code=True):
    sentence-transformers asks for that flag for all modules but its own, and runs the usmoe that is installed.
    """
    return SentenceTransformer(
        modules=[EncoderModule(encoder)],
        device=str(unwrapped(encoder.model).device),
        similarity_fn_name=encoder.similarity_name,
    )


class EncoderModule(InputModule):
    """What a hosted encoder's modules.json names: from texts to sentence embeddings."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.model = encoder.model
        self.encoder = encoder
        self._dimension: int | None = None

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **_: Any) -> dict[str, Tensor]:
        """Token ids (B, L), padded on the right, and their mask."""
        texts = [prompt + text for text in inputs] if prompt else inputs
        tokens, lengths = self.encoder.extract.padded(self.encoder.read(texts))
        mask = torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)
        return {"input_ids": tokens, "attention_mask": mask.long()}

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        """The features, and the sentence embeddings (B, D) of them."""
        tokens, lengths = features["input_ids"], features["attention_mask"].sum(1)
        with self.encoder.routed() as model:
            said = self.encoder.extract.of_tokens(model, tokens, lengths)
        vectors = torch.from_numpy(self.encoder.combine(said)).to(tokens.device)
        return {**features, "sentence_embedding": vectors}

    def get_embedding_dimension(self) -> int:
        """D: length of a vector."""
        if self._dimension is None:
            self._dimension = self.encoder.dimension
        return self._dimension

    @property
    def max_seq_length(self) -> int | None:
        """Tokens of prompt and text that are read, at most."""
        return self.encoder.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        self.encoder = self.encoder.variant(max_length=value, standardize=self.encoder.statistics)

    @property
    def tokenizer(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the encoder."""
        return self.encoder.tokenizer

    def get_config_dict(self) -> dict[str, Any]:
        """All that a vector depends on beside the weights; for print()."""
        return self.encoder.about()

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Write the encoder, as Encoder.save() does."""
        save(self.encoder, Path(output_path))

    @classmethod
    def load(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        *,
        model_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> EncoderModule:
        """The module that `save` wrote, from a folder or the hub. Of model_kwargs, `dtype` is read; ValueError for
        others."""
        folder = cls.load_dir_path(
            model_name_or_path,
            subfolder,
            token=token,
            cache_folder=cache_folder,
            revision=revision,
            local_files_only=local_files_only,
        )
        return cls(load(Path(folder or model_name_or_path), dtype=_dtype(model_kwargs or {})))


def _dtype(model_kwargs: dict[str, Any]) -> str | None:
    others = set(model_kwargs) - {"dtype", "torch_dtype"}
    if others:
        raise ValueError(f"model_kwargs={model_kwargs} cannot be read: an encoder of usmoe knows dtype alone.")
    given = model_kwargs.get("dtype", model_kwargs.get("torch_dtype"))
    known = {dtype: name for name, dtype in DTYPES.items()} | {name: name for name in DTYPES} | {"auto": None}
    return known.get(given, str(given)) if given is not None else None
