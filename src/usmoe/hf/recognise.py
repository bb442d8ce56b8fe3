"""What a pretrained model's router does, found out by asking it.

The router runs on random states, its correction bias and factors replaced by random ones for the moment; the rule
that gives the experts that it gives, with the weights that it gives, is its rule. So a rule is known by what it does,
not by the name of its class, and a family that is added to transformers tomorrow is read as the others are.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from usmoe.hf.ask import (
    Answers,
    Asker,
    FixedRouteError,
    Probe,
    UnknownRuleError,
    arguments_of,
    asked,
    is_replaced,
    other_values,
)
from usmoe.hf.rule import Rule, Source
from usmoe.hf.same_router import fingerprint
from usmoe.hf.turns import one_at_a_time
from usmoe.hf.view import views_of
from usmoe.routing.host import Groups, Host
from usmoe.routing.scores import HOST_SCORES

Fit = tuple[Host, Source | None, Source | None]
"""A rule, and where its bias and its factors live."""

_KNOWN: dict[Hashable, Rule] = {}
"""Rules that were found, by what they depend on: asking a router of 64 experts takes half a second a layer."""
_LIMIT = 1024


@one_at_a_time
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
    arguments = arguments_of(router, block)
    values = fingerprint(router, block, experts, partial(is_replaced, number=number))
    key = None if values is None else (logits_index, torch.get_default_dtype(), values)
    if key in _KNOWN:
        return _KNOWN[key]
    rule = _asked_rule(router, block, experts, logits_index, number, arguments)
    if key is not None:
        while len(_KNOWN) >= _LIMIT:
            _KNOWN.pop(next(iter(_KNOWN)))
        _KNOWN[key] = rule
    return rule


def _asked_rule(
    router: nn.Module,
    block: nn.Module,
    experts: nn.Module,
    logits_index: int,
    number: int,
    arguments: dict[str, Source],
) -> Rule:
    # whoever else uses the model meanwhile finds its values and its mode as they are
    block, router, experts = views_of(block, router, experts)
    router.eval()
    with other_values(router, block, number, arguments) as probe:
        for asker, said in asked(router, experts, probe, logits_index, number):
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


def _fitting(router: nn.Module, said: Answers, probe: Probe) -> list[Fit]:
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
    router: nn.Module, weighing: Host, scores: Tensor, said: Answers, probe: Probe
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


def _rankings(router: nn.Module, host: Host, said: Answers, probe: Probe) -> Iterator[tuple[Host, Source | None]]:
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
