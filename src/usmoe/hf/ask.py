"""What a pretrained model's router does, found out by asking it.

The router runs on random states, its correction bias and factors replaced by random ones for the moment; the rule
that gives the experts that it gives, with the weights that it gives, is its rule. So a rule is known by what it does,
not by the name of its class, and a family that is added to transformers tomorrow is read as the others are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from usmoe.hf.rule import Outputs, Rule, Source
from usmoe.routing.host import Groups, Host
from usmoe.routing.scores import HOST_SCORES

_PROBES = 64
"""Random states that a router is asked about."""


class UnknownRuleError(ValueError):
    """A router whose rule is none of those that usmoe can express; the text says why."""


class FixedRouteError(ValueError):
    """A router that chooses by something else than the token's state, so that there is nothing to replace."""


@torch.no_grad()
def own_rule(router: nn.Module, block: nn.Module, experts: nn.Module, logits_index: int = 0) -> Rule:
    """The rule that a router module follows.

    block    the module that calls the router, where the arguments that it hands to it are looked up by their names
    experts  the module of the experts, (E, ...) parameters

    Raises UnknownRuleError, with the reason, where no rule gives what the router gives; FixedRouteError where it is
    asked for the token ids.
    """
    number = int(experts.num_experts)  # pyright: ignore[reportArgumentType]
    arguments = _arguments(router, block)
    training = {module: module.training for module in router.modules()}
    router.eval()
    try:
        with _other_values(router, block, number, arguments) as probe:
            answers = _ask(router, experts, probe.given, logits_index, number)
            found = (_recognised(router, said, probe, number) for said in answers)
            rule = next((rule for rule in found if rule is not None), None)
            if rule is None:
                raise UnknownRuleError("its router follows a rule that usmoe cannot express yet")
            return rule
    finally:
        for module, mode in training.items():
            module.training = mode


@dataclass(kw_only=True)
class _Probe:
    """What a router is asked with."""

    given: dict[str, Tensor] = field(default_factory=dict)
    """Arguments beside the states."""
    vectors: list[tuple[Source, Tensor]] = field(default_factory=list)
    """Where each vector of one value an expert lives, and what it is for the length of the probe."""


@dataclass(frozen=True, kw_only=True)
class _Answers:
    outputs: Outputs
    logits: Tensor
    """(T, columns), float64."""
    weights: Tensor
    """(T, k), float64, by falling index."""
    indices: Tensor
    """(T, k)."""
    shared: Tensor | None
    tolerance: float


def _arguments(router: nn.Module, block: nn.Module) -> dict[str, Source]:
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
def _other_values(router: nn.Module, block: nn.Module, number: int, arguments: dict[str, Source]) -> Iterator[_Probe]:
    """Random values in place of the vectors that have one value an expert (and some null experts): a bias that is still
    zero, or a factor that is still one, would not show what it does. All are put back."""
    generator = torch.Generator().manual_seed(1)
    probe = _Probe()
    kept: list[tuple[Any, str, Any]] = []
    for inside, module in router.named_modules():
        stores: tuple[Any, ...] = (module._parameters, module._buffers)
        for store in stores:
            for name, old in store.items():
                if old is None or old.device.type == "meta" or not _one_an_expert(old, number):
                    continue
                factors = bool((old > 0).all())
                drawn = torch.randn(old.shape, generator=generator) * 0.3
                drawn = (1 + drawn.abs() if factors else drawn).to(old)
                kept.append((store, name, old))
                store[name] = nn.Parameter(drawn, requires_grad=False) if isinstance(old, nn.Parameter) else drawn
                path = f"{inside}.{name}" if inside else name
                probe.vectors.append((Source(path=path), drawn.reshape(-1)))
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


def _one_an_expert(values: Tensor, number: int) -> bool:
    return values.is_floating_point() and number <= values.numel() <= number + 1 and values.shape[-1] == values.numel()


def _ask(
    router: nn.Module, experts: nn.Module, given: dict[str, Tensor], logits_index: int, number: int
) -> Iterator[_Answers]:
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
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(_PROBES, width, generator=generator).to(device)
        try:
            for _ in range(2):  # the forward itself, so that no hook of ours or another's sees the probe
                out = router.forward(states.to(dtype).view(*lead, _PROBES, width), **given)
                outputs = _positions(out, logits_index, number)
                logits = outputs.read_logits(out).double()
                spread = (logits - logits.mean(0)).std(-1, keepdim=True).clamp(min=1e-6)
                states = states * (wanted / spread).to(states.dtype)
        except UnknownRuleError:
            raise
        except Exception as error:  # a router that takes states of another shape: whatever it raises
            reasons.append(error)
            continue
        indices, order = out[outputs.indices].reshape(_PROBES, -1).sort(-1, descending=True)
        weights = out[outputs.weights].reshape(_PROBES, -1)
        exact = weights.dtype in (torch.float32, torch.float64) and dtype in (torch.float32, torch.float64)
        answered = True
        yield _Answers(
            outputs=outputs,
            logits=logits,
            weights=weights.double().gather(1, order),
            indices=indices.long(),
            shared=None if outputs.shared is None else out[outputs.shared].double(),
            tolerance=1e-4 if exact else 2e-2,
        )
    if not answered:
        raise UnknownRuleError(f"its router cannot be asked by itself: {reasons[-1]}".splitlines()[0].rstrip("."))


def _widths(router: nn.Module, experts: nn.Module) -> list[int]:
    """How wide a state may be, most likely first."""
    found = [module.in_features for module in router.modules() if isinstance(module, nn.Linear)]
    found += [p.shape[-1] for p in router.parameters() if p.ndim == 2]
    config = getattr(experts, "config", None)
    found += [size for size in (getattr(experts, "hidden_dim", None), getattr(config, "hidden_size", None)) if size]
    return list(dict.fromkeys(found))


