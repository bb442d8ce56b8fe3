"""What one column of a comparison of embeddings is: a router, an embedding, a prompt, and how they are taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from usmoe.embed.encoder import Combination, Embedding, EncoderSettings, RouterFeatures
from usmoe.embed.settings import unread
from usmoe.layers.pooling import Pooling


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to make embeddings of a model. EncoderSettings says what the fields mean."""

    router: str = "own"
    """As typed: own (the model's own choice), saved (what it was saved with), usmoe(alpha=0.5), expert_choice(...),
    package.module:name, or a .json file that `usmoe tune` wrote."""
    embedding: Embedding = "hidden"
    prompt: str = "none"
    pooling: Pooling = "last"
    moee: Combination = "concat"
    w: float = 1.0
    features: RouterFeatures = "logits"
    """What the router embedding holds."""
    instruction: bool = False
    """Whether each task's own instruction stands before its texts, in MoEE's wrapper."""
    standardize: str | None = None
    """A sample by name, or a file with a text a line; None: features as they are."""
    max_length: int | None = None

    def __post_init__(self) -> None:
        self.encoder_settings()

    def encoder_settings(self) -> EncoderSettings:
        """Those that the encoder of this setting has. Raises ValueError for what is unknown."""
        return EncoderSettings(
            embedding=self.embedding,
            prompt=self.prompt,
            pooling=self.pooling,
            moee=self.moee,
            w=self.w,
            router_features=self.features,
            max_length=self.max_length,
        )

    @property
    def forward(self) -> tuple[Any, ...]:
        """What two settings must share to share their forwards: all but the ways to make a vector of features."""
        return (self.router, self.prompt, self.pooling, self.features, self.instruction, self.max_length)

    @property
    def label(self) -> str:
        """In a line: router, embedding, and what is not the default."""
        return ", ".join(self.words)

    @property
    def words(self) -> tuple[str, ...]:
        """Router, embedding, and what is not the default."""
        words = [self.router, "MoEE" if self.embedding == "moee" else self.embedding]
        if self.embedding == "moee" and self.moee == "sum":
            words.append(f"sum w={self.w:g}")
        words += [self.prompt] if self.prompt != "none" else []
        words += [self.pooling.replace("_", " ")] if self.pooling != "last" else []
        words += [self.features] if self.features != "logits" and self.embedding != "hidden" else []
        words += ["instruction"] if self.instruction else []
        words += [f"standardised by {self.standardize}"] if self.standardize else []
        words += [f"{self.max_length} tokens"] if self.max_length else []
        return tuple(words)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def grid(routers: list[str], embeddings: list[str], prompts: list[str], **shared: Any) -> list[Setting]:
    """Every router with every prompt and every embedding, those that share their forwards side by side. Of what is
    shared, each embedding takes what it reads."""
    found = [
        Setting(router=router, prompt=prompt, embedding=embedding, **_read(embedding, shared))  # pyright: ignore[reportArgumentType]
        for router, prompt, embedding in product(routers, prompts, embeddings)
    ]
    return list(dict.fromkeys(found))


def _read(embedding: str, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings that an embedding reads."""
    left_out = {"features" if name == "router_features" else name for name in unread(embedding, shared.get("moee", ""))}
    return {name: value for name, value in shared.items() if name not in left_out}
