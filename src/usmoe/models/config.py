"""What a language model is made of, as one frozen value; the named sizes are values of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from usmoe.checked import refuse_wrong_types
from usmoe.experts.compute import refuse_no_size
from usmoe.routing.gates import GATES


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """A decoder whose feed-forward layers are mixtures of experts. Transformer-XL and a modern decoder are two points
    of one grid: how positions enter, which norm stands where, what an expert computes."""

    vocabulary: int | None = None
    """Tokens it knows; None in a training configuration: as many as its data have."""
    layers: int = 4
    d_model: int = 256
    heads: int = 8
    head_size: int | None = None
    """Width of one attention head; None: d_model / heads."""
    d_ff: int = 512
    """Width of one expert; of the whole feed-forward layer where there are no experts."""
    num_experts: int = 16
    """0: dense feed-forward layers, to compare with."""
    shared_experts: int = 0
    """Experts that every token passes, beside the routed ones."""
    router: str = "usmoe(k=2)"
    """As on the command line; module:name is one of your own."""
    gate: str = "linear"
    """linear | cosine | noisy | frozen | ... (usmoe.routing.gates.GATES)."""
    moving: bool = False
    """Route by the moving average of the router's cut, in training too."""
    noise: float = 0.0
    """Standard deviation of what is added to the router's logits in training."""
    position: Literal["relative", "rotary"] = "relative"
    """How positions enter the attention: Transformer-XL's relative encoding, or RoPE."""
    norm: Literal["layer", "rms"] = "layer"
    norm_place: Literal["post", "pre"] = "post"
    """After each residual sum (Transformer-XL), or before each sublayer and once at the end."""
    qk_norm: bool = False
    """Whether queries and keys are normalised, as in OLMoE."""
    activation: Literal["relu", "swiglu"] = "relu"
    dropout: float = 0.1
    """Of embeddings, sublayer outputs, hidden units of experts, and the last layer's output."""
    attention_dropout: float = 0.0
    tied: bool = True
    """Whether the output layer is the embedding."""
    cutoffs: tuple[int, ...] = ()
    """Adaptive softmax: where the vocabulary, most frequent words first, is cut into clusters; empty: full softmax."""
    shrink: int = 4
    """Adaptive softmax: by how much the width of the words falls from cluster to cluster."""
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        if isinstance(self.cutoffs, list):  # from JSON
            object.__setattr__(self, "cutoffs", tuple(self.cutoffs))
        refuse_wrong_types(self)
        refuse_no_size(layers=self.layers, d_model=self.d_model, heads=self.heads, d_ff=self.d_ff)
        if self.vocabulary is not None:
            refuse_no_size(vocabulary=self.vocabulary)
        for name in ("num_experts", "shared_experts"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is impossible. Give 0 or more.")
        if self.gate not in GATES:
            raise ValueError(f"There is no gate {self.gate!r}. Known: {', '.join(GATES)}.")
        if self.head_size is not None:
            refuse_no_size(head_size=self.head_size)
        if self.rope_theta <= 0:
            raise ValueError(f"rope_theta={self.rope_theta} turns nothing. Give a number above 0.")
        if self.head_size is None and self.d_model % self.heads:
            raise ValueError(
                f"d_model={self.d_model} does not divide into {self.heads} heads. Give another number, or head_size."
            )
        if self.position == "rotary" and self.size_of_head % 2:
            raise ValueError(f"RoPE turns pairs, and a head is {self.size_of_head} wide. Give an even head_size.")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is no share. Give 0 or more, below 1.")
        if self.noise < 0:
            raise ValueError(f"noise={self.noise} is no deviation. Give 0 or more.")
        if list(self.cutoffs) != sorted(set(self.cutoffs)) or (self.cutoffs and self.cutoffs[0] < 1):
            raise ValueError(f"cutoffs={self.cutoffs} do not ascend from 1. Give such as (20000, 60000).")
        if self.vocabulary is not None and self.cutoffs and self.cutoffs[-1] >= self.vocabulary:
            raise ValueError(
                f"cutoffs={self.cutoffs} leave nothing of {self.vocabulary} words after the last. Give smaller ones."
            )
        if self.cutoffs and not self.tied:
            raise ValueError(
                "An adaptive softmax shares its words with the embedding. Leave tied=True, or cutoffs out."
            )
        if self.shrink < 1:
            raise ValueError(f"shrink={self.shrink} is impossible. Give 1 or more.")

    @property
    def size_of_head(self) -> int:
        return self.d_model // self.heads if self.head_size is None else self.head_size

    def replace(self, **changes: Any) -> LanguageConfig:
        """The same with some fields changed."""
        return dataclasses.replace(self, **changes)


_XL = LanguageConfig(layers=4, d_model=256, heads=8, head_size=64, d_ff=512, num_experts=16)
_DECODER = LanguageConfig(
    layers=4,
    d_model=256,
    heads=8,
    d_ff=352,
    position="rotary",
    norm="rms",
    norm_place="pre",
    qk_norm=True,
    activation="swiglu",
    dropout=0.0,
)

MODELS: dict[str, LanguageConfig] = {
    "transformer-xl-base": _XL,
    "transformer-xl-large": _XL.replace(layers=12, d_model=512, d_ff=2048),
    "transformer-xl-small": _XL.replace(layers=2, d_model=96, heads=2, head_size=None, d_ff=128, dropout=0.0),
    "decoder-base": _DECODER,
    "decoder-small": _DECODER.replace(layers=2, d_model=96, heads=2, d_ff=96),
}
"""Named sizes. transformer-xl-base is the paper's 20 M model (section A.6); the width of the large one is unstated, and
chosen here so that it has 420 M parameters with twelve layers."""
