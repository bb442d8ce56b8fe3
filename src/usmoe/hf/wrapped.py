"""The transformers model inside of what other libraries wrap around it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model: itself, or what peft, torch.compile, DistributedDataParallel or DataParallel hold.

    Raises TypeError for what holds none, and ValueError for a model that is sharded: its weights are hidden.
    """
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if type(inner).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "This model is sharded by FullyShardedDataParallel, which hides its weights. Patch it first, then wrap."
            )
        if hasattr(inner, "get_base_model"):  # peft's PeftModel
            inner = inner.get_base_model()
            continue
        held = getattr(inner, "_modules", {})
        inside = next((held[name] for name in ("_orig_mod", "module", "model", "base_model") if name in held), None)
        if inside is None:
            raise TypeError(
                f"A {type(model).__name__} is not a transformers model. Give a PreTrainedModel, such as "
                "AutoModelForCausalLM.from_pretrained(...) returns; for a layer of your own use usmoe.MoE."
            )
        inner = inside
    return inner
