"""What each router lets earlier positions know of later tokens, in bits, counted over all sequences of an alphabet.

A causal router gives away 0.0, after every prefix; one that looks ahead gives away something, or a count that sees
nothing would pass for a proof. The last test is the reason for counting: the leak of USMoE has no gradient.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from every_router import fit, those
from side_channel import CausalStack, E, entropy, leak, leak_per_token, leaks, observations, sequences
from usmoe import ExpertChoice, Routing, TokenChoice, USMoE

LAYERS = (1, 2, 4)
SMALL = {"symbols": 3, "length": 4}
"""81 sequences: enough to catch every router of the list that looks ahead."""


def most(router: Any) -> dict[str, int]:
    """1024 sequences, or 81 where they must run one by one."""
    return {"symbols": 4, "length": 5} if router.promises.batch_independent else SMALL


observers = pytest.mark.parametrize("observe", ["outputs", "masks"])


# ---- the count itself


def test_entropy_by_hand():
    """Groups of four continuations: all one but for rounding, two and two, one and three, all different."""
    observed = torch.tensor(
        [
            [[7.0, 1.0], [7.0, 1.0 + 1e-14], [7.0 - 1e-14, 1.0], [7.0, 1.0]],  # 0 bits
            [[7.0, 1.0], [7.0, 1.1], [7.0, 1.1], [7.0, 1.0]],  # 1 bit
            [[0.0, 0.0], [0.0, 0.0], [0.1, 0.0], [0.0, 0.0]],  # log2(4) - 3/4 log2(3) = 0.8113 bits
            [[0.0, 0.0], [0.0, 0.1], [0.1, 0.0], [0.1, 0.1]],  # 2 bits
        ],
        dtype=torch.float64,
    )
    bits = [entropy(group[None]) for group in observed]
    assert bits[0] == 0.0
    assert bits[1:] == pytest.approx([1, 0.811278, 2])
    assert entropy(observed) == pytest.approx(3.811278 / 4)


def test_sequences_of_one_prefix_stand_side_by_side():
    assert sequences(2, 3).tolist() == [list(given) for given in itertools.product((0, 1), repeat=3)]


class Gossip:
    """Says that it is causal, and sends every token to the expert that the last token likes best."""

    promises = TokenChoice(k=1).promises

    def __call__(self, logits: Tensor, valid: Tensor | None = None, **given: Any) -> Routing:
        best = logits[:, -1:].argmax(-1, keepdim=True).expand(-1, logits.shape[1], 1)
        return Routing.from_dense(
            logits.softmax(-1), torch.zeros_like(logits, dtype=torch.bool).scatter(-1, best, True)
        )


@observers
def test_a_router_that_breaks_its_promise_is_caught(observe: Any):
    assert min(leaks(Gossip(), **SMALL, observe=observe)) > 0


# ---- every router: nothing leaks exactly when it says so


@observers
@pytest.mark.parametrize("router", those(lambda promises: promises.causal), ids=str)
def test_a_causal_router_gives_nothing_away(router: Any, observe: Any):
    assert set(leaks(fit(router, E), 2, **most(router), observe=observe)) == {0.0}


@observers
@pytest.mark.parametrize("router", those(lambda promises: not promises.causal), ids=str)
def test_a_router_that_looks_ahead_gives_something_away(router: Any, observe: Any):
    assert any(leak(fit(router, E), 2, **SMALL, observe=observe, seed=seed) > 0 for seed in range(5))


# ---- all 4^6 sequences, out of 2 bits a token


THRESHOLD = USMoE(pool="threshold", threshold=0.17)


@pytest.mark.parametrize("router", [TokenChoice(k=2), THRESHOLD], ids=str)
@pytest.mark.parametrize("layers", LAYERS)
def test_no_bit_of_token_choice_and_of_a_threshold(router: Any, layers: int):
    assert leaks(router, layers) == [0.0] * 5
    assert leak_per_token(router, layers) == 0.0


@pytest.mark.parametrize("layers", LAYERS)
def test_the_threshold_chooses_about_two_experts(layers: int):
    """Or the zero above would be that of a router which chooses all pairs, or none."""
    masks = observations(THRESHOLD, layers, symbols=4, length=6, observe="masks", seed=0)
    assert masks.mean().item() * E == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize(
    "router",
    [USMoE(k=2), ExpertChoice(k=2), ExpertChoice(k=2, score="softmax_experts")],
    ids=str,
)
@pytest.mark.parametrize("count", [leak, leak_per_token])
def test_the_leak_grows_with_the_layers(router: Any, count: Any):
    """Each layer adds cuts of its own, and mixes what the earlier ones let through into all states after it."""
    one, two, four = (count(router, layers) for layers in LAYERS)
    assert 0.1 < one < two < four < 2 + 1e-12


ALONE_AND_OVER_TOKENS: list[Any] = [
    (USMoE(k=2), USMoE(k=2, expert_score="softmax_tokens")),
    (ExpertChoice(k=2), ExpertChoice(k=2, score="softmax_tokens")),
]
"""A score that sees one token alone, and one that every token of the pool moves."""

by_score = pytest.mark.parametrize(("alone", "over_tokens"), ALONE_AND_OVER_TOKENS, ids=["usmoe", "expert_choice"])


@by_score
def test_all_that_leaks_is_which_pairs_are_kept(alone: Any, over_tokens: Any):
    """A later token moves the cut: the outputs know no more than the masks. Under softmax over tokens it moves every
    weight too, and is given away whole."""
    assert leak(alone) == pytest.approx(leak(alone, observe="masks"), abs=1e-12)
    assert leak(over_tokens) == pytest.approx(2)
    assert leak(over_tokens, observe="masks") < 1.9


# ---- why this count, and not a gradient


def gradient_of_the_last_token(router: Any, layers: int) -> Tensor:
    """Gradient of the outputs before the last position, in all 4^6 sequences, by the embedding of the last token."""
    model = CausalStack(router, layers, symbols=4)
    x = model.embed(sequences(4, 6)).requires_grad_()
    y, _ = model(x)
    factors = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    (found,) = torch.autograd.grad((y * factors)[:, :-1].sum(), x)
    assert found[:, :-1].any(-1).all()  # it does see the earlier tokens
    return found[:, -1]


@by_score
@pytest.mark.parametrize("layers", LAYERS)
def test_a_gradient_sees_softmax_over_tokens_and_not_the_leak_of_the_cut(alone: Any, over_tokens: Any, layers: int):
    assert leak(alone, layers) > 0.1
    assert not gradient_of_the_last_token(alone, layers).any()
    assert gradient_of_the_last_token(over_tokens, layers).any()
