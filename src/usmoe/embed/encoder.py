"""`Encoder`: one vector a text, from a language model as it is, under any router."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedModel

from usmoe.embed import similarity
from usmoe.embed.features import Extractor, Features, chosen_layers, reading_layers
from usmoe.embed.pooling import POOLINGS
from usmoe.embed.prompts import template_of
from usmoe.embed.standardize import Statistics, sample_of
from usmoe.embed.texts import Reader, longest
from usmoe.embed.workers import Workers
from usmoe.hf.layers import Layer
from usmoe.hf.load import load_as_saved, load_tokenizer
from usmoe.hf.patch import patch, patch_of, patched
from usmoe.routing import OwnChoice
from usmoe.types import promises_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from usmoe.embed.mteb_model import MTEBModel

Embedding = Literal["hidden", "router", "moee"]
Pooling = Literal["last", "mean", "weighted_mean"]
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
        template_of(self.prompt)
        if not (isinstance(self.w, int | float) and 0 <= self.w < float("inf")):
            raise ValueError(f"w={self.w!r} is no weight. Give a number, 0 or more.")
        if self.embedding == "hidden" and self.layers is not None:
            raise ValueError('layers names routers, which embedding="hidden" does not read. Leave it out.')

    @property
    def is_sum(self) -> bool:
        """Whether the embedding exists for the sake of a similarity alone."""
        return self.embedding == "moee" and self.moee == "sum"


class Encoder:
    """Sentence vectors from a language model, without training.

    enc = usmoe.Encoder()                                            # the shipped model's last hidden state
    enc = usmoe.Encoder("allenai/OLMoE-1B-7B-0924", router=usmoe.USMoE(alpha=0.5), embedding="moee", prompt="prompteol")
    vectors = enc.encode(["a text", "another"])                      # (2, D) numpy, float32

    model        a transformers model, a folder, a hub id, or None for the model that ships with usmoe. A model of one's
                 own is left as it is: it is patched while it encodes, and only then.
    tokenizer    that of the model; None: from where the model comes
    router       as in usmoe.patch(); None: what the model does by itself, patched or not
    standardize  None: features as they are. "novels" (a sample that ships with usmoe), a file with a text a line, a
                 list of texts, or {name: texts}: each feature minus its mean, over its deviation, both taken once over
                 that sample and kept with the encoder. Or Statistics that were kept.
    device, dtype, offline   for a model that is loaded here: where, float32 | bfloat16 | float16, without the hub
    others       EncoderSettings says what they mean

    A vector depends on its text alone, to float rounding: not on other texts, on the size or order of batches, nor on
    padding. A router whose pool crosses sequences, or lets padding compete, cannot promise that: `text_alone` is then
    False. A dense model has hidden states only.

    Raises ValueError, in one sentence, for what is unknown or does not fit together, and where a model has no MoE layer
    for a router or for router features.
    """

    _run: Any = None
    """Within `working`: what runs batches."""

    def __init__(
        self,
        model: PreTrainedModel | str | Path | None = None,
        tokenizer: Any = None,
        router: Any = None,
        embedding: Embedding = "hidden",
        prompt: str = "none",
        pooling: Pooling = "last",
        moee: Combination = "concat",
        w: float = 1.0,
        standardize: Any = None,
        *,
        router_features: RouterFeatures = "logits",
        layers: Sequence[int | str] | None = None,
        max_length: int | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        offline: bool = False,
    ) -> None:
        self.settings = EncoderSettings(
            embedding=embedding,
            prompt=prompt,
            pooling=pooling,
            moee=moee,
            w=w,
            router_features=router_features,
            layers=None if layers is None else tuple(layers),
            max_length=max_length,
        )
        self.router = router
        self._ours = model is None or isinstance(model, str | Path)
        if model is None or isinstance(model, str | Path):
            self.source: str | None = "shipped" if model is None else str(model)
            self.model: Any = load_as_saved(model, router, device=device, dtype=dtype, offline=offline)
            given = model if tokenizer is None else tokenizer
            self.tokenizer = load_tokenizer(given, offline=offline) if _is_place(given) else given
        else:
            self.source = getattr(getattr(model, "config", None), "_name_or_path", None) or None
            self.model = model
            self.tokenizer = _tokenizer_of(model, tokenizer, self.source, offline)
        if self._ours and self._listens and patch_of(self.model) is None:
            patch(self.model, self._routers())
        self._make()
        self.statistics: Statistics | None = None
        if isinstance(standardize, Statistics):
            self.statistics = standardize
        elif standardize is not None:
            self.statistics = self._statistics(*sample_of(standardize))

    def _make(self) -> None:
        """What reads texts and what runs the model, by the settings."""
        settings = self.settings
        limit = longest(self.model, self.tokenizer, settings.max_length)
        self.read = Reader(tokenizer=self.tokenizer, prompt=settings.prompt, max_length=limit)
        padding = getattr(self.tokenizer, "pad_token_id", None) or 0
        layers: tuple[Layer, ...] = ()
        if self._listens:
            with self.routed():
                layers = chosen_layers(self.model, settings.layers)
                if settings.layers is None:
                    layers = reading_layers(self.model, layers, padding)
        self.extract = Extractor(
            model=self.model,
            pooling=settings.pooling,
            hidden=settings.embedding != "router",
            router=self._listens,
            probabilities=settings.router_features == "probabilities",
            layers=layers,
            padding=padding,
        )

    @property
    def _listens(self) -> bool:
        return self.settings.embedding != "hidden"

    def _routers(self) -> Any:
        """What to patch with: the router, or the routers that the model has been patched with, or its own choice."""
        if self.router is not None:
            return self.router
        state = patch_of(self.model)
        return (
            OwnChoice()
            if state is None
            else {layer.name: router for layer, router in zip(state.layers, state.routers, strict=True)}
        )

    @contextlib.contextmanager
    def routed(self) -> Iterator[None]:
        """The model under this encoder's router, and as it was afterwards."""
        if self._ours or (self.router is None and (not self._listens or patch_of(self.model) is not None)):
            yield
        else:
            with patched(self.model, self._routers()):
                yield

    @property
    def text_alone(self) -> bool:
        """Whether every router promises that a vector depends on its text alone."""
        with self.routed():
            state = patch_of(self.model)
        promises = [promises_of(router) for router in (() if state is None else state.routers)]
        return all(promise.batch_independent and promise.padding_independent for promise in promises)

    @property
    def dimension(self) -> int:
        """D: length of a vector."""
        return self.encode(["a"], progress=False).shape[1]

    @property
    def max_length(self) -> int | None:
        """Tokens of prompt and text that are read, at most."""
        return self.read.max_length

    def encode(
        self,
        texts: str | Sequence[str],
        batch_size: int = 32,
        progress: bool = True,
        *,
        instruction: str | None = None,
        processes: int = 1,
    ) -> np.ndarray:
        """One vector a text: (n, D) in float32, in the order of the texts; (D,) for a single string.

        batch_size   texts in a batch; they are sorted by length before, so that little is padding
        progress     a bar on stderr, where that is a terminal
        instruction  put before each text in the wrapper that MoEE uses; None: no wrapper
        processes    into how many processes to divide; each holds the model once. From a script, call it under
                     `if __name__ == "__main__":`, as Python asks of whoever starts processes

        Of a text that is longer than the model can read, the end is cut off, and the prompt stays whole. An empty text
        without a prompt is read as the token that begins a text, or ends one.

        Raises TypeError for what is no text, ValueError for batch_size or processes below 1.
        """
        single = isinstance(texts, str)
        listed = [texts] if single else list(texts)
        found = self.combine(self.features(listed, batch_size, progress, instruction=instruction, processes=processes))
        return found[0] if single else found

    def features(
        self,
        texts: Sequence[str],
        batch_size: int = 32,
        progress: bool = True,
        *,
        instruction: str | None = None,
        processes: int = 1,
    ) -> Features:
        """What `encode` makes vectors of: hidden states (n, D) and router features (n, R), as far as they are needed,
        neither standardised nor combined."""
        for name, value in (("batch_size", batch_size), ("processes", processes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is impossible. Give a whole number, 1 or more.")
        ids, cut = self.read.ids_and_cut(texts, instruction)
        if not ids:
            empty = self.features(["a"], progress=False)
            return Features(**{name: None if part is None else part[:0] for name, part in vars(empty).items()})
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]), reverse=True)
        batches = [[ids[index] for index in order[at : at + batch_size]] for at in range(0, len(ids), batch_size)]
        found = []
        with (
            tqdm(total=len(ids), desc="encoding", unit="text", disable=None if progress else True, leave=False) as bar,
            self._runs(min(processes, len(batches))) as run,
        ):
            for batch, said in zip(batches, run(batches), strict=True):
                found.append(said)
                bar.update(len(batch))
        back = np.argsort(order)
        parts = {name: [getattr(one, name) for one in found] for name in ("hidden", "router")}
        return Features(**{n: None if p[0] is None else np.concatenate(p)[back] for n, p in parts.items()}, cut=cut)

    @contextlib.contextmanager
    def working(self, processes: int = 1) -> Iterator[None]:
        """Within it, `encode` and `features` divide their work among these processes, which are started once, whatever
        they are called with."""
        before = self._run
        with self._runs(processes) as run:
            self._run = run
            try:
                yield
            finally:
                self._run = before

    @contextlib.contextmanager
    def _runs(self, processes: int) -> Iterator[Any]:
        """A function from batches of ids to their features, one after the other."""
        if self._run is not None:
            yield self._run
        elif processes > 1:
            with Workers(self.extract, self._routers() if self._is_routed() else None, processes) as workers:
                yield workers
        else:
            with self.routed():
                yield lambda batches: map(self.extract, batches)

    def _is_routed(self) -> bool:
        with self.routed():
            return patch_of(self.model) is not None

    def combine(self, features: Features) -> np.ndarray:
        """(n, D): the vectors of features, standardised where the encoder has statistics.

        moee concat: hidden state and router features, one beside the other. moee sum: both of length 1, the second
        times the root of w, so that the dot product of two vectors is cos(hidden) + w cos(router).
        """
        whole = features.whole if self.statistics is None else self.statistics(features.whole)
        if not self.settings.is_sum:
            return whole
        assert features.hidden is not None
        hidden, router = np.split(whole, [features.hidden.shape[1]], axis=1)
        weight = np.float32(np.sqrt(self.settings.w))
        return np.concatenate([similarity.unit(hidden), weight * similarity.unit(router)], axis=1)

    def similarity(self, one: Any, other: Any) -> np.ndarray:
        """(n, m): the similarity of each vector of `one` (n, D) with each of `other` (m, D): the cosine, or, for a sum,
        cos(hidden) + w cos(router)."""
        return similarity.of_all(one, other, self.similarity_name)

    def similarity_pairwise(self, one: Any, other: Any) -> np.ndarray:
        """(n,): the similarity of each vector of `one` (n, D) with the one of `other` in the same place."""
        return similarity.of_pairs(one, other, self.similarity_name)

    @property
    def similarity_name(self) -> Literal["cosine", "dot"]:
        """By what two vectors are compared."""
        return "dot" if self.settings.is_sum else "cosine"

    def _statistics(self, name: str, texts: Sequence[str]) -> Statistics:
        return Statistics.of(self.features(texts, progress=False).whole, name)

    def variant(self, **changes: Any) -> Encoder:
        """Another encoder of the same model and router, with other settings (embedding, prompt, pooling, moee, w,
        router_features, layers, max_length) or `standardize`; the model is shared.

        Statistics are kept where the features stay the same, and dropped otherwise.
        """
        sample = changes.pop("standardize", None)
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._run = None
        other.settings = replace(self.settings, **changes)
        if self._ours and other._listens and patch_of(self.model) is None:
            patch(self.model, self._routers())
        other._make()
        if set(changes) - {"w", "moee"} or (changes and other.settings.embedding != "moee"):
            other.statistics = None
        if sample is not None:
            other.statistics = sample if isinstance(sample, Statistics) else other._statistics(*sample_of(sample))
        return other

    def about(self) -> dict[str, Any]:
        """All that a vector of this encoder depends on beside the model's weights, as JSON; `router` is one text where
        all layers have the same, or else a list, and null for a model that is not patched."""
        with self.routed():
            state = patch_of(self.model)
        routers = [] if state is None else [text_of(router) for router in state.routers]
        same = len(set(routers)) <= 1
        about = asdict(self.settings) | {"router": next(iter(routers), None) if same else routers}
        return about | {"standardize": None if self.statistics is None else self.statistics.name}

    def save(self, folder: str | Path) -> None:
        """Write model, tokenizer, router, settings and statistics into a folder, for `Encoder.load`."""
        from usmoe.embed.saved import save

        save(self, Path(folder))

    @staticmethod
    def load(folder: str | Path, **options: Any) -> Encoder:
        """The encoder that `save` wrote; options: device, dtype. The same vectors, to float rounding."""
        from usmoe.embed.saved import load

        return load(Path(folder), **options)

    def as_sentence_transformer(self) -> SentenceTransformer:
        """A sentence_transformers.SentenceTransformer with the same vectors: encode, similarity, save and load."""
        from usmoe.embed.sentence_transformer import hosted

        return hosted(self)

    def as_mteb(self, *, instructions: bool = False) -> MTEBModel:
        """A model for mteb.evaluate(), with router, embedding, prompt and the other settings as experiment arguments.

        instructions  put each task's own instruction before its texts, as MoEE and the released code of USMoE do
        """
        from usmoe.embed.mteb_model import MTEBModel

        return MTEBModel(self, instructions=instructions)


def _in_words(router: Any) -> str:
    """A router as text, without the address in memory that Python writes for somebody's own function."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(router))


def text_of(router: Any) -> str:
    """A router as text, the same in every process. Code of the user's own counts by its name."""
    if isinstance(router, FunctionType):
        return f"{router.__module__}:{router.__qualname__}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(router))


def _is_place(given: Any) -> bool:
    return given is None or isinstance(given, str | Path)


def _tokenizer_of(model: Any, tokenizer: Any, source: str | None, offline: bool) -> Any:
    """The tokenizer of a model object: the one that is given, or the one that lies where the model comes from."""
    if tokenizer is not None and not _is_place(tokenizer):
        return tokenizer
    if tokenizer is None and source is None:
        raise ValueError(
            f"A {type(model).__name__} was given without its tokenizer, and it does not say where it comes from. Give "
            "usmoe.Encoder(model, tokenizer=...)."
        )
    return load_tokenizer(tokenizer if tokenizer is not None else source, offline=offline)


assert set(POOLINGS) == set(get_args(Pooling))
