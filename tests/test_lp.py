"""The linear program of routing: `usmoe.lp.solve` by hand, against all masks, against HiGHS, and where it must refuse.

S, T=4, E=3     e0  e1  e2
t0               9   8   1
t1               7   5   2
t2               6   4   3
t3              -1  -3  -5
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from every_router import laws
from linear_programs import ADVERSARIAL, Program, by_brute_force, by_highs, feasible, normal, plant, routed, total, wild
from usmoe.lp import Solution, solve

S = torch.tensor([[9, 8, 1], [7, 5, 2], [6, 4, 3], [-1, -3, -5]], dtype=torch.float64)
GAP = 1e-3  # what bounds on both sides may leave open, as a share of max(|value|, pairs * (max S - min S))

every_family = pytest.mark.parametrize("family", ADVERSARIAL)
many = settings(laws, max_examples=60)


def solved(program: Program) -> Solution:
    """The solution, held to what solve() promises of every one."""
    S, budget, per_token, per_expert = program
    solution = solve(S, budget=budget, per_token=per_token, per_expert=per_expert)
    mask, value, bound = solution.mask, solution.value, solution.upper_bound
    assert (mask.dtype, mask.shape) == (torch.bool, S.shape)
    assert program.allow(mask)
    assert (type(value), type(bound)) == (float, float)
    assert value == pytest.approx(total(S, mask), rel=0, abs=1e-14 * float(program.live.abs().sum()))
    if per_token is None or per_expert is None:
        assert value == bound
    assert 0 <= bound - value <= GAP * max(abs(value), int(mask.sum()) * program.spread())
    return solution


def assert_holds_the_optimum(program: Program) -> None:
    """The optimum, as HiGHS finds it, lies between the value and its bound."""
    solution, best, rounding = solved(program), by_highs(*program), program.rounding()
    assert solution.value - rounding <= best <= solution.upper_bound + rounding


tiny = st.integers(1, 12).flatmap(lambda T: st.tuples(st.just(T), st.integers(1, 12 // T)))
small = st.tuples(st.integers(1, 64), st.integers(1, 16))


# ---- by hand

T3 = torch.tensor([0, 0, 0, 1])
BY_HAND: list[tuple[dict[str, Any], set[int]]] = [
    ({"budget": 4}, {9, 8, 7, 6}),
    ({"budget": 0}, set()),
    ({}, {9, 8, 1, 7, 5, 2, 6, 4, 3}),  # any number: what scores above 0
    ({"budget": 11}, {9, 8, 1, 7, 5, 2, 6, 4, 3, -1, -3}),
    ({"budget": 4, "per_token": (1, 1)}, {9, 7, 6, -1}),  # token choice: a maximum in each row
    ({"budget": 5, "per_token": (1, 2)}, {9, 7, 6, -1, 8}),  # the floors, then the best of the rest
    ({"budget": 2, "per_token": (0, 1)}, {9, 7}),
    ({"per_token": (2, None)}, {9, 8, 1, 7, 5, 2, 6, 4, 3, -1, -3}),  # t3 takes no more than it must
    ({"budget": 3, "per_expert": (1, 1)}, {9, 8, 3}),  # expert choice: a maximum in each column
    ({"budget": 4, "per_expert": (0, 2)}, {9, 7, 8, 5}),  # e0 is full before the 6
    ({"budget": 4, "per_expert": (1, 2)}, {9, 8, 3, 7}),
    ({"budget": 5, "per_token": (T3, torch.tensor([1, 1, 3, 1]))}, {9, 7, 6, 4, -1}),
    ({"budget": 3, "per_expert": (torch.tensor([0, 1, 2]), None)}, {8, 3, 2}),
    ({"budget": 3, "per_token": (0, 1), "per_expert": (0, 1)}, {8, 7, 3}),  # 18; the best pair first would end at 17
    ({"budget": 4, "per_token": (1, 1), "per_expert": (1, 2)}, {8, 7, 3, -1}),  # two of four leave e0, at 1 + 3
    ({"budget": 1, "per_token": (T3, T3), "per_expert": (0, torch.tensor([0, 0, 1]))}, {-5}),  # one mask is feasible
]


@pytest.mark.parametrize(("asked", "chosen"), BY_HAND, ids=str)
def test_by_hand(asked: dict[str, Any], chosen: set[int]):
    solution = solve(S, **asked)
    assert set(S[solution.mask].tolist()) == chosen
    assert solution.value == sum(chosen) == pytest.approx(solution.upper_bound, rel=GAP)


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        ({"budget": 3}, [(0, 0), (0, 1), (0, 2)]),
        ({"budget": 2, "per_token": (0, 1)}, [(0, 0), (1, 0)]),
        ({"budget": 3, "per_token": (1, 2)}, [(0, 0), (0, 1), (1, 0)]),
        ({"budget": 3, "per_expert": (1, None)}, [(0, 0), (0, 1), (0, 2)]),
        ({"budget": 2, "per_expert": (0, torch.tensor([0, 2, 1]))}, [(0, 1), (0, 2)]),
    ],
    ids=str,
)
def test_ties_go_to_the_lower_flat_index(asked: dict[str, Any], chosen: list[tuple[int, int]]):
    assert [tuple(pair) for pair in solve(torch.ones(2, 3), **asked).mask.nonzero().tolist()] == chosen


@given(program=feasible(tiny))
@many
def test_the_oracles_agree(program: Program):
    assert by_highs(*program) == pytest.approx(by_brute_force(*program)[0], abs=1e-9)


@given(program=feasible(tiny, both=(False,)))
@many
def test_exact_and_first_of_ties_with_bounds_on_one_side(program: Program):
    best = by_brute_force(*program)
    solution = solved(program)
    assert solution.value == pytest.approx(best[0], abs=1e-12)
    assert solution.mask.tolist() == best[1].tolist()


@given(program=feasible(small))
@many
def test_holds_the_optimum_of_random_programs(program: Program):
    assert_holds_the_optimum(program)


@given(program=feasible(tiny, both=(True,)))
@settings(laws, max_examples=300)
def test_holds_the_optimum_of_tiny_programs(program: Program):
    assert_holds_the_optimum(program)


@every_family
@pytest.mark.parametrize(("T", "E"), [(8, 2), (24, 6), (61, 7), (64, 16), (256, 32)])
def test_holds_the_optimum_of_adversarial_programs(family: str, T: int, E: int):
    assert_holds_the_optimum(ADVERSARIAL[family](T, E, T))


@every_family
@pytest.mark.parametrize("free", ["per_token", "per_expert"])
def test_exact_on_adversarial_programs_with_one_side_free(family: str, free: str):
    assert_holds_the_optimum(ADVERSARIAL[family](61, 7, 1)._replace(**{free: None}))


@pytest.mark.slow
@every_family
def test_certifies_large_adversarial_programs(family: str):
    check = assert_holds_the_optimum if family == "default" else solved  # HiGHS needs 2 to 20 seconds for each
    check(ADVERSARIAL[family](2048, 128, 0))


@pytest.mark.parametrize(("T", "E"), [(40, 1), (40, 40), (55, 7), (55, 40)])
def test_assignment_as_scipy_solves_it(T: int, E: int):
    scores = normal(torch.Generator().manual_seed(E), T, E)
    best = float(scores.numpy()[linear_sum_assignment(scores.numpy(), maximize=True)].sum())
    solution = solved(Program(scores, E, (0, 1), (1, 1)))
    assert solution.value - 1e-9 <= best <= solution.upper_bound + 1e-9


# ---- what is infeasible is refused, and nothing else

MISSING = torch.arange(12.0).view(3, 4).index_fill(0, torch.tensor(1), -torch.inf)  # t1 may not be chosen
INFEASIBLE: list[tuple[Tensor, dict[str, Any], list[int]]] = [  # T=3, E=4; the numbers that the message must hold
    (S.T, {"budget": 13}, [13, 12]),
    (S.T, {"budget": 7, "per_token": (0, 2)}, [7, 6]),
    (S.T, {"budget": 7, "per_token": (None, torch.tensor([9, 1, 1]))}, [7, 6]),  # a token has four experts at most
    (S.T, {"budget": 5, "per_expert": (0, 1)}, [5, 4]),
    (S.T, {"budget": 5, "per_token": (2, None)}, [5, 6]),
    (S.T, {"budget": 7, "per_expert": (2, 3)}, [7, 8]),
    (S.T, {"per_token": (5, None)}, [5, 4]),
    (S.T, {"per_expert": (4, None)}, [4, 3]),
    (S.T, {"per_token": (2, None), "per_expert": (None, 1)}, [6, 4]),
    (S.T, {"per_token": (None, 1), "per_expert": (1, None)}, [3, 4]),
    # t0 and t1 want all experts: 2 pairs more than e1 and e2 can give them, but e0 may take 1
    (S[:3], {"per_token": (torch.tensor([3, 3, 0]), None), "per_expert": (0, torch.tensor([1, 3, 3]))}, [2, 1]),
    # e0 and e1 want 6 pairs, but t0 may take one of them: 1 + 2 + 2
    (S[:3], {"per_token": (0, torch.tensor([1, 3, 3])), "per_expert": (torch.tensor([3, 3, 0]), None)}, [6, 5]),
    (MISSING, {"budget": 9}, [9, 8]),
    (MISSING, {"per_token": (1, None)}, [1, 0]),
    (MISSING, {"per_expert": (3, None)}, [3, 2]),
    (MISSING, {"budget": 3, "per_token": (0, 1)}, [3, 1]),
    (MISSING, {"budget": 7, "per_token": (0, 3), "per_expert": (0, 2)}, [7, 1]),
]


@pytest.mark.parametrize(("scores", "asked", "numbers"), INFEASIBLE, ids=[str(asked) for _, asked, _ in INFEASIBLE])
def test_a_contradiction_is_named_by_its_numbers(scores: Tensor, asked: dict[str, Any], numbers: list[int]):
    assert by_highs(scores, **asked) is None
    with pytest.raises(ValueError) as refusal:
        solve(scores, **asked)
    assert set(map(str, numbers)) <= set(re.findall(r"\d+", str(refusal.value))), str(refusal.value)


def test_refuses_exactly_what_is_infeasible():
    outcomes = []

    @given(program=wild())
    @settings(laws, max_examples=200)
    def check(program: Program):
        possible = by_highs(*program) is not None
        outcomes.append(possible)
        if possible:
            solved(program)
        else:
            with pytest.raises(ValueError):
                solved(program)

    check()
    assert 0.2 < sum(outcomes) / len(outcomes) < 0.8


REFUSED: list[tuple[Tensor, dict[str, Any], str]] = [
    (S.clone().index_fill_(1, torch.tensor(2), torch.nan), {"budget": 2}, "(?i)nan"),
    (S.clone().index_fill_(1, torch.tensor(2), torch.inf), {"budget": 2}, "inf"),
    (S[0], {"budget": 2}, "3"),
    (S[None], {"budget": 2}, "1, 4, 3"),
    (S.long(), {"budget": 2}, "int64"),
    (S > 0, {"budget": 2}, "bool"),
    (S, {"budget": -1}, "-1"),
    (S, {"budget": 2.5}, "2.5"),
    (S, {"per_token": (-1, 2)}, "-1"),
    (S, {"per_token": (3, 2)}, "3.*2"),
    (S, {"per_expert": (torch.tensor([0, 4, 0]), torch.tensor([1, 3, 1]))}, "4.*3"),
    (S, {"per_token": (0, 1.5)}, "1.5"),
    (S, {"per_expert": (torch.tensor([0.5, 0.0, 0.0]), None)}, "float|0.5"),
    (S, {"per_token": (torch.tensor([0, 0, 0]), None)}, "3"),  # one an expert, where one a token is meant
    (S, {"per_expert": (None, torch.tensor([2, 2, 2, 2]))}, "4"),
    (S, {"per_token": 2}, "2"),
    (S, {"per_token": (0, 1, 2)}, "0, 1, 2"),
]


@pytest.mark.parametrize(("scores", "asked", "words"), REFUSED, ids=[str(asked) for _, asked, _ in REFUSED])
def test_refuses_what_is_no_program(scores: Tensor, asked: dict[str, Any], words: str):
    with pytest.raises((ValueError, TypeError), match=words):
        solve(scores, **asked)


@given(seed=st.integers(0, 2**20), free=st.sampled_from(["per_token", "per_expert", None]))
@many
def test_follows_a_permutation_of_tokens_and_experts(seed: int, free: str | None):
    random = torch.Generator().manual_seed(seed)
    token, expert = torch.randperm(24, generator=random), torch.randperm(6, generator=random)
    program = plant(random, normal(random, 24, 6), slack=2)[1]
    scores, budget, (lo, hi), (least, most) = program
    moved = Program(scores[token][:, expert], budget, (lo[token], hi[token]), (least[expert], most[expert]))
    if free:
        program, moved = program._replace(**{free: None}), moved._replace(**{free: None})
    one, other = solved(program), solved(moved)
    if free:
        assert other.mask.equal(one.mask[token][:, expert])
    assert max(one.value, other.value) <= min(one.upper_bound, other.upper_bound) + program.rounding()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_solved_as_it_stands(dtype: torch.dtype):
    scores = normal(torch.Generator().manual_seed(0), 40, 6).softmax(1).to(dtype)
    for asked in ({}, {"per_token": (1, 3)}, {"per_expert": (5, 20)}, {"per_token": (1, 3), "per_expert": (5, 20)}):
        low, high = solved(Program(scores, 80, **asked)), solved(Program(scores.double(), 80, **asked))
        assert low.mask.tolist() == high.mask.tolist()
        assert low.value == high.value


def test_a_score_of_minus_infinity_is_never_chosen():
    scores = S.clone()
    scores[0, 0] = scores[3] = -torch.inf
    assert solve(scores, budget=8).value == 8 + 1 + 7 + 5 + 2 + 6 + 4 + 3
    assert solve(scores, budget=2, per_expert=(None, 1)).value == 8 + 7
    assert solve(scores, per_token=(0, 1)).value == 8 + 7 + 6
    assert solve(scores, budget=3, per_token=(0, 1), per_expert=(0, 1)).value == 8 + 7 + 3
    assert solve(scores + 99, per_token=(0, 1), per_expert=(0, torch.tensor([1, 2, 2]))).value == 8 + 7 + 4 + 3 * 99
    one = torch.tensor([[-torch.inf, -torch.inf], [-torch.inf, 9]])
    assert solve(one, per_token=(0, 1), per_expert=(0, 0)).value == 0


def test_bounds_may_be_spelled_in_several_ways():
    program = routed(normal(torch.Generator().manual_seed(0), 24, 6))
    scores, budget, (lo, hi), (least, most) = program
    one = solved(program).mask
    tensors = (torch.full((24,), lo), hi), [least, torch.full((6,), most, dtype=torch.int32)]
    assert solve(scores, budget=budget, per_token=tensors[0], per_expert=tensors[1]).mask.equal(one)
    free = solve(scores, budget=budget).mask
    assert solve(scores, budget=budget, per_token=(None, None), per_expert=(0, 99)).mask.equal(free)


@pytest.mark.parametrize("free", [{}, {"per_token": None}, {"per_expert": None}], ids=str)
def test_changes_nothing_that_it_was_given(free: dict[str, None]):
    def given() -> Program:
        return plant(torch.Generator().manual_seed(0), S.clone().requires_grad_(), slack=2)[1]

    program = given()
    assert not solved(program._replace(**free)).mask.requires_grad
    assert str(program) == str(given())


def test_no_tokens():
    for asked in ({}, {"budget": 0}, {"per_token": (1, 2)}, {"budget": 0, "per_token": (1, 2), "per_expert": (0, 3)}):
        solution = solve(torch.empty(0, 4), **asked)
        assert (solution.mask.shape, solution.value, solution.upper_bound) == ((0, 4), 0.0, 0.0)
    with pytest.raises(ValueError, match="1"):
        solve(torch.empty(0, 4), per_expert=(1, None))
