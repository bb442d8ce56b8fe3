"""Oracles: routing and layers as nested loops over Python numbers, written from the paper and from the rules alone.

The loops use + - * / and exp only, so that they run over floats (values) and over scalar tensors (gradients, by plain
autograd). Nothing here calls usmoe: of a router, only the fields are read.

    logits[b][l][e]     nested lists; the flat index of token l of sequence b is t = b*L + l
    Answer              {(token, expert): weight}, and the pools that competed
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.optimize import linprog
from torch import Tensor

INF = math.inf
Number = Any  # a float, or a scalar tensor that remembers its gradient
Row = list[Number]


@dataclass
class Answer:
    weight: dict[tuple[int, int], Number]
    """Weight of each chosen (token, expert)."""
    pools: list[list[int]] = field(default_factory=list)
    """Tokens of each pool that competed."""

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Chosen (token, expert), by expert, then by token."""
        return sorted(self.weight, key=lambda pair: (pair[1], pair[0]))


# ---- scores: logits of one row (or column) -> numbers. A logit of -inf scores 0.


def exp(x: Number) -> Number:
    return x.exp() if isinstance(x, Tensor) else math.exp(x)


def add(xs: Row) -> Number:
    """A sum; exact over floats, so that equal multisets have equal sums."""
    return sum(xs) if any(isinstance(x, Tensor) for x in xs) else math.fsum(xs)


def value(x: Number) -> float:
    return x.item() if isinstance(x, Tensor) else float(x)


def finite(x: Number) -> bool:
    return value(x) > -INF


def softmax(xs: Row) -> Row:
    live = [x for x in xs if finite(x)]
    if not live:
        return [0.0 for _ in xs]
    most = max(value(x) for x in live)
    total = add([exp(x - most) for x in live])
    return [exp(x - most) / total if finite(x) else 0.0 for x in xs]


def sigmoid(x: Number) -> Number:
    if not finite(x):
        return 0.0
    return 1 / (1 + exp(-x)) if value(x) >= 0 else exp(x) / (1 + exp(x))


def token_scores(logits: list[Row], kind: str) -> list[Row]:
    """softmax | sigmoid, each token by itself."""
    return [softmax(row) if kind == "softmax" else [sigmoid(x) for x in row] for row in logits]


def expert_scores(logits: list[Row], kind: str, pools: list[list[int]]) -> list[Row]:
    """scaled_sigmoid (2*sigmoid/E) | sigmoid | identity | softmax_tokens (over a pool) | softmax_experts (a row)."""
    experts = len(logits[0]) if logits else 0
    if kind == "softmax_experts":
        return token_scores(logits, "softmax")
    if kind == "softmax_tokens":
        scores: list[Row] = [[0.0] * experts for _ in logits]
        for pool in pools:
            for e in range(experts):
                for t, score in zip(pool, softmax([logits[t][e] for t in pool]), strict=True):
                    scores[t][e] = score
        return scores
    if kind == "identity":
        return [[x if finite(x) else 0.0 for x in row] for row in logits]
    factor = 2 / experts if kind == "scaled_sigmoid" else 1.0
    return [[factor * sigmoid(x) for x in row] for row in logits]


# ---- who competes


def pools_of(kind: str, competes: list[list[bool]], segments: list[list[int]] | None = None) -> list[list[int]]:
    """The tokens of each pool, in order: sequence (or prefix: online) | batch | time_step | token, threshold. A segment
    of a sequence is a world of its own."""
    pools: dict[tuple, list[int]] = {}
    length = len(competes[0]) if competes else 0
    for b, row in enumerate(competes):
        for step, there in enumerate(row):
            if there:
                key = {"sequence": (b,), "prefix": (b,), "batch": (), "time_step": (step,)}.get(kind, (b, step))
                if segments is not None:
                    key = (*key, "packed", b, segments[b][step])
                pools.setdefault(key, []).append(b * length + step)
    return list(pools.values())


def budget(k: float, tokens: int) -> int:
    """floor(k*S + 0.5)."""
    return math.floor(k * tokens + 0.5)


def best(scored: list[tuple[Number, int]], n: int) -> list[int]:
    """The indices of the n highest scores; of equal scores the lower index."""
    return [index for _, index in sorted(((value(s), i) for s, i in scored), key=lambda p: (-p[0], p[1]))[:n]]


# ---- the routers


