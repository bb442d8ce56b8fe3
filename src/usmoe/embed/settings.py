"""`EncoderSettings`: all that an embedding depends on beside the model, its router and a sample."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from usmoe.embed.prompts import template_of
from usmoe.layers.pooling import Pooling

Embedding = Literal["hidden", "router", "moee"]
Combination = Literal["concat", "sum"]
RouterFeatures = Literal["logits", "probabilities"]


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """All that an embedding depends on beside the model, its router and the statistics of a sample."""

    embedding: Embedding = "hidden"
    """hidden: the last hidden state. router: what the routers say. moee: both (MoEE, arXiv 2410.10814)."""
    prompt: str = "none"
    """A name in usmoe.embed.prompts.PROMPTS, or a template with {text}."""
    pooling: Pooling = "last"
    """Over the tokens of prompt and text."""
    moee: Combination = "concat"
    """concat: one beside the other. sum: the similarity is cos(hidden) + w cos(router)."""
    w: float = 1.0
    """Weight of the routers' cosine in the sum; 0 or more."""
    router_features: RouterFeatures = "logits"
    """Router logits, or the model's own scores of them (softmax, mostly), before any normalisation over the chosen."""
    layers: tuple[int | str, ...] | None = None
    """MoE layers whose routers count, by index or name; None for all."""
    max_length: int | None = None
    """Tokens of prompt and text, at most; None for what the model can read."""

    def __post_init__(self) -> None:
        closed = {"embedding": Embedding, "pooling": Pooling, "moee": Combination, "router_features": RouterFeatures}
        for name, choices in closed.items():
            if getattr(self, name) not in get_args(choices):
                known = ", ".join(get_args(choices))
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown. Choose one of: {known}.")
        if not isinstance(self.prompt, str):
            raise ValueError(
                f"prompt={self.prompt!r} is no text. Give a name, such as none, or one with {{text}} in it."
            )
        template_of(self.prompt)
        if isinstance(self.w, bool) or not (isinstance(self.w, int | float) and 0 <= self.w < float("inf")):
            raise ValueError(f"w={self.w!r} is no weight. Give a number, 0 or more.")
        if self.embedding == "hidden" and self.layers is not None:
            raise ValueError('layers names routers, which embedding="hidden" does not read. Leave it out.')
        defaults = {field.name: field.default for field in fields(self)}
        for name in unread(self.embedding, self.moee):
            if getattr(self, name) != defaults[name]:
                under = f'embedding="{self.embedding}"' + (f', moee="{self.moee}"' if self.embedding == "moee" else "")
                raise ValueError(f"{name}={getattr(self, name)!r} means nothing under {under}. Leave it out.")

    def changed(self, **changes: Any) -> EncoderSettings:
        """The same with some fields changed; what is read no more and is not named goes back to its default."""
        said = {"embedding": self.embedding, "moee": self.moee, **changes}
        defaults = {field.name: field.default for field in fields(self)}
        return replace(self, **{name: defaults[name] for name in unread(said["embedding"], said["moee"])} | changes)

    @property
    def of_features(self) -> tuple[Any, ...]:
        """What the features depend on: settings that agree in it can share forwards and statistics."""
        return (self.embedding, self.prompt, self.pooling, self.router_features, self.layers, self.max_length)

    @property
    def is_sum(self) -> bool:
        """Whether the embedding exists for the sake of a similarity alone."""
        return self.embedding == "moee" and self.moee == "sum"


def unread(embedding: str, moee: str) -> tuple[str, ...]:
    """The fields of EncoderSettings that nothing reads under an embedding and a way to combine."""
    if embedding == "hidden":
        return ("router_features", "layers", "moee", "w")
    if embedding == "router":
        return ("moee", "w")
    return ("w",) if embedding == "moee" and moee == "concat" else ()
