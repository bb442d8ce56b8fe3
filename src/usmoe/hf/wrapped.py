"""The transformers model inside of what other libraries wrap around it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model: itself, or what peft, DistributedDataParallel or DataParallel hold.

    Raises TypeError for what holds none, and ValueError for a model that is compiled or sharded: its forward would not
    see a patch.
    """
    inner = model
    while not isinstance(inner, PreTrainedModel):
        if isinstance(inner, nn.Module) and "_orig_mod" in inner._modules:
            raise ValueError(
                f"This {type(inner._orig_mod).__name__} is compiled, and compiled code does not see a patch. Patch the "
                "model itself, then compile it: torch.compile(usmoe.patch(model, router))."
            )
        if isinstance(inner, nn.Module) and type(inner).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "This model is sharded by FullyShardedDataParallel, which hides its weights. Patch it first, then wrap."
            )
        if hasattr(inner, "get_base_model"):  # peft
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "module", None), nn.Module):  # (distributed) data parallel
            inner = inner.module
        else:
            raise TypeError(
                f"A {type(model).__name__} is not a transformers model. Give a PreTrainedModel, such as "
                "AutoModelForCausalLM.from_pretrained(...) returns; for a layer of your own use usmoe.MoE."
            )
    return inner
