"""The linear program at any magnitude: scores from 5e-324 to 1e300, masked by large numbers, with outliers, with ties.

The oracle adds exactly: every score is a fraction, and all masks are compared (T*E <= 12). Larger programs are compared
with what must have the same optimum: -inf for what is masked, another unit, a smaller outlier.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

import usmoe
from linear_programs import ADVERSARIAL, Program, normal, plant, routed, uniform
from usmoe.lp import solve

SIZES = (5e-324, 1e-320, 1e-310, 1e-300, 1e-30, 1e-9, 1.0, 1e9, 1e20, 1e30, 3e38, 1e300)
MASKS = (-1e9, -1e30, torch.finfo(torch.float32).min, -1e300)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Draw = tuple[random.Random, torch.Generator, int, int]


def one_size(draw: Draw) -> Tensor:
    choose, torch_random, T, E = draw
    return choose.choice(SIZES) * normal(torch_random, T, E)


def mixed_sizes(draw: Draw) -> Tensor:
    choose, torch_random, T, E = draw
    sizes = torch.tensor([choose.choice(SIZES) for _ in range(T * E)], dtype=torch.float64)
    return sizes.view(T, E) * normal(torch_random, T, E)


def masked(draw: Draw) -> Tensor:
    choose, torch_random, T, E = draw
    scores = choose.choice([1.0, 1e-5, 1e-310]) * normal(torch_random, T, E)
    return scores.masked_fill(uniform(torch_random, T, E) < choose.choice([0.3, 0.7]), choose.choice(MASKS))


def an_outlier(draw: Draw) -> Tensor:
    choose, torch_random, T, E = draw
    scores = normal(torch_random, T, E)
    scores[choose.randrange(T), choose.randrange(E)] = choose.choice([1, -1]) * choose.choice([1e9, 1e20, 1e300])
    return scores


def an_offset(draw: Draw) -> Tensor:
    choose, torch_random, T, E = draw
    return normal(torch_random, T, E) + choose.choice([1e6, 1e12, -1e15])


def ties(draw: Draw) -> Tensor:
    choose, torch_random, T, E = draw
    return normal(torch_random, T, E).round() * choose.choice([1, 1e-320, 1e20])


def zeros(draw: Draw) -> Tensor:
    _, torch_random, T, E = draw
    return torch.where(uniform(torch_random, T, E) < 0.5, 0.0, -0.0).double()


KINDS: tuple[Callable[[Draw], Tensor], ...] = (one_size, mixed_sizes, masked, an_outlier, an_offset, ties, zeros)


def drawn(kind: Callable[[Draw], Tensor], seed: int) -> Program:
    """A feasible program of 12 pairs at most, with bounds on both sides, on one or open, a budget or none, some pairs
    of -inf, in any float dtype."""
    choose, torch_random = random.Random(seed), torch.Generator().manual_seed(seed)
    T = choose.randint(1, 6)
    E = choose.randint(1, 12 // T)
    scores = kind((choose, torch_random, T, E))
    if choose.random() < 0.3:
        scores = scores.to(choose.choice(DTYPES))
        scores = scores.where(scores.isfinite(), 0.0)
    mask, program = plant(torch_random, scores, choose.choice([0, 1, 2]))
    live = mask | (uniform(torch_random, T, E) < choose.choice([1.0, 0.6]))
    budget = program.budget if choose.random() < 0.7 else None
    free = choose.choice([{}, {}, {}, {"per_token": None}, {"per_expert": None}])
    return program._replace(scores=scores.masked_fill(~live, -torch.inf), budget=budget, **free)


def fractions(scores: Tensor) -> list[Fraction]:
    """The scores exactly; 0 for -inf."""
    return [Fraction(value) if np.isfinite(value) else Fraction(0) for value in scores.double().flatten().tolist()]


def exact_optimum(program: Program) -> Fraction:
    """The highest sum of all masks within the bounds, without rounding."""
    scores = fractions(program.scores)
    one = max(value.denominator for value in scores)
    whole = np.array([int(value * one) for value in scores], dtype=object)
    words = np.arange(2 ** len(scores))[:, None] >> np.arange(len(scores)) & 1
    masks = torch.from_numpy(words).bool().view(-1, *program.scores.shape)
    return max(Fraction(sum(whole[mask.flatten().numpy()]), one) for mask in masks[program.allow(masks)])


@pytest.mark.parametrize("kind", KINDS)
def test_an_exact_optimum_at_any_magnitude(kind: Callable[[Draw], Tensor]):
    both = 0
    for seed in range(60):
        program = drawn(kind, seed)
        scores, budget, per_token, per_expert = program
        found = solve(scores, budget=budget, per_token=per_token, per_expert=per_expert)
        assert program.allow(found.mask), seed
        chosen = [value for value, held in zip(fractions(scores), found.mask.flatten().tolist(), strict=True) if held]
        assert sum(chosen, Fraction(0)) == exact_optimum(program), seed
        size = float(sum(map(abs, chosen), Fraction(0)))
        assert 0 <= found.upper_bound - found.value <= 1e-11 * size, seed
        both += per_token is not None and per_expert is not None
    assert both > 20


def chosen(program: Program) -> Tensor:
    """The mask, proved best by its own certificate."""
    scores, budget, per_token, per_expert = program
    found = solve(scores, budget=budget, per_token=per_token, per_expert=per_expert)
    assert 0 <= found.upper_bound - found.value <= 1e-11 * float(scores[found.mask].double().abs().sum())
    return found.mask


def hidden(T: int, E: int, share: float) -> tuple[Tensor, Tensor]:
    """Scores, and which pairs are masked."""
    torch_random = torch.Generator().manual_seed(T)
    return normal(torch_random, T, E), uniform(torch_random, T, E) < share


@pytest.mark.parametrize("low", MASKS)
@pytest.mark.parametrize(("T", "E", "share"), [(32, 6, 0.4), (256, 32, 0.5), (128, 16, 0.7)])
def test_a_masked_pair_may_hold_a_large_number_in_place_of_minus_infinity(low: float, T: int, E: int, share: float):
    scores, away = hidden(T, E, share)
    assert chosen(routed(scores.masked_fill(away, low))).equal(chosen(routed(scores.masked_fill(away, -torch.inf))))


@pytest.mark.parametrize("low", MASKS)
@pytest.mark.parametrize("both", [True, False])
def test_a_masked_pair_that_the_bounds_ask_for_is_chosen_as_rarely_as_can_be(low: float, both: bool):
    """Eight of ten pairs are masked and two a token are asked for; what is not masked is chosen as if a mask were a
    little below all others."""
    scores, away = hidden(128, 16, 0.9)
    sides = {} if both else {"per_expert": None}
    near, far = (routed(scores.masked_fill(away, value))._replace(**sides) for value in (-1000.0, low))
    one, other = chosen(near), chosen(far)
    assert (one & away).sum() == (other & away).sum() > 0
    assert (one & ~away).equal(other & ~away)


@pytest.mark.parametrize("high", [1e9, 1e20, 1e300])
def test_one_large_score_costs_the_others_no_digits(high: float):
    scores = hidden(128, 16, 0.0)[0]
    one, other = scores.clone(), scores.clone()
    one[5, 3], other[5, 3] = 1000.0, high
    assert chosen(routed(one)).equal(chosen(routed(other)))


@pytest.mark.parametrize("exponent", range(40, 56))
def test_a_unit_that_rounds_the_others_is_not_the_last_word(exponent: int):
    """Beside a score of 2^exponent the first unit is about the size of the others: what it settles must be settled."""
    scores = 8 * uniform(torch.Generator().manual_seed(exponent), 32, 6)
    one, other = scores.clone(), scores.clone()
    one[5, 3], other[5, 3] = 1000.0, 2.0**exponent
    assert chosen(routed(one)).equal(chosen(routed(other)))
    one[5, 3], other[5, 3] = -1000.0, -(2.0**exponent)
    assert chosen(routed(one)).equal(chosen(routed(other)))


@pytest.mark.parametrize("exponent", [-1020, -1060, 900])
def test_the_unit_of_the_scores_changes_nothing(exponent: int):
    coarse = hidden(128, 16, 0.0)[0].bfloat16().double()  # few bits, so that none is lost among the smallest numbers
    small = torch.from_numpy(np.ldexp(coarse.numpy(), exponent))
    assert chosen(routed(coarse)).equal(chosen(routed(small)))


def test_near_ties_are_told_apart():
    """Differences of one part in 1e15 decide, where nothing else does."""
    scores = 1 + torch.finfo(torch.float64).eps * ADVERSARIAL["0, 1 or 2"](64, 8, 3).scores
    apart = (scores - 1) / torch.finfo(torch.float64).eps
    near, far = (chosen(routed(values)) for values in (scores, apart))
    assert apart[near].sum() == apart[far].sum() > apart.mean() * near.sum()


def test_a_program_of_all_magnitudes_ends_soon():
    """Hundreds of decimal orders in one program: at most some dozen units."""
    torch_random = torch.Generator().manual_seed(0)
    scores = normal(torch_random, 96, 16) * torch.exp(200 * normal(torch_random, 96, 16)).clamp(1e-320, 1e300)
    chosen(routed(scores))


LOGITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "float32's lowest": lambda logits, away: logits.masked_fill(away, torch.finfo(torch.float32).min),
    "-1e9": lambda logits, away: logits.masked_fill(away, -1e9),
    "bfloat16's lowest": lambda logits, away: logits.bfloat16().masked_fill(away, torch.finfo(torch.bfloat16).min),
    "scores that are denormal": lambda logits, away: (
        logits - 300 * away
    ),  # exp(-300) in float32 is 0, in float64 is not
}


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("fields", [{}, {"alpha": 1.0}, {"alpha": 1.0, "expert_score": "identity"}], ids=str)
def test_bounded_choice_of_masked_logits_leaves_them_alone(name: str, fields: dict):
    """A router meets masks as logits: two experts of eight are masked for each token, others than they would be."""
    logits, _ = hidden(64, 8, 0.0)
    away = (torch.arange(64)[:, None] + torch.arange(8)) % 8 < 2
    given = LOGITS[name](logits.float(), away)
    router = usmoe.BoundedChoice(k=2, per_token=(1, 4), per_expert=(0.5, 1.25), **fields)
    mask = usmoe.route(given[None], router).mask()
    never = usmoe.route(given.masked_fill(away, -torch.inf)[None], router).mask()
    assert not (mask & away).any()
    assert mask.equal(never)


def test_bounded_choice_of_scores_that_are_all_denormal():
    """The logits themselves, of 1e-311 and less."""
    logits = hidden(64, 8, 0.0)[0].bfloat16().double()[None]
    router = usmoe.BoundedChoice(k=2, alpha=1.0, expert_score="identity", per_token=(1, 4), per_expert=(0.5, 1.25))
    small = usmoe.route(logits * 2.0**-500 * 2.0**-535, router)
    assert 0 < small.weight.abs().max() < 1e-310
    assert small.mask().equal(usmoe.route(logits, router).mask())


def test_a_layer_learns_beside_masked_experts():
    """Experts that a gate masks by the lowest number of its dtype get no token, and nothing becomes NaN."""

    class Masked(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).masked_fill(torch.arange(8) >= 6, torch.finfo(torch.float32).min)

    torch.manual_seed(0)
    router = usmoe.BoundedChoice(k=2, per_token=(1, 4), per_expert=(0, 2))
    moe = usmoe.MoE(16, 32, 8, router, gate=Masked(16, 8, bias=False))
    for _ in range(3):
        y, out = moe(torch.randn(2, 24, 16))
        y.square().mean().backward()
        assert out.routing.load[6:].sum() == 0
        assert len(out.routing.token) == 96
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in moe.parameters())


@pytest.fixture(autouse=True)
def ends():
    """A program that does not end is a failure, not a wait."""

    def stop(*_: object) -> None:
        raise TimeoutError("A linear program did not end within two minutes.")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
