"""Asking a pretrained model's router: random states, with random values in place of its weights for the moment."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from usmoe.hf.rule import Outputs, Source

_PROBES = 64
"""Random states that a router is asked about."""


class UnknownRuleError(ValueError):
    """A router whose rule is none of those that usmoe can express; the text says why."""


class FixedRouteError(ValueError):
    """A router that chooses by something else than the token's state, so that there is nothing to replace."""


@dataclass(kw_only=True)
class Probe:
    """What a router is asked with."""

    given: dict[str, Tensor] = field(default_factory=dict)
    """Arguments beside the states."""
    vectors: list[tuple[Source, Tensor]] = field(default_factory=list)
    """Where each vector of one value an expert lives, and what it is for the length of the probe."""
    matrices: list[Tensor] = field(default_factory=list)
    """The router's matrices, random for the length of the probe."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a router said of some states, in float64."""

    logits: Tensor
    """(T, columns)."""
    weights: Tensor
    """(T, k), by falling index."""
    indices: Tensor
    """(T, k)."""
    shared: Tensor | None
    null: int
    """Columns of the logits beyond the experts."""
    tolerance: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Asker:
    """A router, and how it is asked."""

    router: nn.Module
    given: dict[str, Tensor]
    outputs: Outputs
    number: int
    width: int
    lead: tuple[int, ...]
    """Dimensions before those of the tokens."""
    dtype: torch.dtype
    matrix: Tensor | None
    """The one that makes logits of states, (columns or more, D), where there is one."""

    def logits(self, states: Tensor) -> Tensor:
        return self.outputs.read_logits(self._say(states)).double()

    def _say(self, states: Tensor) -> tuple:
        # the forward itself, so that no hook of ours or another's sees the probe
        return self.router.forward(states.to(self.dtype).view(*self.lead, len(states), self.width), **self.given)

    def ask(self, states: Tensor) -> Answers:
        out, where = self._say(states), self.outputs
        logits = where.read_logits(out).double()
        indices, order = out[where.indices].reshape(len(states), -1).sort(-1, descending=True)
        weights = out[where.weights].reshape(len(states), -1)
        exact = weights.dtype in (torch.float32, torch.float64) and self.dtype in (torch.float32, torch.float64)
        return Answers(
            logits=logits,
            weights=weights.double().gather(1, order),
            indices=indices.long(),
            shared=None if where.shared is None else out[where.shared].double(),
            null=logits.shape[-1] - self.number,
            tolerance=1e-4 if exact else 2e-2,
        )


def arguments_of(router: nn.Module, block: nn.Module) -> dict[str, Source]:
    """The tensors of the block that the router is called with, by the name of its argument."""
    parameters = list(inspect.signature(router.forward).parameters.values())[1:]
    found = {}
    for parameter in parameters:
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            continue
        if isinstance(getattr(block, parameter.name, None), Tensor):
            found[parameter.name] = Source(path=parameter.name, in_block=True)
        elif parameter.default is inspect.Parameter.empty:
            if "ids" in parameter.name:
                raise FixedRouteError("its experts follow from the token's id, by a table")
            raise UnknownRuleError(
                f"its router needs more than the tokens: {parameter.name}, which is not in its block"
            )
    return found


@contextlib.contextmanager
def other_values(router: nn.Module, block: nn.Module, number: int, arguments: dict[str, Source]) -> Iterator[Probe]:
    """Random values in place of the vectors that have one value an expert (and some null experts), and of the matrices:
    a bias that is still zero, a factor that is still one, or weights that have not been loaded yet would not show what
    they do. What is in 16 bits or fewer becomes float32, since a rule that compares (within a tolerance, in groups)
    rounds to either side there. All are put back."""
    generator = torch.Generator().manual_seed(1)
    probe = Probe()
    # what accelerate brings for a forward comes in the dtype that it was loaded in, and must meet its like
    widens = not any(one.is_meta for one in itertools.chain(router.parameters(), router.buffers()))
    kept: list[tuple[Any, str, Any]] = []
    for inside, module in router.named_modules():
        stores: tuple[Any, ...] = (module._parameters, module._buffers)
        for store in stores:
            for name, old in store.items():
                if old is None or old.is_meta or not old.is_floating_point():
                    continue
                wide = torch.float32 if widens and old.itemsize < 4 else old.dtype
                if not is_replaced(module, name, old, number):
                    if wide is not old.dtype:
                        kept.append((store, name, old))
                        store[name] = _like(old, old.detach().to(wide))
                    continue
                vector = _one_an_expert(old, number)
                drawn = torch.randn(old.shape, generator=generator)
                if vector:
                    drawn = 1 + 0.3 * drawn.abs() if bool((old > 0).all()) else 0.3 * drawn
                else:
                    drawn = drawn / old.shape[1] ** 0.5
                drawn = drawn.to(old.device, wide)
                kept.append((store, name, old))
                store[name] = _like(old, drawn)
                if vector:
                    path = f"{inside}.{name}" if inside else name
                    probe.vectors.append((Source(path=path), drawn.reshape(-1)))
                else:
                    probe.matrices.append(drawn)
    for name, source in arguments.items():
        old = source.read(router, block)
        drawn = (torch.randn(old.shape, generator=generator) * 0.3).to(old)
        probe.given[name] = drawn.view_as(getattr(block, name))
        if _one_an_expert(old, number):
            probe.vectors.append((source, drawn))
    try:
        yield probe
    finally:
        for store, name, old in kept:
            store[name] = old


