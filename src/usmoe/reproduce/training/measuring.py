"""Measuring a trained model: teacher-forced, honest, served by causal routers, with memory and without."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from usmoe.data.array import Tokens
from usmoe.data.corpus import Corpus
from usmoe.data.prepare import prepare
from usmoe.layers.causal import to_causal
from usmoe.models.flops import flops
from usmoe.report.estimate import in_blocks
from usmoe.reproduce.training.measure import Measured, Served
from usmoe.reproduce.training.plan import Measurement
from usmoe.reproduce.training.runs import Run
from usmoe.reproduce.training.study import Text
from usmoe.routing import ExpertChoice, TokenChoice, USMoE
from usmoe.routing.text import parse_router
from usmoe.train.config import TrainConfig
from usmoe.train.folder import RunFolder, Trained, load_run
from usmoe.train.likelihood import Forced, honest, teacher_forced
from usmoe.train.reading import rerouted
from usmoe.types import is_causal, promises_of


def measure(
    one: Run,
    text: Text,
    folder: Path,
    cache: Path,
    measurement: Measurement,
    *,
    data: Path | None,
    offline: bool,
    device: str,
) -> Measured:
    """The figures of the best model of a run on the test split, clean or corrupted."""
    began = time.monotonic()
    trained = load_run(folder, "best", device=device, router=final_router(one.config))
    prepared = prepare(
        corrupted(one.config.corpus, measurement) if text == "corrupt" else one.config.corpus,
        cache,
        data=data,
        offline=offline,
        vocabulary=trained.vocabulary,
        splits=("test",),
    )
    model, tokens, setting = trained.model, prepared.test, measurement.evaluation
    forced = teacher_forced(model, tokens, setting)
    alone = honest(model, tokens, setting, forced, measurement.positions, measurement.seed)
    mixing = not all(promises_of(layer.router).batch_independent for layer in model.moe_layers)
    sums, counts = in_blocks(forced.nats, measurement.block)
    cost = (flops(trained.config.model, k, setting.segment, setting.memory) for k in (forced.experts or 0.0, 2.0))
    lines = RunFolder(folder).rows()
    return Measured(
        corpus=one.corpus,
        row=one.row,
        seed=one.config.seed,
        text=text,
        unit=prepared.unit,
        tokens_per_unit=len(prepared.test) / prepared.units["test"],
        tokens=forced.tokens,
        corrupted=prepared.corrupted["test"],
        teacher_forced=forced.mean,
        honest=alone.nats,
        honest_half=alone.interval,
        reset=teacher_forced(model, tokens, dataclasses.replace(setting, memory=0)).mean,
        alone=teacher_forced(model, tokens, setting, alone=True).mean if mixing else None,
        served=served(trained, tokens, measurement),
        experts=forced.experts or 0.0,
        dropped=forced.dropped or 0.0,
        load_cv=forced.load_cv or 0.0,
        **dict(zip(("flops", "flops_at_2"), (found.without_words for found in cost), strict=True)),
        sums=tuple(round(value, 4) for value in sums),
        counts=tuple(counts),
        steps=one.config.steps,
        best_step=trained.step,
        training_seconds=max((line["elapsed"] for line in lines if "elapsed" in line), default=0.0),
        seconds=time.monotonic() - began,
    )


def corrupted(corpus: Corpus, measurement: Measurement) -> Corpus:
    """The same text, with words of its test split replaced."""
    return dataclasses.replace(
        corpus,
        corrupt_mode=measurement.corrupt_mode,
        corrupt_rate=measurement.corrupt_rate,
        corrupt_splits=("test",),
        corrupt_seed=measurement.seed,
    )


def final_router(config: TrainConfig) -> Any:
    """The router at the end of training, where it is not the configuration's: SMoE-Dropout's k has grown."""
    if config.grow_k is None:
        return None
    router: Any = parse_router(config.model.router)
    return dataclasses.replace(router, k=config.grow_k[1])


def served(trained: Trained, tokens: Tokens, measurement: Measurement) -> dict[str, Served]:
    """The model under the causal routers that stand for its own.

    threshold   what training tracked of the cut, one value a layer (expert choice: one an expert)
    prefix      USMoE alone: each token competes with those before it, within its segment
    top 2       SMoE-Dropout alone: two experts a token instead of all
    """
    model, setting = trained.model, measurement.evaluation
    router = model.moe_layers[0].router
    found = {}
    if has_threshold(router):
        with rerouted(model, None):
            to_causal(model)
            found["threshold"] = _served(teacher_forced(model, tokens, setting))
    if isinstance(router, USMoE) and router.pool not in ("prefix", "threshold"):
        prefix = dataclasses.replace(router, pool="prefix")
        found["prefix"] = _served(teacher_forced(model, tokens, setting, router=prefix))
    if trained.config.grow_k is not None and isinstance(router, TokenChoice):
        two = dataclasses.replace(router, k=2)
        found["top 2"] = _served(teacher_forced(model, tokens, setting, router=two))
    return found


def has_threshold(router: Any) -> bool:
    """Whether a router looks ahead or across the batch, and its score can be had of a pair alone."""
    if is_causal(router) or not isinstance(router, USMoE | ExpertChoice):
        return False
    score = router.expert_score if isinstance(router, USMoE) else router.score
    return score != "softmax_tokens"


def _served(forced: Forced) -> Served:
    return Served(nats=forced.mean, experts=forced.experts or 0.0)
