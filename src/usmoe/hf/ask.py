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
    if number == 1:
        raise FixedRouteError("it has one expert, so there is nothing to choose")
    arguments = _arguments(router, block)
    training = {module: module.training for module in router.modules()}
    router.eval()
    try:
        with _other_values(router, block, number, arguments) as probe:
            for asker, said in _ask(router, experts, probe, logits_index, number):
                found = told_apart(asker, _fitting(router, said, probe), said.logits.shape[-1])
                if found:
                    ranking, bias, scale = _named(router, found)
                    return Rule(
                        host=dataclasses.replace(ranking, bias=None),
                        outputs=asker.outputs,
                        null_experts=said.null,
                        bias=bias,
                        scale=scale,
                    )
            raise UnknownRuleError("its router follows a rule that usmoe cannot express yet")
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
    """Random values in place of the vectors that have one value an expert (and some null experts), and of the matrices:
    a bias that is still zero, a factor that is still one, or weights that have not been loaded yet would not show what
    they do. All are put back."""
    generator = torch.Generator().manual_seed(1)
    probe = _Probe()
    kept: list[tuple[Any, str, Any]] = []
    for inside, module in router.named_modules():
        stores: tuple[Any, ...] = (module._parameters, module._buffers)
        for store in stores:
            for name, old in store.items():
                if old is None or old.device.type == "meta" or not old.is_floating_point():
                    continue
                vector = _one_an_expert(old, number)
                if not vector and (old.ndim != 2 or store is module._buffers):
                    continue
                drawn = torch.randn(old.shape, generator=generator)
                if vector:
                    drawn = 1 + 0.3 * drawn.abs() if bool((old > 0).all()) else 0.3 * drawn
                else:
                    drawn = drawn / old.shape[1] ** 0.5
                drawn = drawn.to(old)
                kept.append((store, name, old))
                store[name] = nn.Parameter(drawn, requires_grad=False) if isinstance(old, nn.Parameter) else drawn
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


def _one_an_expert(values: Tensor, number: int) -> bool:
    return values.is_floating_point() and number <= values.numel() <= number + 1 and values.shape[-1] == values.numel()


