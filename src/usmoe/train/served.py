"""Serving what was trained with a look-ahead pool: the same model under causal routers, for as long as it is asked."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from usmoe.data.batches import Tokens
from usmoe.layers.causal import become_causal
from usmoe.layers.spending import ranking_scores, spending_threshold
from usmoe.layers.threshold_form import threshold_form
from usmoe.models.language import LanguageModel
from usmoe.routing import ExpertChoice, USMoE
from usmoe.routing.gates import GateOutput
from usmoe.routing.host import ROUTE
from usmoe.routing.router import experts_per_token
from usmoe.train.config import Evaluation
from usmoe.train.reading import evaluating, part, read, rerouted

How = Literal["threshold", "prefix"]
"""threshold: each pair whose score reaches a value; prefix: each token with those before it."""


@contextlib.contextmanager
def served(
    model: LanguageModel,
    how: How,
    *,
    k: float | None = None,
    calibration: Tokens | None = None,
    setting: Evaluation | None = None,
) -> Iterator[list[Any]]:
    """The model under causal routers, which are given; then it has its own again, bit for bit, whatever happened.

        with served(model, "threshold", k=1.5, calibration=prepared.validation, setting=setting):
            teacher_forced(model, prepared.test, setting)

    threshold    of the cuts that training tracked (`usmoe.to_causal`); where calibration tokens are given, of those
                 (`calibrated`), as setting reads them
    prefix       USMoE alone: the same score with pool="prefix"
                 an estimate: the experts that are spent stand in the figures (`Measured.off_budget`)
    k            experts a token in place of the routers' own; thresholds of another k are to be calibrated

    Raises ValueError for a model without experts, a router that cannot be served so, and a threshold of another k
    without calibration tokens.
    """
    if not model.moe_layers:
        raise ValueError("The model has no experts, so that there is nothing to serve by another router. Leave it out.")
    if how not in ("threshold", "prefix"):
        raise ValueError(f"There is no way to serve called {how!r}. Known: threshold, prefix.")
    if how == "prefix":
        routers = [_prefix(layer.router, k) for layer in model.moe_layers]
    elif calibration is not None:
        if setting is None:
            raise ValueError("Calibration tokens are read as a setting says. Give setting=Evaluation(...).")
        routers = calibrated(model, calibration, setting, k=k)
    else:
        if k is not None and any(getattr(layer.router, "k", None) != k for layer in model.moe_layers):
            raise ValueError(
                f"The cuts that training tracked are those of {model.moe_layers[0].router}, not of k={k:g}. Give "
                "calibration tokens, or leave k out."
            )
        routers = None
    with rerouted(model, routers):
        if routers is None:
            become_causal(model)
        yield [layer.router for layer in model.moe_layers]


@torch.no_grad()
def calibrated(model: LanguageModel, tokens: Tokens, setting: Evaluation, *, k: float | None = None) -> list[Any]:
    """One threshold router a layer, such that exactly floor(k*T + 0.5) pairs of the T tokens of this text are chosen in
    each (expert choice: what each expert takes of so many), when it is read as setting says.

    tokens  of another text than the one that figures are taken on
    k       experts a token; None: the router's own

    Layer by layer, from the first: a threshold moves the scores of the layers above, so these are taken under it. That
    is a reading of the text a layer. usmoe.calibrate does the same for pretrained models, in two readings.

    Raises ValueError for routers other than USMoE and ExpertChoice, for a score that needs a pool of tokens, and for a
    text of fewer than two tokens.
    """
    tokens = part(tokens, setting)
    wanted = [_of_budget(layer.router, k) for layer in model.moe_layers]
    found: list[Any] = [threshold_form(one, _nothing(one, model)) for one in wanted]  # refuses what has no such form
    own = [layer.router for layer in model.moe_layers]
    for place, one in enumerate(wanted):
        with evaluating(model, [*found[:place], *own[place:]]):
            scores = _scores(model, place, one, tokens, setting)
        number = experts_per_token(one.k, ROUTE, scores.shape[1])
        found[place] = threshold_form(one, spending_threshold(one, scores, number, scores.shape[1]))
    return found


def _scores(
    model: LanguageModel, place: int, router: USMoE | ExpertChoice, tokens: Tokens, setting: Evaluation
) -> Float[Tensor, "S E"]:
    """By what `router` would rank all pairs of one layer."""
    said: list[Any] = []

    def listen(gate: nn.Module, given: Any, answer: Any) -> None:
        said.append(answer if isinstance(answer, GateOutput) else GateOutput(logits=answer))

    kept = []
    handle = model.moe_layers[place].gate.register_forward_hook(listen)
    try:
        for segment in read(model, tokens, setting):
            answer = said.pop()
            kept.append(ranking_scores(router, answer.logits, segment.batch.valid, answer.host or ROUTE).cpu())
    finally:
        handle.remove()
    return torch.cat(kept)


def _of_budget(router: Any, k: float | None) -> USMoE | ExpertChoice:
    """The look-ahead router of the same score at that k."""
    if not isinstance(router, USMoE | ExpertChoice):
        raise ValueError(
            f"Thresholds are found for USMoE and ExpertChoice, not for {router}. Serve it as it is where it is causal, "
            "or give it a causal router of your own."
        )
    idle = {"burst": None, "min_experts": 0} if isinstance(router, USMoE) else {}
    return dataclasses.replace(router, k=_known(router, k), pool="sequence", threshold=None, **idle)


def _known(router: USMoE | ExpertChoice, k: float | None) -> float | str:
    """k, else the router's own. Raises ValueError where it has none."""
    known = router.k if k is None else k
    if known is None:
        raise ValueError(f"{router} says no number of experts a token. Give one: k=2.")
    return known


def _nothing(router: USMoE | ExpertChoice, model: LanguageModel) -> float | tuple[float, ...]:
    """Thresholds of no meaning."""
    return 0.0 if isinstance(router, USMoE) else (0.0,) * model.config.num_experts


def _prefix(router: Any, k: float | None) -> USMoE:
    """The router with its tokens competing with those before them."""
    if not isinstance(router, USMoE):
        raise ValueError(
            f"pool=prefix is a pool of USMoE, and {router} is none. Serve it by threshold, or as it is where it is "
            "causal."
        )
    return dataclasses.replace(router, k=_known(router, k), pool="prefix", threshold=None)
