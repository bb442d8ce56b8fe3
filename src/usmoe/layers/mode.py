"""In which mode a module runs: evaluation for a while; under a transformation of torch.func."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch._C._functorch import peek_interpreter_stack

DATA = "which pairs are routed is data: compile without fullgraph=True, so that the graph may break there"
"""Why no compiler takes what routes; torch says it where a full graph is asked for."""


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode; then each as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def under_transformation() -> bool:
    """Whether torch.func (grad, vjp, jvp, vmap) runs a function: nothing outside of it may change then, so that what a
    layer tracks of its batches stays as it is."""
    return peek_interpreter_stack() is not None


def refuse_recording(what: str, instead: str) -> None:
    """Raise RuntimeError under torch.jit.trace and torch.export: they would keep the route of one batch for all.

    what     layer or model, for the message
    instead  what to do, as a sentence
    """
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if tracing or torch.compiler.is_exporting():
        by = "torch.jit.trace" if tracing else "torch.export"
        raise RuntimeError(
            f"{by} would write down the (token, expert) pairs of this one batch, and the {what} would compute every "
            f"other by them. {instead}"
        )
