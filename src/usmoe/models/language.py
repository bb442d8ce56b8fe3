"""A language model whose feed-forward layers are mixtures of experts, under any router: Transformer-XL and a modern
decoder, by configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from usmoe.experts.compute import ACTIVATIONS, up_width
from usmoe.layers import MoE
from usmoe.models.attention import RelativeAttention, RotaryAttention, Sight
from usmoe.models.config import LanguageConfig
from usmoe.models.norms import norm_of
from usmoe.models.words import words_of
from usmoe.routing.gates import gate_of
from usmoe.routing.text import parse_router
from usmoe.types import RouterOutput


@dataclass(frozen=True, kw_only=True, eq=False)
class Memory:
    """What a model remembers of the segments before: Transformer-XL's recurrence, and the state of its routers."""

    layers: tuple[Float[Tensor, "B M D"], ...]
    """The last M inputs of each layer, without gradient."""
    routers: tuple[Any, ...]
    """The state of each layer's router, where it has one and is asked to go on (`stream`); else None."""
    valid: Bool[Tensor, "B M"] | None = None
    """The places that what follows may see: False for padding, which stands in front, and for packed examples that have
    ended. None: all."""
    segment: Int[Tensor, " B"] | None = None
    """Id of the packed example that they are of; None: 0, as there were none."""

    @property
    def length(self) -> int:
        return self.layers[0].shape[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class LanguageOutput:
    """What a forward gives."""

    hidden: Float[Tensor, "B L D"]
    """The last layer's output, of which `LanguageModel.words` makes likelihoods."""
    memory: Memory | None
    """To pass to the next segment of the same sequences; None where nothing is to be remembered."""
    said: tuple[RouterOutput, ...]
    """What each MoE layer says; empty for a dense model."""


class LanguageModel(nn.Module):
    """Words, layers of causal attention and experts, and likelihoods.

        model = LanguageModel(MODELS["transformer-xl-base"].replace(vocabulary=256))
        out = model(tokens, remember=512)
        loss, nats = model.words.loss(out.hidden.flatten(0, 1), targets.flatten())
        out = model(following, memory=out.memory, remember=512)

    Dropout stands where Transformer-XL has it: on the embeddings, on the distances, on every sublayer's output, and on
    the last output.
    """

    def __init__(self, config: LanguageConfig, router: Any = None) -> None:
        """router: a router of one's own in place of config.router. Raises ValueError for a configuration without a
        vocabulary, and for a router that cannot work with so many experts."""
        super().__init__()
        if config.vocabulary is None:
            raise ValueError("The configuration has no vocabulary. Give it one: config.replace(vocabulary=256).")
        self.config = config
        self.words = words_of(config)
        if config.num_experts and router is None:
            router = parse_router(config.router)
        self.layers = nn.ModuleList(_Layer(config, router) for _ in range(config.layers))
        self.norm = norm_of(config) if config.norm_place == "pre" else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        tokens: Int[Tensor, "B L"],
        *,
        memory: Memory | None = None,
        remember: int = 0,
        stream: bool = False,
        valid: Bool[Tensor, "B L"] | None = None,
        segments: Int[Tensor, "B L"] | None = None,
    ) -> LanguageOutput:
        """The hidden states of a segment, each token seeing itself, those before it, and the memory.

        memory    what an earlier forward of the same sequences gave. Padding in it, and packed examples that have
                  ended, are not seen, and padding does not count as distance
        remember  how many of the last inputs of each layer to hand on, remembered ones included
        stream    whether routers that remember (prefix, a bucket) go on from segment to segment; else each segment is a
                  pool of its own
        valid     False for padding, on either side; after a memory, behind the tokens
        segments  ids of packed examples: neither attention nor a pool crosses them. The first one goes on with the
                  memory where it has the id that the memory ends with (0 where that was made without segments); a
                  forward without segments goes on with that example

        Raises ValueError for padding between what is remembered and tokens that see it.
        """
        x = self.words.embed(tokens)
        if self.config.position == "relative":
            x = x * math.sqrt(self.config.d_model)
        x = self.dropout(x)
        sight = _sight(tokens.shape[1], memory, valid, segments)
        handed_on = _handed_on(memory, tokens, valid, segments) if remember else _HandedOn()
        kept, states, said = [], [], []
        for number, layer in enumerate(self.layers):
            before = None if memory is None else memory.layers[number]
            seen = x if before is None else torch.cat([before.to(x.dtype), x], 1)
            if remember:
                kept.append(handed_on.last(seen.detach(), remember))
            state = memory.routers[number] if memory is not None and stream else None
            pooled = segments
            if state is not None and memory is not None and segments is None and memory.segment is not None:
                pooled = memory.segment[:, None].expand_as(tokens)  # by which the state knows that it goes on
            x, out = layer(x, seen, sight, tokens, valid, pooled, state)
            states.append(out.routing.state if out is not None and stream else None)
            said += [] if out is None else [out]
        after = None
        if remember:
            seen = None if handed_on.seen is None else handed_on.last(handed_on.seen, remember)
            after = Memory(layers=tuple(kept), routers=tuple(states), valid=seen, segment=handed_on.segment)
        return LanguageOutput(hidden=self.dropout(self.norm(x)), memory=after, said=tuple(said))

    def reroute(self, routers: Any) -> None:
        """Route by another router, or by one a layer, from now on. Raises ValueError where the number differs."""
        moe = self.moe_layers
        several = list(routers) if isinstance(routers, Sequence) else [routers] * len(moe)
        if len(several) != len(moe):
            raise ValueError(f"There are {len(moe)} MoE layers, and {len(several)} routers. Give one for each.")
        for layer, router in zip(moe, several, strict=True):
            layer.reroute(router)

    @property
    def moe_layers(self) -> list[MoE]:
        """From the first to the last."""
        return [layer.feed_forward for layer in self.layers if isinstance(layer.feed_forward, MoE)]


