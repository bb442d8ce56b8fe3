"""`FeatureMemory`: one forward a text for all encoders that make different vectors of the same features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from usmoe.embed.encoder import Encoder
from usmoe.embed.features import Features
from usmoe.embed.texts import refuse_what_is_no_text

_Row = tuple[np.ndarray | None, np.ndarray | None]
"""Hidden state (D,) and router features (R,) of a text."""


class FeatureMemory:
    """The features of texts that were run before, for encoders that share model, router, prompt and pooling.

    memory = FeatureMemory()
    for encoder in (hidden, moee):          # all join before the first asks
        memory.join(encoder)
    memory.features(hidden, texts)          # runs the model, and takes down what the routers say, too
    memory.features(moee, texts)            # does not run it
    memory.clear()                          # before other texts

    A text that stands twice in a call is run once. Under a router that does not promise that a vector depends on its
    text alone, nothing is kept, and every call runs all its texts.
    """

    def __init__(self, limit: int = 100_000) -> None:
        """limit: texts that are kept, or those of the last call where these are more. One more, and all others are
        forgotten."""
        self._limit = limit
        self._encoders: list[Encoder] = []
        self._runs: Encoder | None = None
        self._alone = False
        self._rows: dict[tuple[str, str | None], _Row] = {}

    def __len__(self) -> int:
        """Texts that are kept."""
        return len(self._rows)

    def clear(self) -> None:
        """Forget the texts; the encoders stay."""
        self._rows.clear()

    def join(self, encoder: Encoder) -> None:
        """Share the forwards with one more encoder. Raises ValueError where they cannot be shared."""
        for other in self._encoders:
            if what := _differs(encoder, other):
                raise ValueError(
                    f"Two encoders with a memory in common differ in their {what}, so they cannot share a forward. "
                    "Give each a memory of its own."
                )
        self._encoders.append(encoder)
        self._runs = None
        self.clear()  # what is kept may lack what this one needs

    def features(
        self,
        encoder: Encoder,
        texts: Sequence[str],
        batch_size: int = 32,
        progress: bool = True,
        *,
        instruction: str | None = None,
    ) -> Features:
        """What encoder.features() would say, of an encoder that has joined."""
        if self._runs is None:
            self._runs, self._alone = _widest(self._encoders), encoder.text_alone
        if not texts or not self._alone:
            return encoder.features(texts, batch_size, progress, instruction=instruction)
        refuse_what_is_no_text(texts)
        once = list(dict.fromkeys(texts))
        missing = [text for text in once if (text, instruction) not in self._rows]
        if len(self._rows) + len(missing) > self._limit:
            self.clear()
            missing = once
        if missing:
            said = self._runs.features(missing, batch_size, progress, instruction=instruction)
            for index, text in enumerate(missing):
                self._rows[text, instruction] = (_row(said.hidden, index), _row(said.router, index))
        kept = [self._rows[text, instruction] for text in texts]
        wanted = encoder.settings.embedding
        return Features(
            hidden=None if wanted == "router" else np.stack([hidden for hidden, _ in kept if hidden is not None]),
            router=None if wanted == "hidden" else np.stack([router for _, router in kept if router is not None]),
        )


def _row(features: np.ndarray | None, index: int) -> np.ndarray | None:
    return None if features is None else features[index]


def _differs(one: Encoder, other: Encoder) -> str | None:
    """In what two encoders differ that a forward depends on; None where they can share it."""
    if one.model is not other.model or one.tokenizer is not other.tokenizer:
        return "model or tokenizer"
    if one.router != other.router:
        return "router"
    fields = ["prompt", "pooling", "max_length"]
    if one.settings.embedding != "hidden" != other.settings.embedding:
        fields += ["router_features", "layers"]
    return next((name for name in fields if getattr(one.settings, name) != getattr(other.settings, name)), None)


def _widest(encoders: Sequence[Encoder]) -> Encoder:
    """One whose features hold those of all."""
    listening = [encoder for encoder in encoders if encoder.settings.embedding != "hidden"]
    first = (listening or encoders)[0]
    needs = {encoder.settings.embedding for encoder in encoders}
    return first if len(needs) == 1 else first.variant(embedding="moee", standardize=None)
