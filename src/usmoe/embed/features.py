"""What one forward of a model says of a batch of texts: the hidden state, and what its routers say."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from usmoe.hf.layers import Layer
from usmoe.hf.patch import listening, patch_of, supported_layers
from usmoe.hf.wrapped import unwrapped
from usmoe.layers.pooling import POOLINGS, Pooling
from usmoe.types import RouterOutput


@dataclass(frozen=True, kw_only=True)
class Features:
    """Of n texts, in float32. What was not asked for is None."""

    hidden: np.ndarray | None
    """(n, D): the pooled last hidden state."""
    router: np.ndarray | None
    """(n, R): the pooled router logits (or probabilities) of each chosen MoE layer, one beside the other."""
    cut: np.ndarray | None = None
    """(n,): True where a text was longer than the model reads, so that its end was left out; None where texts came as
    token ids."""

    @property
    def whole(self) -> np.ndarray:
        """(n, D + R), or what of it there is."""
        return np.concatenate([part for part in (self.hidden, self.router) if part is not None], axis=1)

    def __len__(self) -> int:
        return len(self.whole)


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """Runs a model on batches of token ids and pools what comes out."""

    pooling: Pooling
    """Of each text's tokens."""
    hidden: bool
    router: bool
    """What is wanted. For `router` the model must be patched."""
    probabilities: bool
    """Whether logits become the model's own scores (softmax, mostly) before they are pooled."""
    layers: tuple[str, ...]
    """Names of the MoE layers whose routers are listened to."""
    padding: int
    """Token id that fills a batch; it is masked."""

    @torch.inference_mode()
    def __call__(self, model: PreTrainedModel, batch: Sequence[Sequence[int]]) -> Features:
        """The features of a batch of token ids."""
        return self.of_tokens(model, *self.padded(batch))

    def padded(self, batch: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) and lengths (B,). Padding stands on the right, where no token attends to it."""
        lengths = torch.tensor([len(ids) for ids in batch])
        tokens = torch.full((len(batch), int(lengths.max())), self.padding)
        for row, ids in zip(tokens, batch, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return tokens, lengths

    @torch.inference_mode()
    def of_tokens(self, model: PreTrainedModel, tokens: Tensor, lengths: Tensor) -> Features:
        """The features of tokens (B, L), padded on the right, with `lengths` (B,) real tokens each; `with_states` says
        more."""
        return self.with_states(model, tokens, lengths)[0]

    @torch.inference_mode()
    def with_states(self, model: PreTrainedModel, tokens: Tensor, lengths: Tensor) -> tuple[Features, Tensor]:
        """The features of tokens (B, L), padded on the right, with `lengths` (B,) real tokens each, and the last hidden
        state (B, L, D), that of padding included.

        Raises ValueError for a token that the model does not have, and for a model that reads no text.
        """
        layers = chosen_layers(model, self.layers) if self.router else ()
        states, heard = _run(model, tokens, lengths, layers)
        pool = POOLINGS[self.pooling]
        pooled = []
        for layer in layers:
            logits = heard.get(layer.name)
            if logits is None or logits.shape[:2] != tokens.shape:
                raise ValueError(f"{layer.name} does not read the tokens of a text. Choose other layers.")
            scores = layer.host.weighing_scores(logits.float()) if self.probabilities else logits
            pooled.append(pool(scores, lengths.to(scores.device)).float().cpu())
        said = Features(
            hidden=pool(states, lengths.to(states.device)).float().cpu().numpy() if self.hidden else None,
            router=torch.cat(pooled, 1).numpy() if self.router else None,
        )
        return said, states


def _run(
    model: PreTrainedModel, tokens: Tensor, lengths: Tensor, layers: Sequence[Layer]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The last hidden state (B, L, D) of a forward without the language head, and the logits of these layers' routers:
    (B, L, E), or as they come where a layer reads something else."""
    inner = unwrapped(model)
    table: Any = getattr(inner.get_input_embeddings(), "weight", None)
    if inner.main_input_name != "input_ids" or not isinstance(table, Tensor) or table.ndim != 2:
        raise ValueError(
            f"{type(inner).__name__} reads no token ids, so it cannot embed a text. Give a language model."
        )
    if int(tokens.max()) >= len(table):
        raise ValueError(
            f"The tokenizer gives token {int(tokens.max())}, and the model has {len(table)}. Give the tokenizer that "
            "belongs to the model."
        )
    tokens, lengths = tokens.to(table.device), lengths.to(table.device)
    mask = (torch.arange(tokens.shape[1], device=table.device) < lengths.unsqueeze(1)).long()
    said: dict[str, Tensor] = {}
    wanted = {layer.name for layer in layers}

    def listen(name: str, output: RouterOutput) -> None:
        if name in wanted:
            logits = output.logits
            same = logits.shape[0] * logits.shape[1] == tokens.numel()
            said[name] = logits.reshape(*tokens.shape, -1) if same else logits

    with listening(inner, listen) if layers else contextlib.nullcontext():
        states = _last_hidden_state(inner, tokens, mask)
    if states.shape[:2] != tokens.shape:
        raise ValueError(
            f"{type(inner).__name__} was given {tuple(tokens.shape)} tokens and has hidden states of "
            f"{tuple(states.shape[:2])}, so none of them is a text's. Give a model that answers token by token."
        )
    return states, said


