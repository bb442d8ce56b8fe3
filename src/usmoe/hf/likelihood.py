"""Two ways to measure how well a language model predicts a text, side by side.

Teacher-forced: one forward over the whole sequence. Under a router that looks ahead, later tokens move the experts of
earlier ones, so the figure is not that of any autoregressive model.

Honest: the likelihood of token t+1 when the model is run on tokens 1 ... t alone, every earlier token routed anew. One
forward a position, so it is taken on a seeded sample of positions, with a confidence interval.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from usmoe.report.estimate import Honest, corrected, drawn


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
    places = drawn(forced.numel(), positions, seed)
    alone = []
    for place in places.tolist():
        row, last = divmod(place, forced.shape[1])
        alone.append(_nats(model, tokens[row : row + 1, : last + 2], only_last=True).item())
        tick()
    return corrected(forced.flatten(), places, torch.tensor(alone))


def _nats(model: PreTrainedModel, tokens: Int[Tensor, "B L"], only_last: bool = False) -> Float[Tensor, "B L-1"]:
    """NLL of tokens 2 ... L given a forward over tokens 1 ... L-1."""
    tokens = tokens.to(model.device)
    keep = {"logits_to_keep": 1} if only_last else {}
    logits = model(input_ids=tokens[:, :-1], use_cache=False, **keep).logits.float()
    logits = logits[:, -1:] if only_last else logits
    target = tokens[:, -1:] if only_last else tokens[:, 1:]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), target, reduction="none").cpu()
