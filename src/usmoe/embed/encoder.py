"""`Encoder`: one vector a text, from a language model as it is, under any router."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from transformers import PreTrainedModel

from usmoe.embed import similarity
from usmoe.embed.bar import bar
from usmoe.embed.features import Extractor, Features, chosen_layers, reading_layers
from usmoe.embed.own_tokenizer import OwnTokenizer
from usmoe.embed.place import Place
from usmoe.embed.settings import Combination, Embedding, EncoderSettings, RouterFeatures
from usmoe.embed.standardize import Statistics, sample_of
from usmoe.embed.texts import Reader, longest, padding_of
from usmoe.embed.workers import Workers
from usmoe.hf.identity import text_of
from usmoe.hf.layers import Layer
from usmoe.hf.load import load_as_saved, load_tokenizer, refuse_empty
from usmoe.hf.wrapped import unwrapped
from usmoe.layers.pooling import Pooling
from usmoe.types import promises_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from usmoe.embed.mteb_model import MTEBModel


class Encoder:
    """Sentence vectors from a language model, without training.

    enc = usmoe.Encoder()                                            # the shipped model's last hidden state
    enc = usmoe.Encoder("allenai/OLMoE-1B-7B-0924", router=usmoe.USMoE(alpha=0.5), embedding="moee", prompt="prompteol")
    vectors = enc.encode(["a text", "another"])                      # (2, D) numpy, float32

    model        a transformers model, a folder, a hub id, or None, or "shipped", for the model that ships with usmoe. A
                 model of one's own is left as it is: it is patched while it encodes, and only then.
    tokenizer    that of the model; None: from where the model comes
    router       as in usmoe.patch(); None: what the model does by itself, patched or not, or was saved with;
                 usmoe.OwnChoice() for the model's own choice all the same
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
        if model is None or isinstance(model, str | Path):
            if tokenizer is None:
                from usmoe.embed.saved import refuse_what_is_saved

                refuse_what_is_saved(model)
            self.source: str | None = "shipped" if model is None else str(model)
            self.model: Any = load_as_saved(model, router, device=device, dtype=dtype, offline=offline)
            given = model if tokenizer is None else tokenizer
            self.tokenizer = load_tokenizer(given, offline=offline) if _is_place(given) else given
        else:
            if (device, dtype) != ("cpu", "float32"):
                raise ValueError(
                    f"device={device!r} and dtype={dtype!r} are for a model that is loaded here. Move yours: "
                    "model.to(...)."
                )
            self.source = getattr(unwrapped(model).config, "_name_or_path", None) or None
            self.model = model
            self.tokenizer = _tokenizer_of(model, tokenizer, self.source, offline)
        refuse_empty(self.tokenizer, self.source or "The tokenizer that was given")
        self._place = Place(model=self.model, router=router)
        self._own = OwnTokenizer(self.tokenizer)
        self._make()
        self.statistics = self._statistics(standardize)

    def _make(self) -> None:
        """What reads texts and what runs the model, by the settings."""
        settings = self.settings
        limit = longest(self.model, self.tokenizer, settings.max_length)
        self.read = Reader(own=self._own, prompt=settings.prompt, max_length=limit)
        padding = padding_of(self.model, self.tokenizer)
        layers: tuple[Layer, ...] = ()
        with self.routed() as model:  # also says at once what cannot be
            if self._listens:
                layers = chosen_layers(model, settings.layers)
                if settings.layers is None:
                    layers = reading_layers(model, layers, padding)
        self.extract = Extractor(
            pooling=settings.pooling,
            hidden=settings.embedding != "router",
            router=self._listens,
            probabilities=settings.router_features == "probabilities",
            layers=tuple(layer.name for layer in layers),
            padding=padding,
        )

    @property
    def _listens(self) -> bool:
        return self.settings.embedding != "hidden"

    @contextlib.contextmanager
    def routed(self) -> Iterator[Any]:
        """The model under this encoder's router, in evaluation mode: other modules over the same weights, so that the
        model itself is as it was, also meanwhile. For the length of a with block, in one thread."""
        with self._place.routed(self._listens) as model:
            yield model

    @property
    def routers(self) -> dict[str, Any]:
        """{layer name: router} while the model runs; empty where it is not patched then."""
        return self._place.routers(self._listens)

    @property
    def text_alone(self) -> bool:
        """Whether every router promises that a vector depends on its text alone."""
        promises = [promises_of(router) for router in self.routers.values()]
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
        listed = [texts] if single else listed_texts(texts)
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
        batch_size, processes = _count("batch_size", batch_size), _count("processes", processes)
        texts = listed_texts(texts)
        ids, cut = self.read.ids_and_cut(texts, instruction)
        if not ids:
            empty = self.features(["a"], progress=False)
            return Features(**{name: None if part is None else part[:0] for name, part in vars(empty).items()})
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]), reverse=True)
        batches = [[ids[index] for index in order[at : at + batch_size]] for at in range(0, len(ids), batch_size)]
        found = []
        with (
            bar(len(ids), "encoding", "text", shown=progress) as shown,
            self._runs(min(processes, len(batches))) as run,
        ):
            for batch, said in zip(batches, run(batches), strict=True):
                found.append(said)
                shown.update(len(batch))
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
            with Workers(self.model, self.extract, self.routers or None, processes) as workers:
                yield workers
        else:
            with self.routed() as model:
                yield lambda batches: (self.extract(model, batch) for batch in batches)

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

    def _statistics(self, given: Any) -> Statistics | None:
        """The statistics that are given, or those of the sample that is."""
        if given is None or isinstance(given, Statistics):
            return given
        name, texts = sample_of(given)
        return Statistics.of(self.features(texts, progress=False).whole, name)

    def variant(self, **changes: Any) -> Encoder:
        """Another encoder of the same model and router, with other settings (embedding, prompt, pooling, moee, w,
        router_features, layers, max_length) or `standardize`; the model is shared.

        Statistics stay, where the features that they were taken of do. Raises ValueError where they do not and
        `standardize` is not given anew (None: features as they are), and for what is no setting.
        """
        known = [field.name for field in fields(EncoderSettings)]
        if unknown := set(changes) - {*known, "standardize"}:
            raise ValueError(f"{min(unknown)} cannot be changed. Choose from {', '.join(known)}, standardize.")
        asked = "standardize" in changes
        sample = changes.pop("standardize", None)
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._run = None
        other.settings = self.settings.changed(**changes)
        if self.statistics is not None and not asked and other.settings.of_features != self.settings.of_features:
            raise ValueError(
                f"The statistics of {self.statistics.name!r} are of other features than this variant has. Give "
                "standardize=texts, or standardize=None for features as they are."
            )
        other._make()
        if asked:
            other.statistics = other._statistics(sample)
        return other

    def about(self) -> dict[str, Any]:
        """All that a vector of this encoder depends on beside the model's weights, as JSON; `router` is one text where
        all layers have the same, or else a list, and null for a model that is not patched."""
        routers = [text_of(router) for router in self.routers.values()]
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


def listed_texts(texts: Iterable[str]) -> list[str]:
    """The texts as a list. Raises TypeError for what has no order, or is no collection."""
    if isinstance(texts, str | Mapping | set | frozenset) or not isinstance(texts, Iterable):
        raise TypeError(f"Texts cannot be a {type(texts).__name__}. Give a list of strings.")
    return list(texts)


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < 1:
        raise ValueError(f"{name}={value!r} is impossible. Give a whole number, 1 or more.")
    return operator.index(value)


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
