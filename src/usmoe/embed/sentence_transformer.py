"""An Encoder as a SentenceTransformer, of one module that reads, runs and pools."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_module_registration_hook

from usmoe.embed.encoder import Encoder
from usmoe.embed.extra import of_extra
from usmoe.embed.saved import load, save
from usmoe.embed.setting import name_of, revision_of, setting_of
from usmoe.hf.load import DTYPES
from usmoe.hf.wrapped import unwrapped

with of_extra("Encoder.as_sentence_transformer()"):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import InputModule
    from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData


def hosted(encoder: Encoder) -> SentenceTransformer:
    """A SentenceTransformer with the vectors of an encoder, and with its similarity: the cosine, or, for a MoEE sum,
    the dot product.

    The model is shared, and stays where it is. `.to(device)` moves it for both; neither is it patched, nor does its
    mode change, while a batch runs. `prompt=` of its encode() goes right before each text, inside of the encoder's own
    prompt, and is pooled with it. It gives no gradients, so it cannot be trained.

    Its model card has the encoder's name, and as revision a digest of weights and setting: so mteb keeps the results of
    different encoders apart.

    What its save() wrote, Encoder.load(folder) reads, and SentenceTransformer(folder, trust_remote_code=True):
    sentence-transformers asks for that flag for all modules but its own, and runs the usmoe that is installed.
    """
    module = EncoderModule(encoder)
    with _noticed(module):
        return SentenceTransformer(
            modules=[module],
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

    def train(self, mode: bool = True) -> EncoderModule:
        """The mode of this module; the model, which may be the user's own, keeps its mode: what runs is a view of it in
        evaluation mode."""
        self.training = mode
        return self

    def preprocess(
        self,
        inputs: Sequence[Any],
        prompt: str | None = None,
        *,
        task: str | None = None,
        processing_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """Token ids (B, L), padded on the right, and their mask.

        task  query or document, as encode_query() and encode_document() say: an encoder reads both alike

        Raises ValueError for processing_kwargs: how a text is read is a setting of the encoder.
        """
        if processing_kwargs:
            raise ValueError(
                f"processing_kwargs={processing_kwargs} cannot be read: an encoder of usmoe has its own reader. "
                "Set max_seq_length, or make the encoder with another prompt or max_length."
            )
        texts = [prompt + text for text in inputs] if prompt else inputs
        tokens, lengths = self.encoder.extract.padded(self.encoder.read(texts))
        mask = torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)
        return {"input_ids": tokens, "attention_mask": mask.long()}

    @torch.compiler.disable(reason="a view of the model is made for each batch")
    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The features, the sentence embeddings (B, D) of them, and, where these are pooled hidden states, the tokens'
        own (B, L, D) as token_embeddings.

        Raises ValueError where it is to be trained.
        """
        if self.training and torch.is_grad_enabled():
            raise ValueError(
                "An encoder of usmoe gives no gradients, so it cannot be trained. Train its model by itself, with peft "
                "or sentence_transformers' own Transformer module, and make the encoder of it afterwards."
            )
        tokens, lengths = features["input_ids"], features["attention_mask"].sum(1)
        with self.encoder.routed() as model:
            said, states = self.encoder.extract.with_states(model, tokens, lengths)
        vectors = torch.from_numpy(self.encoder.combine(said)).to(tokens.device)
        found = {**features, "sentence_embedding": vectors}
        if self.encoder.settings.embedding == "hidden":
            found["token_embeddings"] = self._standardised(states.float()).to(tokens.device)
        return _Said(found, is_sum=self.encoder.settings.is_sum)

    def _standardised(self, states: Tensor) -> Tensor:
        """(B, L, D): as the vectors are, so that what is pooled of them is a vector."""
        statistics = self.encoder.statistics
        if statistics is None:
            return states
        mean, deviation = (torch.from_numpy(part).to(states.device) for part in (statistics.mean, statistics.deviation))
        return (states - mean) / deviation

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

    def save(self, output_path: str, *, safe_serialization: bool = True) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write the encoder, as Encoder.save() does. Raises ValueError for weights that are not to be safetensors."""
        if not safe_serialization:
            raise ValueError("An encoder of usmoe is saved as safetensors alone. Leave safe_serialization out.")
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
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        backend: str = "torch",
    ) -> EncoderModule:
        """The module that `save` wrote, from a folder or the hub. Of model_kwargs, `dtype` is read; trust_remote_code
        has been asked for this module, which runs no other code.

        Raises ValueError for other options of the model, for those of a tokenizer (tokenizer_kwargs, processor_kwargs)
        or a configuration, and for a backend other than torch.
        """
        for name, value in (("processor_kwargs", processor_kwargs), ("config_kwargs", config_kwargs)):
            if value:
                raise ValueError(
                    f"{name}={value} cannot be read: tokenizer and configuration are those that the encoder was saved "
                    "with. Leave it out."
                )
        if backend != "torch":
            raise ValueError(f"backend={backend!r} is impossible: an encoder of usmoe runs in torch. Leave it out.")
        folder = cls.load_dir_path(
            model_name_or_path,
            subfolder,
            token=token,
            cache_folder=cache_folder,
            revision=revision,
            local_files_only=local_files_only,
        )
        module = cls(load(Path(folder or model_name_or_path), dtype=_dtype(model_kwargs or {})))
        _notice(module)
        return module


class _Said(dict[str, Tensor]):
    """What a batch says. sentence-transformers cuts the vectors in it, and looks up what it was asked for."""

    def __init__(self, said: dict[str, Tensor], *, is_sum: bool) -> None:
        super().__init__(said)
        self._is_sum = is_sum

    def __setitem__(self, name: str, value: Tensor) -> None:
        if self._is_sum and name == "sentence_embedding" and value.shape[-1] < self[name].shape[-1]:
            raise ValueError(
                "truncate_dim is impossible for the sum of MoEE: its vectors are two of length 1, and a part of them "
                'compares nothing. Leave it out, or use moee="concat".'
            )
        super().__setitem__(name, value)

    def __missing__(self, name: str) -> Tensor:
        raise ValueError(
            f'output_value="{name}" is impossible for this encoder: only embedding="hidden" has a vector a token.'
        )


class EncoderCard(SentenceTransformerModelCardData):
    """The model card of a hosted encoder, by which mteb names its results: what its vectors depend on now."""

    @property
    def base_model_revision(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The digest of the weights, and one of all else that a vector depends on."""
        host = self.model
        if host is None:
            return None
        module: Any = host[0]
        setting = setting_of(module.encoder)
        if host.truncate_dim is not None:
            setting["truncate_dim"] = host.truncate_dim
        prompts = {name: text for name, text in host.prompts.items() if text}
        if prompts:
            setting |= {"prompts": prompts, "default_prompt_name": host.default_prompt_name}
        said = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()
        return f"{revision_of(module.encoder)}-{said[:12]}"

    @base_model_revision.setter
    def base_model_revision(self, value: str | None) -> None:
        """sentence-transformers sets that of the hub, where it finds one; the digest says more."""


