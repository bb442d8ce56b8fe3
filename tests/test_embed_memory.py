"""One forward a text for all the embeddings that are made of it."""

import numpy as np
import pytest

import usmoe
from tiny_encoder import HALF, TEXTS, encoder
from usmoe.embed.encoder import Encoder
from usmoe.embed.memory import FeatureMemory


@pytest.fixture
def ran(monkeypatch):
    """The texts that encoders run, in order."""
    found, features = [], Encoder.features
    monkeypatch.setattr(
        Encoder, "features", lambda self, texts, *a, **k: found.extend(texts) or features(self, texts, *a, **k)
    )
    return found


def test_encoders_with_a_memory_in_common_run_each_text_once(ran):
    first = encoder(HALF)
    variants = [first, first.variant(embedding="router"), first.variant(embedding="moee")]
    expected = [one.encode(TEXTS) for one in variants]
    shared = FeatureMemory()
    for one in variants:
        shared.join(one)
    ran.clear()
    for one, vectors in zip(variants, expected, strict=True):
        np.testing.assert_allclose(one.combine(shared.features(one, TEXTS)), vectors, atol=1e-5)
    assert ran == list(dict.fromkeys(TEXTS))
    shared.features(first, ["a cat sat", "new"], instruction="Do it.")
    assert ran[5:] == ["a cat sat", "new"]
    shared.clear()
    shared.features(first, ["a cat sat"])
    assert ran[7:] == ["a cat sat"]


def test_a_memory_keeps_as_many_texts_as_it_may(ran):
    memory, mine = FeatureMemory(limit=3), encoder()
    memory.join(mine)
    for texts in (["a", "b"], ["b", "c"], ["c", "d"], ["1", "2", "3", "4"]):
        np.testing.assert_allclose(memory.features(mine, texts).hidden, mine.features(texts).hidden, atol=1e-5)
        ran[-len(texts) :] = []  # those of the comparison
    assert ran == ["a", "b", "c", "c", "d", "1", "2", "3", "4"]
    assert len(memory) == 4


def test_where_texts_are_not_alone_each_call_is_a_call_of_its_own(ran):
    mine = encoder(usmoe.USMoE(alpha=0.5, pool="batch"))
    memory = FeatureMemory()
    memory.join(mine)
    for _ in range(2):
        memory.features(mine, ["a", "a", "b"])
    assert ran == ["a", "a", "b"] * 2
    assert not len(memory)


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (lambda one: encoder(HALF), "model or tokenizer"),
        (lambda one: Encoder(one.model, one.tokenizer, usmoe.USMoE(alpha=0.4)), "router"),
        (lambda one: one.variant(prompt="prompteol"), "prompt"),
        (lambda one: one.variant(pooling="mean"), "pooling"),
        (lambda one: one.variant(max_length=9), "max_length"),
        (lambda one: one.variant(layers=(0,)), "layers"),
        (lambda one: one.variant(embedding="router", router_features="probabilities"), "router_features"),
    ],
)
def test_encoders_that_cannot_share_a_forward_are_refused(other, what):
    one, memory = encoder(HALF, "moee"), FeatureMemory()
    memory.join(one)
    memory.join(one.variant(embedding="hidden"))
    with pytest.raises(ValueError, match=f"differ in their {what}"):
        memory.join(other(one))