def route(router: Any, logits: list, valid: list | None = None, segments: list | None = None, host: Any = None):
    """The Answer of a router, by its fields; `host` has k, score, normalize, scale, bias, alpha."""
    grid = [[True] * len(row) for row in logits]
    real = grid if valid is None or getattr(router, "mask_padding", True) is False else valid
    flat = [row for sequence in logits for row in sequence]
    there = [here for row in real for here in row]
    flat = [row if here else [0.0] * len(row) for row, here in zip(flat, there, strict=True)]
    rule = {"token_choice": _token_choice, "own_choice": _token_choice, "expert_choice": _expert_choice}
    rule |= {"bounded_choice": _bounded_choice, "relu_choice": _relu_choice}
    return rule.get(router.name, _usmoe)(router, flat, there, real, segments, host)


def remembers(router: Any) -> bool:
    """Whether the order of a sequence's tokens matters: what one token takes, later ones compete with or go without."""
    return getattr(router, "pool", "") == "prefix" or getattr(router, "burst", None) is not None


def experts_a_token(router: Any, host: Any = None) -> float | None:
    """k as a number: the host's where it is None, a share of the host's where it is text; None without either."""
    if router.k is None and host is None:
        return None
    if router.k is None:
        return host.k
    return host.k * float(router.k[:-1]) if isinstance(router.k, str) else router.k


def _token_choice(router: Any, flat: list[Row], there: list[bool], real: list, segments: Any, host: Any) -> Answer:
    k = round(experts_a_token(router, host))
    kind = getattr(router, "score", None) or (host.score if host else "softmax")
    normalize = getattr(router, "normalize", None) or (host.normalize if host else "none")
    late = getattr(router, "score_order", "") == "topk_then_score"
    bias = _bias(host if getattr(router, "score", None) is None else None, flat)
    weight: dict[tuple[int, int], Number] = {}
    for t, row in enumerate(flat):
        if not there[t]:
            continue
        scores = token_scores([row], kind)[0]
        ranked = row if late else [s + b for s, b in zip(scores, bias, strict=True)]
        chosen = best([(ranked[e], e) for e in range(len(row)) if finite(row[e])], k)
        if late:  # the score sees the chosen logits alone
            scores = token_scores([[x if e in chosen else -INF for e, x in enumerate(row)]], kind)[0]
        _weigh(weight, t, scores, chosen, normalize, host)
    return Answer(weight, [[t] for t, here in enumerate(there) if here])


def _expert_choice(router: Any, flat: list[Row], there: list[bool], real: list, segments: Any, host: Any) -> Answer:
    pools = pools_of(router.pool, real, segments)
    scores = expert_scores(flat, router.score, pools)
    experts = len(flat[0]) if flat else 0
    weight: dict[tuple[int, int], Number] = {}
    for pool in pools:
        for e in range(experts):
            able = [(scores[t][e], t) for t in pool if finite(flat[t][e])]
            if router.pool == "threshold":
                chosen = [t for score, t in able if value(score) >= router.threshold[e]]
            else:
                chosen = best(able, max(1, math.floor(experts_a_token(router, host) * len(pool) / experts + 0.5)))
            for t in chosen:
                weight[t, e] = scores[t][e]
    return Answer(weight, pools)


def _relu_choice(router: Any, flat: list[Row], there: list[bool], real: list, segments: Any, host: Any) -> Answer:
    tokens = [t for t, here in enumerate(there) if here]
    scale = host.scale if host else 1.0
    weight = {(t, e): x * scale for t in tokens for e, x in enumerate(flat[t]) if value(x) > 0}
    return Answer(weight, [[t] for t in tokens])