@contextlib.contextmanager
def _noticed(module: EncoderModule) -> Iterator[None]:
    """Within it, a SentenceTransformer that takes the module becomes a host of it."""
    handle = _notice(module)
    try:
        yield
    finally:
        handle.remove()


def _notice(module: EncoderModule) -> Any:
    """Make a host of the SentenceTransformer that takes the module, as soon as it does; this once."""

    def taken(parent: Any, _: str, child: Any) -> None:
        if child is module and isinstance(parent, SentenceTransformer):
            handle.remove()
            if parent.model_card_data.model_name is None:
                parent.model_card_data = EncoderCard(
                    model_name=name_of(module.encoder.source), local_files_only=parent.model_card_data.local_files_only
                )
            parent.set_pooling_include_prompt = _include_prompt  # pyright: ignore[reportAttributeAccessIssue]

    handle = register_module_module_registration_hook(taken)
    return handle


def _include_prompt(include_prompt: bool) -> None:
    """In place of set_pooling_include_prompt(), which would do nothing. Raises ValueError for False."""
    if not include_prompt:
        raise ValueError(
            "set_pooling_include_prompt(False) is impossible: an encoder of usmoe pools prompt and text together. Use "
            'pooling="last", which reads the last token alone.'
        )


def _dtype(model_kwargs: dict[str, Any]) -> str | None:
    others = set(model_kwargs) - {"dtype", "torch_dtype"}
    if others:
        raise ValueError(f"model_kwargs={model_kwargs} cannot be read: an encoder of usmoe knows dtype alone.")
    given = model_kwargs.get("dtype", model_kwargs.get("torch_dtype"))
    known = {dtype: name for name, dtype in DTYPES.items()} | {name: name for name in DTYPES} | {"auto": None}
    return known.get(given, str(given)) if given is not None else None