def _positions(out: Any, logits_index: int, number: int) -> Outputs:
    """The logits are where the recorder says, the indices are the integers (T, k), the weights the floats of their
    shape."""
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
    if len(weights) != 1 or not number <= columns <= number + 1:
        raise UnknownRuleError("its router does not return logits (tokens, experts) and one matrix of weights")
    beside = [i for i in floats if i != weights[0] and out[i].ndim == 2 and len(out[i]) == len(out[weights[0]])]
    rows = logits.reshape(-1, columns).double()
    return Outputs(
        logits=logits_index,
        weights=weights[0],
        indices=integers[0],
        shared=beside[0] if len(beside) == 1 else None,
        probabilities=bool((rows >= 0).all()) and torch.allclose(rows.sum(-1), rows.new_ones(()), atol=1e-2),
    )


def _recognised(router: nn.Module, said: _Answers, probe: _Probe, number: int) -> Rule | None:
    """The simplest rule that gives these answers; None where there is none."""
    null = said.logits.shape[-1] - number
    for weighing in _weighings(router):
        scores = weighing.weighing_scores(said.logits)
        for host, scale in _factors(router, weighing, scores, said, probe):
            for ranking, bias in _rankings(router, host, said, probe):
                if _chooses(ranking, said, null):
                    host = dataclasses.replace(ranking, bias=None)
                    return Rule(host=host, outputs=said.outputs, null_experts=null, bias=bias, scale=scale)
    return None


def _weighings(router: nn.Module) -> Iterator[Host]:
    for score in HOST_SCORES:
        yield Host(score=score, alpha=0.0)
    numbers = {float(value) for value in vars(router).values() if type(value) is float and 0 < value < 1}
    for jitter in sorted(numbers):
        yield Host(score="sparse_mixer", jitter=jitter, alpha=0.0)


def _factors(
    router: nn.Module, weighing: Host, scores: Tensor, said: _Answers, probe: _Probe
) -> Iterator[tuple[Host, Source | None]]:
    """The normalisation and the scaling under which these scores give the router's weights, if there are such."""
    k = said.indices.shape[1]
    chosen = scores.gather(1, said.indices)
    per_score = (said.weights / chosen).where(said.weights != 0, torch.nan)  # a null expert is chosen with weight 0
    if said.shared is not None:
        # shared experts take part in the normalisation: all weights of a token together have one sum
        whole = said.weights.sum(-1) + said.shared.sum(-1)
        one = _same(per_score, per_score[:, :1], said.tolerance) and _same(whole, whole[0], said.tolerance)
        if one:
            yield dataclasses.replace(weighing, k=k, normalize="chosen"), None
        return
    for normalize in ("none", "chosen"):
        total = chosen.sum(-1, keepdim=True) if normalize == "chosen" else 1.0
        for source, values in [(None, None), *probe.vectors]:
            factors = 1.0 if values is None else values.double()[said.indices.clamp(max=len(values) - 1)]
            scale = _scale(per_score * total / factors, router, said.tolerance)
            if scale is not None:
                yield dataclasses.replace(weighing, k=k, normalize=normalize, scale=scale), source


def _same(one: Tensor, other: Tensor | float, tolerance: float) -> bool:
    return bool(((one - other).abs() <= tolerance * one.abs().maximum(torch.as_tensor(other).abs())).all())


def _scale(ratio: Tensor, router: nn.Module, tolerance: float) -> float | None:
    """The common factor of the weights, where there is one: 1, or a number that the router names, or what it is."""
    known = ratio[ratio.isfinite()]
    if not len(known):
        return None
    middle = known.median().item()
    if middle <= 0 or not _same(known, middle, tolerance):
        return None
    named = [float(value) for value in vars(router).values() if type(value) in (int, float) and value > 0]
    return next((value for value in (1.0, *named) if abs(middle - value) <= tolerance * value), middle)


def _rankings(router: nn.Module, host: Host, said: _Answers, probe: _Probe) -> Iterator[tuple[Host, Source | None]]:
    """What may compete, the simplest first: the score or the logits, with each bias that there is, in groups."""
    for (source, values), rank in itertools.product([(None, None), *probe.vectors], ("score", "logits")):
        plain = dataclasses.replace(host, rank=rank, bias=None if values is None else values.double())
        yield plain, source
        for groups in _groups(router, said.logits.shape[-1]):
            yield dataclasses.replace(plain, groups=groups), source


def _groups(router: nn.Module, columns: int) -> Iterator[Groups]:
    """The groups that the numbers of a router allow."""
    numbers = sorted({value for value in vars(router).values() if type(value) is int})
    for number, kept in itertools.product(numbers, numbers):
        if 1 < number <= columns and columns % number == 0 and 0 < kept < number:
            for by, outside in itertools.product(("best_two", "best"), (-torch.inf, 0.0)):
                yield Groups(number=number, kept=kept, by=by, outside=outside)


def _chooses(host: Host, said: _Answers, null: int) -> bool:
    """Whether the k best by these scores are those that the router chose; by value, since where scores tie (in bfloat16
    they do) which of the tied is taken is anybody's choice."""
    ranked = host.ranking_scores(said.logits)
    best = ranked.topk(said.indices.shape[1], -1).values
    if null:  # a null expert is handed on under another index: it is where the weight is 0
        theirs = ranked.gather(1, said.indices.where(said.weights != 0, ranked.shape[1] - 1))
    else:
        theirs = ranked.gather(1, said.indices)
    theirs = theirs.sort(-1, descending=True).values
    return bool((theirs > -torch.inf).all()) and _same(theirs, best, 1e-5 if said.tolerance < 1e-3 else 1e-2)