def _last_hidden_state(model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> Tensor:
    """(B, L, D): what the language head would read. The head itself is not run where the model can do without."""
    base = model.base_model
    causal = {"use_cache": False} if hasattr(model.config.get_text_config(), "use_cache") else {}
    if isinstance(base, PreTrainedModel) and base is not model:
        output = base(input_ids=tokens, attention_mask=mask, **causal)
    else:
        output = model(input_ids=tokens, attention_mask=mask, output_hidden_states=True, **causal)
    state = getattr(output, "last_hidden_state", None)
    if state is None:
        states = getattr(output, "hidden_states", None)
        if not states:
            raise ValueError(f"{type(model).__name__} gives no hidden states, so it cannot embed a text.")
        state = states[-1]
    return state


@torch.inference_mode()
def reading_layers(model: PreTrainedModel, layers: Sequence[Layer], token: int) -> tuple[Layer, ...]:
    """Those of the layers that read the tokens of a text: not the ones that wait for images, say. The model is patched,
    and is run on two short rows of `token`.

    Raises ValueError where none does.
    """
    reading = list(layers)
    for length in (3, 5):  # a layer with tokens of its own may have as many as one of the rows
        tokens = torch.full((1, length), token)
        _, said = _run(model, tokens, torch.tensor([length]), reading)
        reading = [one for one in reading if one.name in said and said[one.name].shape[:2] == tokens.shape]
    if not reading:
        raise ValueError(f"No MoE layer of {type(unwrapped(model)).__name__} reads the tokens of a text.")
    return tuple(reading)


def chosen_layers(model: PreTrainedModel, layers: Sequence[int | str] | None) -> tuple[Layer, ...]:
    """The MoE layers to listen to: all of them, or those of these indices (from 0; negative ones count from the end) or
    names, in this order.

    Raises ValueError for a layer that is not there or named twice, and where none is chosen.
    """
    state = patch_of(model)
    every = tuple(supported_layers(model) if state is None else state.layers)
    if layers is None:
        return every
    names = [layer.name for layer in every]
    found = []
    for one in layers:
        place = names.index(one) if one in names else one
        if isinstance(place, bool) or not isinstance(place, int) or not -len(every) <= place < len(every):
            raise ValueError(
                f"There is no MoE layer {one!r}. Choose by index, 0 to {len(every) - 1}, or by name, {names[0]} to "
                f"{names[-1]}."
            )
        found.append(every[place])
    if not found or len({layer.name for layer in found}) < len(found):
        raise ValueError(f"layers={list(layers)} names {'a layer twice' if found else 'none'}. Give each layer once.")
    return tuple(found)
