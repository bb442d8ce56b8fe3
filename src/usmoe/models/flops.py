"""What a token costs, counted by the pairs that were really computed."""

from __future__ import annotations

from dataclasses import dataclass

from usmoe.experts.compute import up_width
from usmoe.models.config import LanguageConfig


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations of a forward for one token, two for a multiply-add; all layers together. Of a sequence
    by itself: the projections of the distances, which a batch shares, are counted for each."""

    experts: float
    """Of the routed experts: in proportion to the pairs."""
    shared: float
    """Of shared experts, or of a dense feed-forward layer."""
    router: float
    """Of a linear gate, whichever it is."""
    projections: float
    """Of the attention's matrices."""
    attention: float
    """Of its scores and sums, over the tokens that are seen on average."""
    words: float
    """Of the output layer (of an adaptive one: the first cluster)."""

    @property
    def total(self) -> float:
        return self.experts + self.shared + self.router + self.projections + self.attention + self.words

    @property
    def without_words(self) -> float:
        """Of the layers alone: what the paper's FLOPs come nearest to, and what does not grow with the vocabulary."""
        return self.total - self.words


def flops(config: LanguageConfig, experts_per_token: float, segment: int, memory: int = 0) -> Flops:
    """What one token costs on average, in segments of so many tokens after so many remembered ones.

    experts_per_token  pairs over real tokens, as counted: 1.5 is between 1 and 2, dropped tokens cost nothing
    The projections of remembered tokens are made anew in each segment, and are counted.
    """
    return _flops(config, experts_per_token, memory + (segment + 1) / 2, (memory + segment) / segment)


def flops_of_reading(
    config: LanguageConfig, experts_per_token: float, tokens: int, segment: int, memory: int = 0
) -> Flops:
    """What one token costs on average when a text of so many tokens is read from its beginning, segment after segment:
    the memory is empty at first, and grows to `memory` tokens. The last segment may be shorter.

    As `flops`, but of the tokens that were there to be seen. Raises ValueError for a text without tokens.
    """
    if tokens < 1:
        raise ValueError(f"A text of {tokens} tokens costs nothing to read. Give one of 1 or more.")
    seen = keys = 0.0
    for start in range(0, tokens, segment):
        width, remembered = min(segment, tokens - start), min(memory, start)
        seen += width * (remembered + (width + 1) / 2)
        keys += remembered + width
    return _flops(config, experts_per_token, seen / tokens, keys / tokens)


def _flops(config: LanguageConfig, experts_per_token: float, seen: float, keys: float) -> Flops:
    """seen: tokens that a token looks at; keys: how many keys are made for each token, on average."""
    layers, wide = config.layers, config.heads * config.size_of_head
    width = up_width(config.activation, config.d_ff)
    one_expert = 2 * config.d_model * width + 2 * config.d_ff * config.d_model
    routed = bool(config.num_experts)
    relative = config.position == "relative"
    projections = 2 * config.d_model * wide * (2 + 2 * keys)  # query and out; key and value of all that is seen
    if relative:
        projections += 2 * config.d_model * wide * keys  # a row a distance, once a segment
    vocabulary = config.cutoffs[0] + len(config.cutoffs) if config.cutoffs else config.vocabulary or 0
    return Flops(
        experts=layers * experts_per_token * one_expert if routed else 0.0,
        shared=layers * one_expert * (config.shared_experts if routed else 1),
        router=layers * 2 * config.d_model * config.num_experts,
        projections=layers * projections,
        attention=layers * 2 * wide * seen * (3 if relative else 2),
        words=2 * config.d_model * vocabulary,
    )
