"""A classifier read over many texts: its answers, and what its routers did."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from usmoe.train.classifier import Classifier
from usmoe.train.finetune_config import FinetuneConfig
from usmoe.train.stop import Stopped
from usmoe.train.tally import Tally
from usmoe.train.texts import Texts


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """What a classifier says of some texts."""

    logits: Float[Tensor, "N C"]
    """On the CPU, in the order of the texts."""
    routed: dict[str, float | None]
    """experts, dropped, load_cv over all of them (usmoe.train.tally)."""

    @property
    def classes(self) -> Int[Tensor, " N"]:
        """The likeliest class of each; the first of equal ones."""
        return self.logits.argmax(1)


@torch.no_grad()
def classify(
    model: Classifier, texts: Texts, config: FinetuneConfig, *, stop: threading.Event | None = None
) -> Answers:
    """The classes of texts, those of about one length together. The model is in evaluation mode then.

    Under a router that looks across the batch, an answer depends on the texts beside it. Raises ValueError for logits
    that are no numbers, and Stopped between two batches where `stop` is set.
    """
    device = next(model.parameters()).device
    found: list[Tensor] = []
    rows, tally = [], Tally()
    model.eval()
    for batch in texts.by_length(config.evaluation_batch):
        if stop is not None and stop.is_set():
            raise Stopped
        with autocast(config, device):
            out = model(batch.tokens.to(device), batch.valid.to(device))
        found.append(out.logits.float().cpu())
        rows.append(torch.from_numpy(batch.rows))
        tally.count(out.said)
    logits = torch.empty_like(torch.cat(found))
    logits[torch.cat(rows)] = torch.cat(found)
    if not logits.isfinite().all():
        raise ValueError("The classifier's logits are no finite numbers. Give a smaller lr, or precision=float32.")
    return Answers(logits=logits, routed=tally.figures)


def autocast(config: FinetuneConfig, device: torch.device) -> torch.autocast:
    """bfloat16 where the configuration says so."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bfloat16")
