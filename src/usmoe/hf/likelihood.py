"""Two ways to measure how well a language model predicts a text, side by side.

Teacher-forced: one forward over the whole sequence. Under a router that looks ahead, later tokens move the experts of
earlier ones, so the figure is not that of any autoregressive model.

Honest: the likelihood of token t+1 when the model is run on tokens 1 ... t alone, every earlier token routed anew. One
forward a position, so it is taken on a seeded sample of positions, with a confidence interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Honest:
    """The mean honest negative log-likelihood, from a sample of positions.

    The sample estimates the mean difference to the teacher-forced figure, which is known at every position; so the
    interval is that of the difference (a difference estimator, Cochran 1977, section 7.2), not of the text.
    """

    nats: float
    """Per token."""
    interval: float
    """Half-width of the 95 % confidence interval, nats per token."""
    positions: int
    """Sampled."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)


@torch.no_grad()
def teacher_forced(model: PreTrainedModel, tokens: Int[Tensor, "B L"], batch_size: int = 8) -> Float[Tensor, "B L-1"]:
    """Negative log-likelihood, in nats, of every token after the first of each sequence, float32."""
    rows = [_nats(model, part) for part in tokens.split(batch_size)]
    return torch.cat(rows)


@torch.no_grad()
def honest(
    model: PreTrainedModel,
    tokens: Int[Tensor, "B L"],
    forced: Float[Tensor, "B L-1"],
    positions: int,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> Honest:
    """The honest likelihood of the same text, from `positions` seeded positions drawn without replacement.

    forced is what `teacher_forced` gave for these tokens under the same router; tick is called after each position.
    """
    total = forced.numel()
    positions = min(positions, total)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(total, generator=generator)[:positions]
    gaps = []
    for place in drawn.tolist():
        row, last = divmod(place, forced.shape[1])
        alone = _nats(model, tokens[row : row + 1, : last + 2], only_last=True)
        gaps.append(alone.item() - forced[row, last].item())
        tick()
    gap = torch.tensor(gaps, dtype=torch.float64)
    spread = gap.std().item() if positions > 1 else math.nan
    finite = math.sqrt(1 - positions / total)
    return Honest(
        nats=forced.double().mean().item() + gap.mean().item(),
        interval=1.96 * spread / math.sqrt(positions) * finite,
        positions=positions,
    )


def _nats(model: PreTrainedModel, tokens: Int[Tensor, "B L"], only_last: bool = False) -> Float[Tensor, "B L-1"]:
    """NLL of tokens 2 ... L given a forward over tokens 1 ... L-1."""
    tokens = tokens.to(model.device)
    keep = {"logits_to_keep": 1} if only_last else {}
    logits = model(input_ids=tokens[:, :-1], use_cache=False, **keep).logits.float()
    logits = logits[:, -1:] if only_last else logits
    target = tokens[:, -1:] if only_last else tokens[:, 1:]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), target, reduction="none").cpu()