def _usmoe(router: Any, flat: list[Row], there: list[bool], real: list, segments: Any, host: Any) -> Answer:
    pools = pools_of(router.pool, real, segments)
    unified, ranked = _unified(router, flat, pools, host)
    experts = len(flat[0]) if flat else 0
    able = [(ranked[t][e], t * experts + e) for t, row in enumerate(flat) for e in range(experts) if finite(row[e])]
    chosen: list[int] = []
    for pool in pools:
        mine = [(score, index) for score, index in able if index // experts in pool]
        if router.pool == "threshold":
            tau = router.threshold if isinstance(router.threshold, tuple) else [router.threshold] * experts
            chosen += [index for score, index in mine if value(score) >= tau[index % experts]]
        elif router.pool == "prefix":
            chosen += _online(mine, pool, experts, experts_a_token(router, host))
        else:
            chosen += best(mine, budget(experts_a_token(router, host), len(pool)))
    if router.min_experts or router.burst is not None:
        streams = pools_of("sequence", real, segments)
        if isinstance(router.threshold, tuple):  # what counts is how far a pair lies above its expert's threshold
            able = [(score - router.threshold[index % experts], index) for score, index in able]
        chosen = [i for pool in streams for i in _floor_and_bucket(router, able, chosen, pool, experts, host)]
    return _weighed(router, unified, chosen, pools, host)


def _unified(router: Any, flat: list[Row], pools: list[list[int]], host: Any) -> tuple[list[Row], list[Row]]:
    """The unified scores that weigh, and those that rank."""
    alpha = router.alpha if router.alpha is not None else (host.alpha if host else 0.5)
    kind = router.token_score or (host.score if host else "softmax")
    bias = _bias(host if router.token_score is None else None, flat)
    of_tokens, of_experts = token_scores(flat, kind), expert_scores(flat, router.expert_score, pools)
    unified = [
        [(1 - alpha) * a + alpha * b for a, b in zip(*rows, strict=True)]
        for rows in zip(of_tokens, of_experts, strict=True)
    ]
    ranked = [[score + (1 - alpha) * b for score, b in zip(row, bias, strict=True)] for row in unified]
    return unified, ranked


def _weighed(router: Any, unified: list[Row], chosen: list[int], pools: list[list[int]], host: Any) -> Answer:
    experts = len(unified[0]) if unified else 0
    weight: dict[tuple[int, int], Number] = {}
    for t in [t for pool in pools for t in pool]:
        own = [index % experts for index in chosen if index // experts == t]
        _weigh(weight, t, unified[t], own, router.normalize or (host.normalize if host else "none"), host)
    return Answer(weight, pools)


def _bounded_choice(router: Any, flat: list[Row], there: list[bool], real: list, segments: Any, host: Any) -> Answer:
    """-inf is worth so little that it is taken where nothing else will do, and then left out."""
    pools = pools_of(router.pool, real, segments)
    unified, ranked = _unified(router, flat, pools, host)
    experts = len(flat[0]) if flat else 0
    k = experts_a_token(router, host)
    chosen: list[int] = []
    for pool in pools:
        live = [[finite(x) for x in flat[t]] for t in pool]
        low, high = router.per_token or (0, experts)
        few, many = router.per_expert or (0, INF)
        share = k * len(pool) / experts
        of_tokens = [(min(low, sum(row)), min(high, experts)) for row in live]
        of_experts = [
            (
                min(math.floor(few * share + 1e-9), sum(column)),
                len(pool) if many == INF else min(len(pool), math.ceil(many * share - 1e-9)),
            )
            for column in zip(*live, strict=True)
        ]
        scores = [[value(ranked[t][e]) if live[i][e] else -1e3 for e in range(experts)] for i, t in enumerate(pool)]
        n = min(budget(k, len(pool)), sum(map(sum, live)))
        if router.per_expert is None:
            taken = _best_within(scores, of_tokens, n, across=False)
        elif router.per_token is None:
            taken = _best_within(scores, of_experts, n, across=True)
        else:
            taken = _by_linear_program(scores, of_tokens, of_experts, n)
        chosen += [pool[i] * experts + e for i, e in taken if live[i][e]]
    return _weighed(router, unified, chosen, pools, host)


def _best_within(scores: list[Row], bounds: list[tuple[int, int]], n: int, across: bool) -> list[tuple[int, int]]:
    """Each row (across: each column) its floor first, then the best of all that their caps allow."""
    experts = len(scores[0])
    forced, optional = [], []
    for line, (low, high) in enumerate(bounds):
        own = [i * experts + e for i in range(len(scores)) for e in range(experts) if line == (e if across else i)]
        order = best([(scores[index // experts][index % experts], index) for index in own], len(own))
        forced += order[:low]
        optional += order[low:high]
    rest = best([(scores[index // experts][index % experts], index) for index in optional], n - len(forced))
    return [divmod(index, experts) for index in forced + rest]


def _by_linear_program(
    scores: list[Row], of_tokens: list[tuple[int, int]], of_experts: list[tuple[int, int]], n: int
) -> list[tuple[int, int]]:
    """By scipy's HiGHS; its vertices are whole, and one of a kind where no two selections tie."""
    tokens, experts = len(scores), len(scores[0])
    pairs = range(tokens * experts)
    lines = [[float(p // experts == t) for p in pairs] for t in range(tokens)]
    lines += [[float(p % experts == e) for p in pairs] for e in range(experts)]
    bounds = of_tokens + of_experts
    found = linprog(
        [-score for row in scores for score in row],
        A_ub=lines + [[-x for x in line] for line in lines],
        b_ub=[high for _, high in bounds] + [-low for low, _ in bounds],
        A_eq=[[1.0] * len(pairs)],
        b_eq=[n],
        bounds=(0, 1),
    )
    assert found.success, found.message
    return [divmod(p, experts) for p in pairs if found.x[p] > 0.5]


def _online(able: list[tuple[Number, int]], pool: list[int], experts: int, k: float) -> list[int]:
    """Token after token: those of its pairs that are among the floor(k*t + 0.5) best of tokens 1 ... t."""
    chosen: list[int] = []
    for t, token in enumerate(pool, 1):
        so_far = [(score, index) for score, index in able if index // experts <= token]
        chosen += [index for index in best(so_far, budget(k, t)) if index // experts == token]
    return chosen


def _floor_and_bucket(
    router: Any, able: list[tuple[Number, int]], chosen: list[int], pool: list[int], experts: int, host: Any
) -> list[int]:
    """Token after token: min_experts at least, and in all no more than k*t + burst."""
    spent: list[int] = []
    for t, token in enumerate(pool, 1):
        own = [(score, index) for score, index in able if index // experts == token]
        wants = max(sum(index // experts == token for index in chosen), min(router.min_experts, len(own)))
        while (
            router.burst is not None and wants and len(spent) + wants > experts_a_token(router, host) * t + router.burst
        ):
            wants -= 1
        spent += best(own, wants)
    return spent


def _bias(host: Any, flat: list[Row]) -> Row:
    if host is None or host.bias is None:
        return [0.0] * (len(flat[0]) if flat else 0)
    return host.bias.tolist()


def _weigh(weight: dict, t: int, scores: Row, chosen: list[int], normalize: str, host: Any) -> None:
    """none: the score; all: over the sum of the token's scores; chosen: over the sum of its chosen scores."""
    over = {"none": [1.0], "all": scores, "chosen": [scores[e] for e in chosen]}[normalize]
    total = add(over)
    for e in chosen:
        weight[t, e] = scores[e] / total * (host.scale if host else 1.0)


# ---- the layers, in plain autograd, a pair at a time


def expert(x: Tensor, moe: Any, e: int) -> Tensor:
    """One expert of one token: x (D) -> (D)."""
    hidden = moe.up[e] @ x + (0 if moe.up_bias is None else moe.up_bias[e])
    if moe.activation == "swiglu":
        gate, value = hidden[: len(hidden) // 2], hidden[len(hidden) // 2 :]
        hidden = gate * torch.sigmoid(gate) * value
    else:
        hidden = hidden.clamp(min=0)
    return moe.down[e] @ hidden + (0 if moe.down_bias is None else moe.down_bias[e])


def moe(x: Tensor, layer: Any, answer: Answer) -> Tensor:
    """y_t = the sum over the pairs (t, e) of weight * expert_e(x_t); 0 for a token without a pair. x (T, D)."""
    rows = [torch.zeros_like(x[t]) for t in range(len(x))]
    for (t, e), weight in answer.weight.items():
        rows[t] = rows[t] + weight * expert(x[t], layer, e)
    return torch.stack(rows)


def soft_moe(x: Tensor, layer: Any, real: list[bool]) -> Tensor:
    """One sequence x (L, D): every slot a mean of the tokens, every token a mean of the slots (arXiv 2308.00951)."""
    tokens = [t for t in range(len(x)) if real[t]]
    slots = list(layer.slots)
    seen = {t: x[t] for t in tokens}
    if layer.scale is not None:
        seen = {t: x[t] / x[t].norm() for t in tokens}
        slots = [slot / slot.norm() * layer.scale for slot in slots]
    logit = {(t, s): (seen[t] * slot).sum() for t in tokens for s, slot in enumerate(slots)}
    out = []
    for s in range(len(slots)):
        into = softmax([logit[t, s] for t in tokens])
        mean = sum((w * x[t] for w, t in zip(into, tokens, strict=True)), torch.zeros_like(x[0]))
        out.append(expert(mean, layer, s // layer.slots_per_expert))
    rows = [torch.zeros_like(x[t]) for t in range(len(x))]
    for t in tokens:
        for weight, y in zip(softmax([logit[t, s] for s in range(len(slots))]), out, strict=True):
            rows[t] = rows[t] + weight * y
    return torch.stack(rows)
