"""What the rule of a router module depends on, as a value: two modules with the same one follow the same rule."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from usmoe.hf.view import TABLES

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type)
_BESIDE = {"training", "_modules", "_parameters", "_buffers"}


class _UnknownError(Exception):
    """Something in a module that could change what it does, and cannot be compared."""


def fingerprint(
    router: nn.Module, block: nn.Module, experts: nn.Module, replaced: Callable[[nn.Module, str, Tensor], bool]
) -> Hashable | None:
    """What the rule of a router depends on: the code, the numbers and the tables of it and of all inside of it, the
    plain attributes of its block, and the sizes of its experts; None where it holds something that cannot be compared,
    such as a hook of another library.

    replaced: whether a tensor of a module is replaced before the router is asked, so that its values do not count
    """
    try:
        parts = [
            (name, type(module), type(module).forward, _attributes(module), _tensors(module, replaced))
            for name, module in router.named_modules()
        ]
        if any(_hooks(module) for module in router.modules() if module is not router):
            return None
        beside = tuple((name, _value(value)) for name, value in vars(block).items() if isinstance(value, _PLAIN))
        given = tuple((name, tuple(value.shape), value.dtype) for name, value in block.named_parameters(recurse=False))
        sizes = tuple((name, tuple(value.shape)) for name, value in experts.named_parameters())
        config = getattr(experts, "config", None)
        width = (getattr(experts, "hidden_dim", None), getattr(config, "hidden_size", None))
        found = (tuple(parts), type(block), beside, given, type(experts), sizes, width)
        hash(found)
    except (_UnknownError, TypeError):  # TypeError: what has no hash
        return None
    return found


def _hooks(module: nn.Module) -> bool:
    return any(table for name, table in vars(module).items() if name in TABLES and name.endswith("_hooks"))


def _attributes(module: nn.Module) -> tuple[Any, ...]:
    return tuple(
        (name, _value(value))
        for name, value in vars(module).items()
        if name not in TABLES and name not in _BESIDE and name != "_compiled_call_impl"
    )


def _value(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return type(value).__name__, value
    if isinstance(value, Tensor):
        return _digest(value)
    if isinstance(value, PreTrainedConfig):
        every = vars(value).items()
        return tuple((name, repr(one)) for name, one in every if not isinstance(one, PreTrainedConfig))
    if isinstance(value, Mapping):
        return tuple((name, _value(one)) for name, one in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return type(value).__name__, tuple(map(_value, value))
    if isinstance(value, BuiltinFunctionType):
        return value
    if isinstance(value, FunctionType) and not (value.__closure__ or value.__defaults__ or value.__kwdefaults__):
        return value
    raise _UnknownError


def _tensors(module: nn.Module, replaced: Callable[[nn.Module, str, Tensor], bool]) -> tuple[Any, ...]:
    found = []
    for store in (module._parameters, module._buffers):
        for name, value in store.items():
            if value is None:
                found.append((name, None))
            elif replaced(module, name, value):
                found.append((name, tuple(value.shape), value.dtype, value.device, bool((value > 0).all())))
            else:
                found.append((name, value.device, _digest(value)))
    return tuple(found)


def _digest(value: Tensor) -> tuple[Any, ...]:
    if value.is_meta or type(value) not in (Tensor, nn.Parameter):
        raise _UnknownError
    raw = value.detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return tuple(value.shape), value.dtype, hashlib.sha256(raw).hexdigest()
