"""All figures of a trained model: teacher-forced, honest, served by causal routers, with memory and without."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from usmoe.data.array import Tokens
from usmoe.data.units import UNITS
from usmoe.data.vocabulary import Vocabulary
from usmoe.hf.identity import text_of
from usmoe.layers.budget import mean_asked
from usmoe.models.flops import flops_of_reading
from usmoe.models.language import LanguageModel
from usmoe.report.estimate import in_blocks
from usmoe.train.config import Evaluation
from usmoe.train.figures import Figures, Measured, Reading, Serving
from usmoe.train.folder import Trained
from usmoe.train.likelihood import Forced, honest, teacher_forced
from usmoe.train.reading import deciding, part, rerouted
from usmoe.train.served import How
from usmoe.train.served import served as serving
from usmoe.types import is_causal, promises_of

BLOCKS = 50
"""Into how many blocks of neighbouring tokens a text is divided for bands; fewer where one would be below a segment."""


def evaluate_model(
    trained: Trained,
    tokens: Tokens,
    setting: Evaluation,
    *,
    positions: int = 200,
    served: Sequence[Serving | How] = ("threshold", "prefix"),
    calibration: Tokens | None = None,
    under: Mapping[str, Any] | None = None,
    window: int = 0,
    seed: int = 0,
    progress: bool = False,
) -> Figures:
    """All figures of a trained model on a split.

    positions    sampled for the honest figure, where a router looks ahead or across the batch
    served       under which causal routers too; what a router cannot be served by has a reason in its place, and so has
                 a model that is causal as it is
    calibration  tokens of another split, for the servings that are calibrated
    under        other routers to read the text by, by the names of their figures; each may be one, or one a layer
    window       tokens over which a router that remembers goes on from segment to segment (`teacher_forced`)
    seed         of the positions

    The model is then as it was. Raises ValueError for a split of fewer than two tokens, a likelihood that is no finite
    number, a calibrated serving without calibration tokens, and, before anything is read, for a router that cannot work
    in this model.
    """
    model = trained.model
    asked = [one if isinstance(one, Serving) else Serving(how=one) for one in served]
    if calibration is None and any(one.calibrated for one in asked):
        raise ValueError("A calibrated threshold needs calibration tokens. Give those of the validation split.")
    text, routers = part(tokens, setting), deciding(model)
    others = {} if under is None else under
    for name, router in others.items():
        _refuse_impossible(model, name, router)

    def reading(under: Evaluation, alone: bool = False) -> Forced:
        return teacher_forced(model, tokens, under, window=window, alone=alone, progress=progress)

    def under_another(router: Any) -> Reading:
        with rerouted(model, router):
            found = reading(setting)
            exact = honest(model, tokens, setting, found, positions, seed, window=window, progress=progress)
            return Reading(forced=_measured(model, found, setting), honest=exact)

    forced = reading(setting)
    mixing = not all(promises_of(router).batch_independent for router in routers)
    without = dataclasses.replace(setting, memory=0)
    found, reasons = _served(model, asked, calibration, setting, reading)
    return Figures(
        routers=tuple(text_of(one) for number, one in enumerate(routers) if number == 0 or routers[number - 1] != one),
        step=trained.step,
        setting=setting,
        positions=positions,
        seed=seed,
        tokens=forced.tokens,
        unit=UNITS[trained.vocabulary.level],
        tokens_per_unit=tokens_per_unit(trained.vocabulary, text),
        forced=_measured(model, forced, setting),
        honest=honest(model, tokens, setting, forced, positions, seed, window=window, progress=progress),
        reset=_measured(model, reading(without), without) if setting.memory else None,
        alone=_measured(model, reading(setting, alone=True), setting) if mixing else None,
        served=found,
        unserved=reasons,
        under={name: under_another(router) for name, router in others.items()},
    )


def tokens_per_unit(vocabulary: Vocabulary, tokens: Tokens) -> float:
    """Tokens a byte of BPE; of other vocabularies a token is a unit."""
    if vocabulary.level != "bpe":
        return 1.0
    return len(tokens) / len(vocabulary.decode(tokens).encode())


def _refuse_impossible(model: LanguageModel, name: str, router: Any) -> None:
    """Raises ValueError, with the name under which it was asked for."""
    if not model.moe_layers:
        raise ValueError(f"The model has no experts, so that {name} has nothing to route. Leave it out.")
    try:
        with rerouted(model, router):
            pass
    except (ValueError, TypeError) as error:
        raise ValueError(f"The model cannot be read under {name}: {error}") from error


def _served(
    model: LanguageModel,
    asked: Sequence[Serving],
    calibration: Tokens | None,
    setting: Evaluation,
    reading: Callable[[Evaluation], Forced],
) -> tuple[dict[str, Measured], dict[str, str]]:
    """The figures under causal routers, and why there are none."""
    found: dict[str, Measured] = {}
    reasons: dict[str, str] = {}
    causal = all(map(is_causal, deciding(model)))
    for one in asked:
        if causal and one.k is None:
            reasons[one.name] = "The model is causal as it is." if model.moe_layers else "The model has no experts."
            continue
        with contextlib.ExitStack() as stack:
            text = calibration if one.calibrated else None
            try:
                stack.enter_context(serving(model, one.how, k=one.k, calibration=text, setting=setting))
            except ValueError as reason:
                reasons[one.name] = _told(reason, model)
                continue
            found[one.name] = _measured(model, reading(setting), setting)
    return found, reasons


def _told(reason: ValueError, model: LanguageModel) -> str:
    """Why, the same in every process: a router of one's own by its name, not by its address."""
    sentence = str(reason)
    for layer in model.moe_layers:
        sentence = sentence.replace(str(layer.router), text_of(layer.router))
    return sentence


def _measured(model: LanguageModel, forced: Forced, setting: Evaluation) -> Measured:
    size = max(setting.segment, math.ceil(forced.tokens / BLOCKS))
    sums, counts = in_blocks(forced.nats, size)
    config = model.config
    longest = math.ceil(forced.tokens / min(setting.batch, forced.tokens))  # tokens of a stream

    def cost(experts: float) -> float:
        return flops_of_reading(config, experts, longest, setting.segment, setting.memory).without_words

    return Measured(
        nats=forced.mean,
        experts=forced.experts,
        dropped=forced.dropped,
        load_cv=forced.load_cv,
        flops=cost(forced.experts or 0.0),
        relative=None if forced.experts is None else cost(forced.experts) / cost(2.0),
        seconds=forced.seconds,
        sums=tuple(sums),
        counts=tuple(counts),
        asked=mean_asked([layer.router for layer in model.moe_layers], config.num_experts),
    )
