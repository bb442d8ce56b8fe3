"""Experts in fewer bits: bitsandbytes' 4-bit parametrisation of their 3-D parameters, and tensors that dequantise.

transformers' own integration packs `nn.Linear` alone, and leaves experts in the dtype that they were loaded in, most of
a model's bytes. Of packed experts the patch unpacks one at a time, and only those that have tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from usmoe.hf.wrapped import unwrapped


@dataclass(frozen=True, kw_only=True, eq=False)
class _Matrices:
    """Weights (E, F, D), of which [e] makes one matrix."""

    size: tuple[int, int, int]
    """As stored."""
    dtype: torch.dtype
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        experts, rows, columns = self.size
        return (experts, columns, rows) if self.transposed else (experts, rows, columns)

    def _unpack(self, expert: int) -> Tensor:
        raise NotImplementedError

    def __getitem__(self, expert: int) -> Tensor:
        matrix = self._unpack(expert).to(self.dtype)
        return matrix.T if self.transposed else matrix

    def transpose(self, one: int, other: int) -> _Matrices:
        assert {one, other} == {1, 2}
        return dataclasses.replace(self, transposed=not self.transposed)

    def to(self, dtype: torch.dtype) -> _Matrices:
        return dataclasses.replace(self, dtype=dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class _FourBits(_Matrices):
    """Packed by bitsandbytes in blocks that do not cross experts (QLoRA, arXiv 2305.14314)."""

    packed: Tensor
    """(E, bytes)."""
    absmax: Tensor
    """(E, blocks): the scale of each block."""
    state: Any
    """bitsandbytes' QuantState of the whole."""

    def _unpack(self, expert: int) -> Tensor:
        from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

        whole, (_, rows, columns) = self.state, self.size
        # as rows of one block: bitsandbytes 0.50's kernel for the CPU errs where a row is no multiple of a block
        blocks = torch.Size((rows * columns // whole.blocksize, whole.blocksize))
        one = functional.QuantState(
            absmax=self.absmax[expert],
            shape=blocks,
            code=whole.code,
            blocksize=whole.blocksize,
            quant_type=whole.quant_type,
            dtype=whole.dtype,
        )
        return functional.dequantize_4bit(self.packed[expert].view(-1, 1), one).view(rows, columns)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Dequantised(_Matrices):
    """A tensor subclass that knows how to dequantise a slice of itself (torchao)."""

    tensor: Any

    def _unpack(self, expert: int) -> Tensor:
        return self.tensor[expert].dequantize()


def weights_of(experts: nn.Module, name: str) -> Any:
    """A weight of an experts module: its tensor, or, where it is kept in fewer bits, what unpacks it by expert."""
    state = _four_bits(experts, name)
    if state is not None:
        steps = _steps(experts)[name]
        _, rows, columns = state.shape
        if len(steps) == 1 and rows * columns % state.blocksize == 0:
            return _by_expert(steps.original, state)
    weight: Any = getattr(experts, name)
    if _is_subclass(weight):
        return _Dequantised(size=tuple(weight.shape), dtype=weight.dtype, tensor=weight)
    return weight


def _is_subclass(weight: Any) -> bool:
    return is_traceable_wrapper_subclass(weight) and hasattr(type(weight), "dequantize")


def _by_expert(packed: Tensor, state: Any) -> _FourBits:
    absmax = state.absmax
    if state.nested:  # the scales are packed, too
        from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    size = tuple(state.shape)
    return _FourBits(
        size=size,  # pyright: ignore[reportArgumentType]
        dtype=state.dtype,
        packed=packed.reshape(size[0], -1),
        absmax=absmax.float().view(size[0], -1),
        state=state,
    )


def shape_of(experts: nn.Module, name: str) -> tuple[int, ...]:
    """The shape of a weight, without unpacking it."""
    state = _four_bits(experts, name)
    return tuple(getattr(experts, name).shape if state is None else state.shape)


def precision_of(experts: nn.Module) -> str:
    """What a module of experts is kept in, in words: bfloat16, nf4, Int8Tensor ..."""
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    state = _four_bits(experts, name)
    if state is not None:
        return state.quant_type
    weight: Any = getattr(experts, name)
    return type(weight).__name__ if _is_subclass(weight) else str(weight.dtype).removeprefix("torch.")


def _four_bits(experts: nn.Module, name: str) -> Any:
    """bitsandbytes' state of a packed weight; None where the weight is not packed."""
    if not parametrize.is_parametrized(experts, name):
        return None
    return next((step.quant_state for step in _steps(experts)[name] if hasattr(step, "quant_state")), None)


def _steps(experts: Any) -> Any:
    return experts.parametrizations


def quantize_experts(model: Any, kind: Literal["nf4", "fp4"] = "nf4", *, double: bool = True) -> Any:
    """The same model with the experts of its MoE layers in 4 bits, in place; routers and all else stay as they are.

    kind    nf4 | fp4 (QLoRA, arXiv 2305.14314)
    double  whether the scales are packed, too: 4.1 bits a weight instead of 4.5

    Experts get no gradient any more. transformers cannot save them packed: save before, and quantise after loading.
    Works on patched and unpatched models, on a CPU and on a GPU. Layers that are packed already stay.

    Raises ImportError without bitsandbytes (pip install 'usmoe[quant]'), ValueError for a model without MoE layers
    behind transformers' experts interface.
    """
    from usmoe.hf.layers import behind_interface

    try:
        from bitsandbytes.nn.parametrize import replace_parameter_4bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("4-bit experts need bitsandbytes. Install it: pip install 'usmoe[quant]'.") from error
    if kind not in ("nf4", "fp4"):
        raise ValueError(f"There is no 4-bit type {kind!r}. Choose nf4 or fp4.")
    inner: PreTrainedModel = unwrapped(model)
    found = [module for module in inner.modules() if behind_interface(module)]
    if not found:
        raise ValueError(f"{type(inner).__name__} has no experts behind transformers' experts interface to quantise.")
    for experts in found:
        for name in ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj"):
            if not parametrize.is_parametrized(experts, name):
                replace_parameter_4bit(experts, name, compress_statistics=double, quant_type=kind)
    return model


def packed_experts(model: nn.Module) -> list[str]:
    """Names of the modules of experts that are kept in 4 bits."""
    return [name for name, module in model.named_modules() if _four_bits(module, "down_proj") is not None]


def refuse_adapted(model: PreTrainedModel) -> None:
    """Raise ValueError where peft adapts experts that are packed: it then applies only some of what it trains."""
    for name, module in model.named_modules():
        if type(module).__name__ == "ParamWrapper" and packed_experts(module):
            raise ValueError(
                f"{name} holds LoRA on experts that are in 4 bits, of which peft silently leaves a part out. Keep the "
                "experts in bfloat16 where target_parameters names them."
            )
