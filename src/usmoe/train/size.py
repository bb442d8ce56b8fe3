"""A model that suits the time: its size from the speed that is measured here."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from usmoe.models.config import LanguageConfig
from usmoe.models.language import LanguageModel
from usmoe.train.config import Evaluation, TrainConfig
from usmoe.train.objective import Learner
from usmoe.train.optimizers import optimisers_of

TOKENS_A_PARAMETER = 20
"""Training tokens for each active parameter, the compute-optimal ratio of Hoffmann et al. 2022 (arXiv 2203.15556)."""

SHARE = 0.85
"""Of the time for steps; the rest is for evaluations, checkpoints, and a machine that is slower later."""

EPOCHS = 4
"""Readings of the data, at most: more bring little (Muennighoff et al. 2023, arXiv 2305.16264)."""

_SIZES = [(2, 48, 1, 64), (3, 96, 2, 128), (4, 128, 4, 256), (4, 192, 6, 384), (4, 256, 8, 512), (6, 384, 8, 768)]
_SIZES += [(8, 512, 8, 1024), (12, 768, 12, 1536)]


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A configuration for the time, and how it came about."""

    config: TrainConfig
    parameters: int
    """Without the words."""
    active: int
    """Those that a token meets."""
    tokens_per_second: float
    """As measured."""


def suggest(
    config: TrainConfig, minutes: float, tokens: int, vocabulary: int, device: str, say: Callable[[str], object]
) -> Suggestion:
    """The largest model of a ladder that sees 20 tokens for each of its active parameters in the time, each size timed
    over a few steps, and as many steps as the time has room for; the smallest where none does.

    config      what is kept: corpus, kind of model, router, gate, losses; layers and widths, batch, segment, memory,
                steps, learning rate and warm-up are chosen
    tokens      of the training split: it is read four times at most
    vocabulary  tokens

    Raises ValueError for a time that is none.
    """
    if not minutes > 0:
        raise ValueError(f"--minutes {minutes:g} is no time. Give a number above 0.")
    best: Suggestion | None = None
    for layers, d_model, heads, d_ff in _SIZES:
        model = config.model.replace(
            layers=layers, d_model=d_model, heads=heads, head_size=None, d_ff=d_ff, vocabulary=vocabulary
        )
        found = _of_size(config, model, minutes, tokens, device)
        size, active = found.parameters / 1e6, found.active / 1e6
        say(
            f"{layers} layers of {d_model}: {size:.1f} M parameters, {active:.2f} M of them active, "
            f"{found.tokens_per_second:,.0f} tokens a second"
        )
        seen = found.config.steps * found.config.batch * found.config.segment
        if best is not None and seen < TOKENS_A_PARAMETER * found.active:
            break
        best = found
    assert best is not None
    return best


def _of_size(config: TrainConfig, model: LanguageConfig, minutes: float, tokens: int, device: str) -> Suggestion:
    segment = min(128, max(8, tokens // 16))
    batch = max(1, min(8, (tokens - 1) // segment))
    sized = dataclasses.replace(
        config,
        model=model,
        batch=batch,
        segment=segment,
        memory=segment if config.order == "streams" and config.memory else 0,
        lr=2e-3 * (96 / model.d_model) ** 0.5,
        accumulate=1,
        steps=max(config.warmup + config.decay, 1),
        evaluation=Evaluation(segment=segment, memory=segment if config.memory else 0, tokens=100_000),
    )
    speed, parameters, active = _measured(sized, device)
    possible = int(minutes * 60 * SHARE * speed / (batch * segment))
    steps = max(20, min(possible, EPOCHS * tokens // (batch * segment)))
    every = max(1, steps // 5)
    sized = dataclasses.replace(
        sized,
        steps=steps,
        warmup=min(100, steps // 10),
        evaluate_every=every,
        checkpoint_every=every,
        log_every=max(1, min(20, steps // 50)),
    )
    return Suggestion(config=sized, parameters=parameters, active=active, tokens_per_second=speed)


def _measured(config: TrainConfig, device: str, steps: int = 4) -> tuple[float, int, int]:
    """Tokens a second of the best of a few steps, parameters, active parameters."""
    assert config.model.vocabulary is not None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        learner = Learner(LanguageModel(config.model).train(), config).to(device)
        optimisers = optimisers_of(learner, config)
        tokens = torch.randint(config.model.vocabulary, (config.batch, config.segment), device=device)
        memory, times = None, []
        for _ in range(steps):
            started = time.perf_counter()
            said = learner(tokens, tokens, memory)
            said.total.backward()
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=False)
            said.nats.item()
            memory = said.out.memory
            times.append(time.perf_counter() - started)
    counts = {name: one.numel() for name, one in learner.model.layers.named_parameters()}
    experts = sum(number for name, number in counts.items() if name.endswith(("feed_forward.up", "feed_forward.down")))
    routed = said.out.said[0].routing.experts_per_token.double().mean().item() if said.out.said else 0.0
    share, total = routed / max(config.model.num_experts, 1), sum(counts.values())
    return tokens.numel() / min(times[1:]), total, int(total - experts * (1 - share))