def is_replaced(module: nn.Module, name: str, value: Tensor, number: int) -> bool:
    """Whether a parameter or buffer of a router has other values while it is asked."""
    if value.device.type == "meta" or not value.is_floating_point():
        return False
    return _one_an_expert(value, number) or (value.ndim == 2 and name in module._parameters)


def _like(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


def _one_an_expert(values: Tensor, number: int) -> bool:
    return values.is_floating_point() and number <= values.numel() <= number + 1 and values.shape[-1] == values.numel()


def asked(
    router: nn.Module, experts: nn.Module, probe: Probe, logits_index: int, number: int
) -> Iterator[tuple[Asker, Answers]]:
    """What the router says of random states, as (T, D) and as (1, T, D), whose logits spread by 0.1 to 3: enough to
    tell rules apart, too little for a score to underflow."""
    like = next((p for p in router.parameters() if p.ndim == 2), None)
    if like is None:
        raise UnknownRuleError("its router has no weight matrix")
    if like.device.type == "meta" and not any(hasattr(module, "_hf_hook") for module in router.modules()):
        raise UnknownRuleError("its router has no weights: they are on the meta device, and accelerate brings none")
    device = torch.device("cpu") if like.device.type == "meta" else like.device
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    wanted = torch.logspace(-1, 0.5, _PROBES, device=device)[:, None]
    reasons: list[Exception] = []
    answered = False
    for width, lead in itertools.product(_widths(router, experts), ((), (1,))):
        states = torch.randn(_PROBES, width, generator=torch.Generator().manual_seed(0)).to(device)
        try:
            out = router.forward(states.to(dtype).view(*lead, _PROBES, width), **probe.given)
            for outputs, columns in _positions(out, logits_index, number):
                heads = [one for one in probe.matrices if len(one) >= columns]
                matrix = next((one for one in heads if one.shape[1] == width), None)
                asker = Asker(
                    router=router,
                    given=probe.given,
                    outputs=outputs,
                    number=number,
                    width=width,
                    lead=lead,
                    dtype=dtype,
                    matrix=matrix,
                )
                states = states * (wanted / _spread(asker.logits(states))).to(states.dtype)
                reached = _spread(asker.logits(states))
                for head in heads if not (0.1 < (reached / wanted).median() < 10) else []:
                    head.mul_((0.7 / reached.median()).to(head.dtype))  # a norm before it: states have no size
                if _spread(asker.logits(states)).max() < 0.02:
                    raise UnknownRuleError("the logits of its router do not differ: load or initialise its weights")
                answered = True
                yield asker, asker.ask(states)
        except (UnknownRuleError, GeneratorExit):
            raise
        except Exception as error:  # a router that takes states of another shape: whatever it raises
            reasons.append(error)
    if not answered:
        raise UnknownRuleError(f"its router cannot be asked by itself: {reasons[-1]}".splitlines()[0].rstrip("."))


def _spread(logits: Tensor) -> Tensor:
    return (logits - logits.mean(0)).std(-1, keepdim=True).clamp(min=1e-6)


def _widths(router: nn.Module, experts: nn.Module) -> list[int]:
    """How wide a state may be, most likely first."""
    found = [module.in_features for module in router.modules() if isinstance(module, nn.Linear)]
    found += [p.shape[-1] for p in router.parameters() if p.ndim == 2]
    config = getattr(experts, "config", None)
    found += [size for size in (getattr(experts, "hidden_dim", None), getattr(config, "hidden_size", None)) if size]
    return list(dict.fromkeys(found))


def _positions(out: Any, logits_index: int, number: int) -> Iterator[tuple[Outputs, int]]:
    """The logits are where the recorder says, the indices are the integers (T, k), the weights floats of their shape;
    and how many columns the logits have."""
    if not isinstance(out, tuple):
        raise UnknownRuleError("its router returns logits alone, and the block chooses the experts")
    integers = [i for i, x in enumerate(out) if isinstance(x, Tensor) and not x.is_floating_point()]
    if len(integers) != 1:
        raise UnknownRuleError("its router does not return one matrix of chosen experts")
    shape = out[integers[0]].shape
    floats = [i for i, x in enumerate(out) if isinstance(x, Tensor) and x.is_floating_point() and i != logits_index]
    weights = [i for i in floats if out[i].shape == shape]
    logits = out[logits_index]
    columns = logits.shape[-1] if isinstance(logits, Tensor) and logits.ndim else 0
    if not weights or not number <= columns <= number + 1:
        raise UnknownRuleError("its router does not return logits (tokens, experts) and one matrix of weights")
    rows = logits.reshape(-1, columns).double()
    probabilities = bool((rows >= 0).all()) and torch.allclose(rows.sum(-1), rows.new_ones(()), atol=1e-2)
    for place in weights:
        beside = [i for i in floats if i != place and out[i].ndim == 2 and len(out[i]) == len(out[place])]
        found = Outputs(
            logits=logits_index,
            weights=place,
            indices=integers[0],
            shared=beside[0] if len(beside) == 1 else None,
            probabilities=probabilities,
        )
        yield found, columns
