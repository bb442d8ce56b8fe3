"""How likely a language model finds the continuation of a context, and whether it would have said it by itself.

Honest: each token of the continuation is predicted by the model run on the tokens before it alone, every one of them
routed anew. Teacher-forced: by one forward over context and continuation, where a router that looks ahead lets the
tokens to come move the experts of those before. Where no router looks ahead the two are one, and one forward gives it.

Under either, no figure depends on the other requests: padding stands on the right under a mask, and where a router's
promises are too weak for that, each sequence is run by itself.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from usmoe.hf.patch import patch_of
from usmoe.hf.wrapped import unwrapped
from usmoe.types import promises_of

Scoring = Literal["honest", "teacher-forced"]

Request = tuple[Sequence[int], Sequence[int]]
"""The tokens of a context, and of its continuation; one at least of each."""


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """What a model says of one continuation."""

    nats: float
    """Its log-likelihood, summed over its tokens: 0 or less."""
    greedy: bool
    """Whether each of its tokens is the likeliest one, the lower of two that are level."""


@dataclass(kw_only=True)
class Forward:
    """One sequence to run, and which of its predictions to read."""

    tokens: list[int]
    """Of a whole request."""
    length: int
    """How many of them are run."""
    reads: list[tuple[int, list[int]]] = field(default_factory=list)
    """Of a request, by its place, the tokens that follow the last that were run."""

    @property
    def depth(self) -> int:
        """How many predictions are read, from the end."""
        return max(len(targets) for _, targets in self.reads)


def looks_ahead(model: PreTrainedModel) -> bool:
    """Whether a router of the model lets a token move the experts of an earlier one; False for one without a patch."""
    return not all(promises_of(router).causal for router in _routers(model))


def forwards(model: PreTrainedModel, requests: Sequence[Request], scoring: Scoring) -> list[Forward]:
    """What to run for the requests, the longest first. What several of them have in common is run once.

    Raises ValueError for a request without a context or without a continuation.
    """
    each_prefix = scoring == "honest" and looks_ahead(model)
    prefixes: dict[tuple[int, int], int] = {}  # (a prefix, the token after it) -> that longer prefix
    found: dict[int, Forward] = {}
    for place, (context, continuation) in enumerate(requests):
        if not len(context) or not len(continuation):
            empty = "continuation" if len(context) else "context"
            raise ValueError(f"Request {place} has a {empty} without tokens. Give one token at least of each.")
        tokens = [*context, *continuation]
        prefix = 0
        for length, token in enumerate(tokens[:-1], start=1):
            prefix = prefixes.setdefault((prefix, token), len(prefixes) + 1)
            if each_prefix and length >= len(context):
                one = found.setdefault(prefix, Forward(tokens=tokens, length=length))
                one.reads.append((place, [tokens[length]]))
        if not each_prefix:
            one = found.setdefault(prefix, Forward(tokens=tokens, length=len(tokens) - 1))
            one.reads.append((place, list(continuation)))
    return sorted(found.values(), key=lambda one: -one.length)


@torch.no_grad()
def likelihoods(
    model: PreTrainedModel,
    todo: Sequence[Forward],
    *,
    batch_size: int = 8,
    tick: Callable[[int], object] = lambda done: None,
) -> list[Likelihood]:
    """The Likelihood of each request, in the order of the requests; `todo` is what `forwards` gave for them.

    tick is called after each forward of the model with the number of sequences that it ran. Raises ValueError where
    the model says something that is no number.
    """
    together = all(
        promises.batch_independent and promises.padding_independent for promises in map(promises_of, _routers(model))
    )
    step = batch_size if together else 1
    count = 1 + max((place for one in todo for place, _ in one.reads), default=-1)
    nats, greedy = [0.0] * count, [True] * count
    for start in range(0, len(todo), step):
        batch = todo[start : start + step]
        logits = _last_logits(model, batch)
        for row, one in enumerate(batch):
            end = logits.shape[1] - (batch[0].length - one.length)
            for place, targets in one.reads:
                said = logits[row, end - len(targets) : end].float().log_softmax(-1)
                target = torch.tensor(targets, device=said.device)
                nats[place] += said.gather(1, target.unsqueeze(1)).double().sum().item()
                greedy[place] &= bool((said.argmax(-1) == target).all())
        tick(len(batch))
    if any(map(math.isnan, nats)):
        raise ValueError(
            f"The model's likelihood of {sum(map(math.isnan, nats))} of {count} continuations is no number: its logits "
            "hold NaN. Load it in float32."
        )
    return [Likelihood(nats=one, greedy=two) for one, two in zip(nats, greedy, strict=True)]


def _last_logits(model: PreTrainedModel, batch: Sequence[Forward]) -> Float[Tensor, "B R V"]:
    """The logits of the last R positions of a batch, padded on the right to its first and longest sequence; R reaches
    back to all that are to be read."""
    rows = [torch.tensor(one.tokens[: one.length]) for one in batch]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    last = max(tokens.shape[1] - one.length + one.depth for one in batch)
    options: dict[str, Any] = {} if mask.all() else {"attention_mask": mask.to(model.device)}
    if "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters:
        options["logits_to_keep"] = last
    return model(input_ids=tokens.to(model.device), use_cache=False, **options).logits[:, -last:]


def _routers(model: PreTrainedModel) -> list[Any]:
    state = patch_of(model)
    return [] if state is None else state.routers
