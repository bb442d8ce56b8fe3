"""`calibrate`: from a budget to a threshold, on text. A threshold looks at nothing but the pair itself, so that what
was trained or chosen with a look-ahead pool can be served causally."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from usmoe.hf.layers import Layer
from usmoe.hf.patch import listening, one_for_each, patch_of, patched, supported_layers
from usmoe.hf.wrapped import unwrapped
from usmoe.layers.mode import evaluating
from usmoe.layers.spending import ranking_scores as ranking
from usmoe.layers.spending import spending_threshold
from usmoe.routing import ExpertChoice, OwnChoice, USMoE
from usmoe.routing.router import experts_per_token
from usmoe.types import RouterOutput

Batch = Tensor | Mapping[str, Tensor]
"""Token ids (B, L), or what the model is called with: model(**batch). Padding is what attention_mask says."""


@torch.no_grad()
def calibrate(model: PreTrainedModel, batches: Iterable[Batch], router: Any) -> list[Any]:
    """One threshold router a layer, at the budget of `router` on the text of `batches`; ready for `patch()`.

    router   USMoE or ExpertChoice, whose k is the budget (None: the model's own; "0.75x" of it) and whose score ranks;
             whatever its pool, the result has pool="threshold", and keeps burst and min_experts. One for all layers,
             or a list or {layer name: router} with one for each
    batches  text of the kind that will be served, from many sources: ten thousand tokens of one novel meet the budget
             on the rest of it to 1 %, and on another author's to some 1 to 3 %

    The threshold of a layer lies where, over all real tokens of all batches, exactly floor(k*S + 0.5) pairs are chosen,
    those that min_experts adds included (expert choice: the capacity of each expert). Since a layer's threshold moves
    the scores of the layers above, the scores are taken twice: under the look-ahead pool, then under the thresholds so
    found. A bucket (burst) only ever takes pairs away, and is left out of the account. A layer that saw no token (of
    images, say) keeps its own choice.

    Raises ValueError for a router that no threshold can stand for, and for batches without a real token.
    """
    wanted = one_for_each(router, supported_layers(model))
    for one in wanted:
        if not isinstance(one, USMoE | ExpertChoice):
            raise ValueError(
                f"calibrate() finds thresholds for USMoE and ExpertChoice routers, not for {one}. Give it one of "
                "these; USMoE(min_experts=1, pool='threshold') drops no token."
            )
    batches = checked(batches, "calibrate()")
    served, seeds = [_served(one) for one in wanted], [_ranking(one) for one in wanted]
    routers: list[Any] = list(seeds)
    for _ in range(2):
        scores = ranking_scores(model, batches, routers, seeds)
        routers = [
            dataclasses.replace(one, threshold=threshold(one, layer, values)) if len(values) else OwnChoice()
            for one, (layer, values) in zip(served, scores, strict=True)
        ]
    return routers


def checked(batches: Iterable[Batch], what: str) -> list[Batch]:
    """The batches as a list. Raises TypeError, in the words of who asks, for what is no list of batches."""
    if isinstance(batches, Tensor | Mapping):
        raise TypeError(f"{what} was given one batch. Give a list of batches: [batch].")
    kept = list(batches)
    for batch in kept:
        tokens = batch.get("input_ids", batch.get("inputs_embeds")) if isinstance(batch, Mapping) else batch
        whole = isinstance(tokens, Tensor) and (
            tokens.ndim == 3 or (tokens.ndim == 2 and not tokens.is_floating_point())
        )
        if not whole:
            raise TypeError(
                f"{what} was given a batch that is a {type(batch).__name__} without token ids (sequences, tokens). "
                "Give integer tensors, or mappings with input_ids, as a tokenizer with return_tensors='pt' makes them."
            )
    return kept


def _served(router: USMoE | ExpertChoice) -> USMoE | ExpertChoice:
    """The threshold router that a router becomes, with a value to be found; refuses a score that needs a pool."""
    return dataclasses.replace(router, pool="threshold", threshold=(0.0,) if isinstance(router, ExpertChoice) else 0.0)


def _ranking(router: USMoE | ExpertChoice) -> USMoE | ExpertChoice:
    """The look-ahead router of the same score and budget."""
    idle = {"burst": None, "min_experts": 0} if isinstance(router, USMoE) else {}
    return dataclasses.replace(router, pool="sequence", threshold=None, **idle)


@torch.no_grad()
def ranking_scores(
    model: PreTrainedModel, batches: list[Batch], routers: list[Any], seeds: Sequence[USMoE | ExpertChoice]
) -> list[tuple[Layer, Float[Tensor, "S E"]]]:
    """For each layer the scores by which its seed would rank the pairs of all real tokens, while the model runs under
    `routers`."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(patched(model, routers))
        stack.enter_context(evaluating(model))
        state = patch_of(model)
        assert state is not None
        kept: dict[str, list[Tensor]] = {layer.name: [] for layer in state.layers}
        rankers = {layer.name: (layer, seed) for layer, seed in zip(state.layers, seeds, strict=True)}

        def listen(name: str, said: RouterOutput) -> None:
            layer, seed = rankers[name]
            valid = said.routing.valid
            valid = None if valid is None else valid.view(said.logits.shape[:2])
            kept[name].append(ranking(seed, said.logits, valid, layer.host).cpu())

        stack.enter_context(listening(model, listen))
        for batch in batches:
            run(model, batch)
        layers = state.layers
    if not any(len(scores) for one in kept.values() for scores in one):
        raise ValueError("calibrate() was given no real token. Give batches of text, a few thousand tokens at least.")
    return [(layer, torch.cat(kept[layer.name] or [torch.zeros(0, layer.columns)])) for layer in layers]


def run(model: PreTrainedModel, batch: Batch) -> Any:
    """The model's output for a batch, wherever the batch is."""
    given = batch if isinstance(batch, Mapping) else {"input_ids": batch}
    device = unwrapped(model).device
    return model(**{name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()})


def threshold(router: USMoE | ExpertChoice, layer: Layer, scores: Float[Tensor, "S E"]) -> float | tuple[float, ...]:
    """The value at which a router spends its budget on tokens of these scores, its floor included."""
    k = experts_per_token(router.k, layer.host, layer.num_experts)
    return spending_threshold(router, scores, k, layer.num_experts)