def _ask(
    router: nn.Module, experts: nn.Module, probe: _Probe, logits_index: int, number: int
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


Fit = tuple[Host, Source | None, Source | None]
"""A rule, and where its bias and its factors live."""


def _fitting(router: nn.Module, said: Answers, probe: _Probe) -> list[Fit]:
    """The rules that give these answers, the simplest first; of one way to weigh."""
    for weighing in _weighings(router):
        scores = weighing.weighing_scores(said.logits)
        for host, scale in _factors(router, weighing, scores, said, probe):
            fits = [
                (ranking, bias, scale)
                for ranking, bias in _rankings(router, host, said, probe)
                if chooses(ranking, said)
            ]
            if fits:
                return fits
    return []


def _weighings(router: nn.Module) -> Iterator[Host]:
    for score in HOST_SCORES:
        yield Host(score=score, alpha=0.0)
    numbers = {float(value) for value in vars(router).values() if type(value) is float and 0 < value < 1}
    for jitter in sorted(numbers):
        yield Host(score="sparse_mixer", jitter=jitter, alpha=0.0)


def _factors(
    router: nn.Module, weighing: Host, scores: Tensor, said: Answers, probe: _Probe
) -> Iterator[tuple[Host, Source | None]]:
    """The normalisation and the scaling under which these scores give the router's weights, if there are such."""
    k = said.indices.shape[1]
    chosen = scores.gather(1, said.indices)
    per_score = said.weights / chosen
    if said.null:  # a null expert is chosen with weight 0
        per_score = per_score.where(said.weights != 0, torch.nan)
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


def _rankings(router: nn.Module, host: Host, said: Answers, probe: _Probe) -> Iterator[tuple[Host, Source | None]]:
    """What may compete, the simplest first: the score or the logits, with each bias that there is, in groups."""
    for (source, values), rank in itertools.product([(None, None), *probe.vectors], ("score", "logits")):
        plain = dataclasses.replace(host, rank=rank, bias=None if values is None else values.double())
        if rank == "score" or values is not None:  # without a bias the order is the same
            yield plain, source
        for groups in _groups(router, said.logits.shape[-1]):
            yield dataclasses.replace(plain, groups=groups), source


def _groups(router: nn.Module, columns: int) -> Iterator[Groups]:
    """The groups that the numbers of a router allow."""
    numbers = sorted({value for value in vars(router).values() if type(value) is int})
    for number, kept in itertools.product(numbers, numbers):
        if 1 < number < columns and columns % number == 0 and 0 < kept < number:
            for by, outside in itertools.product(("best_two", "best"), (-torch.inf, 0.0)):
                yield Groups(number=number, kept=kept, by=by, outside=outside)


def chooses(host: Host, said: Answers) -> bool:
    """Whether the k best by these scores are those that the router chose; by value, since where scores tie (in bfloat16
    they do) which of the tied is taken is anybody's choice."""
    ranked = host.ranking_scores(said.logits)
    best = ranked.topk(said.indices.shape[1], -1).values
    if said.null:  # a null expert is handed on under another index: it is where the weight is 0
        theirs = ranked.gather(1, said.indices.where(said.weights != 0, ranked.shape[1] - 1))
    else:
        theirs = ranked.gather(1, said.indices)
    theirs = theirs.sort(-1, descending=True).values
    return bool((theirs > -torch.inf).all()) and _same(theirs, best, 1e-5 if said.tolerance < 1e-3 else 1e-2)


def told_apart(asker: Asker, fits: list[Fit], columns: int) -> list[Fit]:
    """Those of the rules that still fit where they disagree: a group limit may matter to one token of a thousand.

    Where they disagree is looked for among logits that nobody has to compute; the router is then asked about states
    that give such logits.
    """
    generator = torch.Generator().manual_seed(2)
    rows = max(1024, min(8192, 2**20 // columns))
    device = next((host.bias.device for host, _, _ in fits if host.bias is not None), torch.device("cpu"))
    for turn in range(8):
        if len(fits) < 2 or all(host.groups is None for host, _, _ in fits):
            break
        drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        drawn = drawn**3 / 3 if turn % 2 else drawn  # with a few experts far above the others of their group, too
        drawn = drawn * torch.logspace(-1, 0.5, rows, dtype=torch.float64)[:, None]
        disputed = _disputed(fits, drawn.to(device))
        if not len(disputed):
            if turn % 2:
                break
            continue
        said = asker.ask(_states(asker, disputed, generator))
        fits = [fit for fit in fits if chooses(fit[0], said)]
    return fits


def _named(router: nn.Module, fits: list[Fit]) -> Fit:
    """Of rules that choose alike, the one whose groups the router names: a limit that no choice of its own k ever meets
    is met by routes that give a token more."""
    named = [value for name, value in vars(router).items() if "group" in name and type(value) is int]
    limits = ((fit, fit[0].groups) for fit in fits)
    return next((fit for fit, groups in limits if groups and {groups.number, groups.kept} <= set(named)), fits[0])


def _disputed(fits: list[Fit], logits: Tensor) -> Tensor:
    """Up to 64 rows for each rule that chooses otherwise there than the first one."""
    k = fits[0][0].k or 1

    def chosen(host: Host) -> Tensor:
        return torch.zeros_like(logits, dtype=torch.bool).scatter(1, host.ranking_scores(logits).topk(k).indices, True)

    first = chosen(fits[0][0])
    found = [(chosen(host) != first).any(1).nonzero().squeeze(1)[:64] for host, _, _ in fits[1:]]
    return logits[torch.cat(found).unique()]


def _states(asker: Asker, logits: Tensor, generator: torch.Generator) -> Tensor:
    """States that give these logits, where a matrix makes logits of states; else random ones, many."""
    if asker.matrix is None:
        return torch.randn(4096, asker.width, generator=generator).to(logits.device)
    rest = asker.logits(torch.zeros(1, asker.width, device=logits.device))  # a bias of the logits
    matrix = asker.matrix[: logits.shape[1]].double()
    return torch.linalg.lstsq(matrix, (logits - rest).T).solution.T.to(torch.promote_types(asker.dtype, torch.float32))
