"""A loaded model as lm-eval wants one: its likelihoods honest unless asked otherwise, whatever its routers."""

# lm-eval registers HFLM by a decorator that hides its type:
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import contextlib
import copy
import logging
import sys
from collections.abc import Iterator
from typing import Any, get_args

from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from usmoe.hf.continuation import Scoring, forwards, likelihoods, looks_ahead


class LanguageModel(HFLM):
    """A loaded model, patched or not, as lm-eval wants one; also for lm_eval.simple_evaluate(model=...).

    Its routers are those that it has when it is asked, so one LanguageModel serves many patches. The model is put into
    evaluation mode; the tokenizer is copied, since lm-eval gives it a padding token where it has none.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, scoring: Scoring = "honest", batch_size: int = 8, progress: bool = True
    ) -> None:
        """scoring     honest: every token predicted from those before it alone, each routed anew; where a router looks
                       ahead that is a forward a token. teacher-forced: one forward for context and continuation
        batch_size  sequences in a forward, at most; no score depends on it
        progress    a bar on stderr, where that is a terminal

        Raises ValueError for what is out of range, and for a model that does not read from left to right."""
        if scoring not in get_args(Scoring):
            raise ValueError(f"scoring={scoring!r} is unknown. Choose one of: {', '.join(get_args(Scoring))}.")
        if batch_size < 1:
            raise ValueError(f"A batch of {batch_size} sequences is impossible. Choose batch_size >= 1.")
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(
                f"{type(model).__name__} has an encoder, which reads the whole of a text at once. Choose a causal "
                "language model."
            )
        # that a loaded model cannot be spread over processes, which is not asked for
        notes = ("`pretrained` model kwarg is not of type", "Passed an already-initialized model")
        with without_notes("lm_eval.models.huggingface", *notes):
            super().__init__(
                pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=batch_size
            )
        self.scoring: Scoring = scoring
        self.progress = progress
        self.truncated = 0
        """Requests, so far, whose context was cut from the left to what the model can read."""

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-likelihood of each request's continuation in nats, and whether it is the greedy one."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text in nats, in windows of what the model can read; the first token of the text
        is predicted from the prefix token, that of a later window from the token before it."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for place, request in enumerate(requests):
            pairs = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            owners += [place] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for place, (nats, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[place] += nats
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """The text that the model writes for each request, step by step, by its own generate().

        Raises ValueError under honest scoring where a router looks ahead: what it writes is not what it was asked to
        be scored on."""
        if self.scoring == "honest" and looks_ahead(self.model):
            raise ValueError(cannot_generate("A task that generates text"))
        return super().generate_until(requests, disable_tqdm=not self.progress or not sys.stderr.isatty())

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        """Of (what to remember it by, the tokens of a context, the tokens of a continuation)."""
        fitting = [self._fitting(context, continuation) for _, context, continuation in requests]
        todo = forwards(self.model, fitting, self.scoring)
        hidden = None if self.progress and not disable_tqdm else True
        with tqdm(total=len(todo), file=sys.stderr, disable=hidden, unit="sequence", leave=False) as bar:
            found = likelihoods(self.model, todo, batch_size=int(self.batch_size), tick=bar.update)
        said = [(one.nats, one.greedy) for one in found]
        for (text, _, _), one in zip(requests, said, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, one)
        return said

    def _fitting(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """The request, its context cut from the left so that the model can read all but the last of its tokens."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise ValueError(
                f"A continuation of {len(continuation)} tokens does not fit into the {self.max_length} that the model "
                "can read. Leave the task out."
            )
        context = context or [self.prefix_token_id]
        self.truncated += len(context) > room
        return context[-room:], continuation


def cannot_generate(what: str) -> str:
    return (
        f"{what} cannot be scored honestly under a router that looks ahead, or that does not promise to be causal: "
        "step by step it routes otherwise than over a whole text. Use thresholds or pool=prefix, state the "
        "promises of a router of your own (fn.promises), or ask for teacher-forced scoring."
    )


@contextlib.contextmanager
def without_notes(logger: str, *notes: str) -> Iterator[None]:
    """Leave out what lm-eval logs with one of these phrases, and nothing else."""

    def other(record: logging.LogRecord) -> bool:
        return not any(note in record.msg for note in notes)

    logging.getLogger(logger).addFilter(other)
    try:
        yield
    finally:
        logging.getLogger(logger).removeFilter(other)
