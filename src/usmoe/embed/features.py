"""What one forward of a model says of a batch of texts: the hidden state, and what its routers say."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from usmoe.embed.pooling import POOLINGS
from usmoe.hf.layers import Layer
from usmoe.hf.patch import listening, patch_of, supported_layers
from usmoe.hf.wrapped import unwrapped
from usmoe.types import RouterOutput


@dataclass(frozen=True, kw_only=True)
class Features:
    """Of n texts, in float32. What was not asked for is None."""

    hidden: np.ndarray | None
    """(n, D): the pooled last hidden state."""
    router: np.ndarray | None
    """(n, R): the pooled router logits (or probabilities) of each chosen MoE layer, one beside the other."""

    @property
    def whole(self) -> np.ndarray:
        """(n, D + R), or what of it there is."""
        return np.concatenate([part for part in (self.hidden, self.router) if part is not None], axis=1)

    def __len__(self) -> int:
        return len(self.whole)


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """Runs a model on batches of token ids and pools what comes out."""

    model: PreTrainedModel
    pooling: str
    """A name in POOLINGS."""
    hidden: bool
    router: bool
    """What is wanted. For `router` the model must be patched while it runs."""
    probabilities: bool
    """Whether logits become the model's own scores (softmax, mostly) before they are pooled."""
    layers: tuple[Layer, ...]
    """The MoE layers whose routers are listened to."""
    padding: int
    """Token id that fills a batch; it is masked."""

    @torch.inference_mode()
    def __call__(self, batch: Sequence[Sequence[int]]) -> Features:
        """The features of a batch of token ids. Padding stands on the right, where no token attends to it."""
        lengths = torch.tensor([len(ids) for ids in batch])
        tokens = torch.full((len(batch), int(lengths.max())), self.padding)
        for row, ids in zip(tokens, batch, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return self.of_tokens(tokens, lengths)

    @torch.inference_mode()
    def of_tokens(self, tokens: Tensor, lengths: Tensor) -> Features:
        """The features of tokens (B, L), padded on the right, with `lengths` (B,) real tokens each."""
        inner = unwrapped(self.model)
        device = inner.get_input_embeddings().weight.device
        rows = inner.get_input_embeddings().weight.shape[0]
        if int(tokens.max()) >= rows:
            raise ValueError(
                f"The tokenizer gives token {int(tokens.max())}, and the model has {rows}. Give the tokenizer that "
                "belongs to the model."
            )
        tokens, lengths = tokens.to(device), lengths.to(device)
        mask = (torch.arange(tokens.shape[1], device=device) < lengths.unsqueeze(1)).long()
        said: dict[str, Tensor] = {}
        pool = POOLINGS[self.pooling]
        wanted = {layer.name: layer for layer in self.layers}

        def listen(name: str, output: RouterOutput) -> None:
            if name in wanted:
                said[name] = self._of_router(wanted[name], output, tokens, lengths)

        with listening(inner, listen) if self.router else contextlib.nullcontext():
            states = _last_hidden_state(inner, tokens, mask)
        if self.router and len(said) < len(wanted):
            silent = next(name for name in wanted if name not in said)
            raise ValueError(f"{silent} did not run, so it has nothing to say. Choose other layers.")
        router = torch.cat([said[name] for name in wanted], 1).cpu().numpy() if self.router else None
        hidden = pool(states, lengths.to(states.device)).cpu().numpy() if self.hidden else None
        return Features(hidden=hidden, router=router)

    def _of_router(self, layer: Layer, output: RouterOutput, tokens: Tensor, lengths: Tensor) -> Tensor:
        logits = output.logits
        if logits.shape[0] * logits.shape[1] != tokens.numel():
            raise ValueError(
                f"{layer.name} sees {logits.shape[0] * logits.shape[1]} tokens where the model was given "
                f"{tokens.numel()}, so its router has nothing to say of some texts. Choose other layers."
            )
        logits = logits.reshape(*tokens.shape, -1)
        if self.probabilities:
            logits = layer.host.weighing_scores(logits.float())
        return POOLINGS[self.pooling](logits, lengths.to(logits.device)).cpu()


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
