"""The balance loss in the output of a patched model: of the pairs that were really routed, where the unpatched model
has one, and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch

from usmoe.layers.balance import pooled_balance_loss
from usmoe.types import RouterOutput


def asked(module: Any, given: Mapping[str, Any], name: str, otherwise: bool = False) -> bool:
    """Whether a forward is to have something: by its argument, or by the model's configuration; `otherwise` where
    neither says it."""
    wanted = given.get(name)
    return bool(getattr(module.config, name, otherwise) if wanted is None else wanted)


def refuse_cut_off(output: Any, cut_off: bool) -> None:
    """Raise ValueError for a balance loss that would teach nothing; transformers computes it all the same.

    cut_off  whether a layer ran without a graph
    """
    loss = output.get("loss")
    if cut_off and torch.is_grad_enabled() and (loss is None or loss.requires_grad):
        raise ValueError(
            "Reentrant activation checkpointing runs the layers without a graph, so that the balance loss would be in "
            "the loss and teach the routers nothing. Turn it on with gradient_checkpointing_kwargs="
            "{'use_reentrant': False}."
        )


def put_real_balance_loss(module: Any, output: Any, said: Sequence[RouterOutput], router: Any) -> None:
    """Put the balance loss of the pairs that were routed in the place of the model's own, which assumes token choice;
    what the model made of the other parts of its output stays as it is.

    Raises ValueError, in the name of `router`, where the model does not say by what its loss counts it.
    """
    loss, coefficient = output.get("loss"), _coefficient(module)
    if coefficient is None and loss is not None:
        raise ValueError(
            f"This model adds a balance loss to its loss, and usmoe cannot tell how much of it to replace under "
            f"{router}. Leave output_router_logits out, and add usmoe.layers.balance.balance_loss() yourself."
        )
    ours, theirs = pooled_balance_loss(said), output["aux_loss"]
    if loss is not None and coefficient:
        output["loss"] = loss + coefficient * (ours.to(loss.device) - torch.as_tensor(theirs, device=loss.device))
    output["aux_loss"] = ours


def _coefficient(module: Any) -> float | None:
    """What the model's own balance loss is multiplied by; None for a model that does not say."""
    text = getattr(module.config, "text_config", None)
    for name, holder in product(("router_aux_loss_coef", "aux_loss_coef"), (module, module.config, text)):
        found = getattr(holder, name, None)
        if isinstance(found, int | float):
            return float(found)
    return None
