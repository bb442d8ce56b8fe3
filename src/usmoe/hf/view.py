"""`view_of`: other modules over the same weights, so that what is done to them is seen by nobody who has the model."""

from __future__ import annotations

import copy
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from usmoe.hf.turns import one_at_a_time

_Model = TypeVar("_Model", bound=nn.Module)

TABLES = {name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set)}
"""Attributes in which torch keeps the parameters, buffers, submodules and hooks of a module."""


def view_of(model: _Model) -> _Model:
    """A model whose modules, hooks and modes are its own, and whose parameters and buffers are those of `model`.

    Patch it, switch it to evaluation, run it: another thread that uses the model sees nothing of that. What is learnt,
    moved or added to the model later is seen by the next view alone, so make one when it is needed: that copies
    references, and no weight.

    What was compiled (torch.compile, Module.compile) runs as it is written: the compiled code is of the other modules.
    """
    return views_of(model)[0]


@one_at_a_time
def views_of(*modules: nn.Module) -> list[Any]:
    """A view of each of some modules, as `view_of` makes it; what is inside of two of them is inside of both views."""
    view = _View()
    return [view.module(module) for module in modules]


class _View:
    """What was made so far: {id: (the other's, the view's)}. The first of these is there so that its id is not given to
    something else meanwhile."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Any, Any]] = {}

    def module(self, module: Any) -> Any:
        """The view of a module, one for each."""
        if id(module) in self._made:
            return self._made[id(module)][1]
        if isinstance(module, torch.jit.ScriptModule):  # its parts are in C++, and nothing in it can be patched
            return self._remember(module, module)
        view = self._remember(module, object.__new__(type(module)))
        for name, value in vars(module).copy().items():
            value = value.copy() if name in TABLES and value is not None else value
            vars(view)[name] = self._inside(value) if name in TABLES else self.of(value)
        return view

    def of(self, value: Any) -> Any:
        """A value that reaches the view's modules where it reached the other's; itself where it reaches none."""
        if isinstance(value, Tensor):
            return value
        if isinstance(value, nn.Module):
            return self.module(value)
        if not isinstance(value, dict | list | tuple | set | frozenset | partial | MethodType | FunctionType):
            return value
        if id(value) in self._made:
            return self._made[id(value)][1]
        self._remember(value, value)  # what holds itself
        return self._remember(value, self._copied(value))

    def _remember(self, value: Any, view: Any) -> Any:
        self._made[id(value)] = (value, view)
        return view

    def _inside(self, table: Any) -> Any:
        """A copy of a table of torch's, its values being the view's."""
        if isinstance(table, dict):
            for name, value in table.items():
                table[name] = self.of(value)
        return table

    def _copied(self, value: Any) -> Any:
        if isinstance(value, MethodType):
            holder = self.of(value.__self__)
            return value if holder is value.__self__ else MethodType(value.__func__, holder)
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, partial):
            parts = (value.func, value.args, value.keywords, vars(value))
            new = [self.of(part) for part in parts]
            if all(map(_is, parts, new)):
                return value
            made = type(value)(new[0], *new[1], **new[2])
            vars(made).update(new[3])
            return made
        if isinstance(value, dict):
            kept = dict(value.copy().items())
            items = {key: self.of(one) for key, one in kept.items()}
            if all(items[key] is one for key, one in kept.items()):
                return value
            made = copy.copy(value)
            made.update(items)
            return made
        before = list(value)
        after = [self.of(one) for one in before]
        if all(map(_is, before, after)):
            return value
        return type(value)._make(after) if hasattr(value, "_make") else type(value)(after)  # pyright: ignore

    def _function(self, value: FunctionType) -> Any:
        """A function that holds what it needs in its cells, or as what is left out when it is called."""
        compiled = getattr(value, "_torchdynamo_orig_callable", None)
        if compiled is not None:
            return self.of(compiled)
        cells = value.__closure__ or ()
        held = [_content(cell) for cell in cells]
        new = [self.of(one) for one in held]
        defaults, named = self.of(value.__defaults__), self.of(value.__kwdefaults__)
        if all(map(_is, held, new)) and defaults is value.__defaults__ and named is value.__kwdefaults__:
            return value
        closure = tuple(cell if a is b else CellType(b) for cell, a, b in zip(cells, held, new, strict=True))
        made = FunctionType(value.__code__, value.__globals__, value.__name__, defaults, closure)
        made.__kwdefaults__ = named
        vars(made).update({name: self.of(one) for name, one in vars(value).items()})
        return made


def _is(one: Any, other: Any) -> bool:
    return one is other


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty: what it names has not been made
        return None