def _sight(length: int, memory: Memory | None, valid: Tensor | None, segments: Tensor | None) -> Sight:
    if memory is None:
        return Sight.of(length, 0, valid, segments)
    return Sight.of(length, memory.length, valid, segments, kept=memory.valid, segment=memory.segment)


@dataclass(frozen=True, kw_only=True, eq=False)
class _HandedOn:
    """Which of the places that a segment sees, M remembered ones and its own, are seen by the next one."""

    seen: Bool[Tensor, "B M+L"] | None = None
    """The real ones of the last packed example; None: all."""
    segment: Int[Tensor, " B"] | None = None
    """Its id; None: 0."""
    order: Int[Tensor, "B M+L"] | None = None
    """Those that are not seen first, so that no padding lies between two that are; None: as they stand."""

    def last(self, places: Tensor, number: int) -> Tensor:
        """The last of (B, M+L, ...), in that order."""
        if self.order is None:
            return places[:, -number:]
        order = self.order[:, -number:]
        return places.take_along_dim(order.view(*order.shape, *[1] * (places.ndim - 2)), 1)


def _handed_on(
    memory: Memory | None,
    tokens: Int[Tensor, "B L"],
    valid: Bool[Tensor, "B L"] | None,
    segments: Int[Tensor, "B L"] | None,
) -> _HandedOn:
    before, segment = (None, None) if memory is None else (memory.valid, memory.segment)
    if before is None and valid is None and segments is None:
        return _HandedOn(segment=segment)
    own = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid.bool()
    if memory is not None and before is None:
        before = own.new_ones(len(own), memory.length)
    seen = own if before is None else torch.cat([before, own], 1)
    if segments is not None:
        first = segments.new_zeros(len(segments)) if segment is None else segment
        ids = torch.cat([first[:, None].expand(-1, seen.shape[1] - own.shape[1]), segments], 1)
        place = torch.arange(seen.shape[1], device=seen.device)
        segment = ids.gather(1, place.where(seen, 0).amax(1, keepdim=True)).squeeze(1)
        other = seen & (ids != segment[:, None])
        seen = seen & (other.flip(1).cumsum(1).flip(1) == 0)  # the last run of its id alone
    order = None if valid is None else seen.int().argsort(dim=1, stable=True)
    return _HandedOn(seen=seen, segment=segment, order=order)


class _Layer(nn.Module):
    """Attention and a feed-forward layer, each with its residual, norm and dropout."""

    def __init__(self, config: LanguageConfig, router: Any) -> None:
        super().__init__()
        self.pre = config.norm_place == "pre"
        self.attention = (RelativeAttention if config.position == "relative" else RotaryAttention)(config)
        self.feed_forward = _moe(config, router) if config.num_experts else _Dense(config)
        self.attention_norm, self.feed_forward_norm = norm_of(config), norm_of(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        seen: Float[Tensor, "B K D"],
        sight: Sight,
        tokens: Int[Tensor, "B L"],
        valid: Bool[Tensor, "B L"] | None,
        segments: Int[Tensor, "B L"] | None,
        state: Any,
    ) -> tuple[Float[Tensor, "B L D"], RouterOutput | None]:
        if self.pre:
            seen = self.attention_norm(seen)
            x = x + self.dropout(self.attention(seen[:, -x.shape[1] :], seen, sight))
            y, out = self._feed_forward(self.feed_forward_norm(x), tokens, valid, segments, state)
            return x + self.dropout(y), out
        x = self.attention_norm(x + self.dropout(self.attention(x, seen, sight)))
        y, out = self._feed_forward(x, tokens, valid, segments, state)
        return self.feed_forward_norm(x + self.dropout(y)), out

    def _feed_forward(
        self, x: Tensor, tokens: Tensor, valid: Tensor | None, segments: Tensor | None, state: Any
    ) -> tuple[Tensor, RouterOutput | None]:
        if isinstance(self.feed_forward, MoE):
            return self.feed_forward(x, valid=valid, segments=segments, state=state, tokens=tokens)
        return self.feed_forward(x), None


class _Dense(nn.Module):
    """A feed-forward layer without experts."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.up = nn.Linear(config.d_model, up_width(config.activation, config.d_ff), bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        return self.down(self.dropout(self.activation(self.up(x))))


def _moe(config: LanguageConfig, router: Any) -> MoE:
    return MoE(
        config.d_model,
        config.d_ff,
        config.num_experts,
        router,
        activation=config.activation,
        gate=gate_of(config.gate, config.d_model, config.num_experts, vocabulary=config.vocabulary),
        shared_experts=config.shared_experts,
        dropout=config.dropout,
        noise=config.noise,
        moving=config.moving,
    )
