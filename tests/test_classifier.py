"""A classifier: the last token's state, whatever stands beside a text; texts in batches; figures of its answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("datasets", reason="the extra usmoe[train]")
pytest.importorskip("accelerate", reason="the extra usmoe[train]")


from tiny_finetuning import TINY, config_of, keyword_csv, pretrained, sentences, texts_of
from usmoe.data.vocabulary import Characters, learn
from usmoe.layers.pooling import POOLINGS, Pooling
from usmoe.models.config import MODELS
from usmoe.models.language import LanguageModel
from usmoe.train.agreement import accuracy, agreement, confusion, macro_f1
from usmoe.train.classifier import Classifier
from usmoe.train.classify import classify
from usmoe.train.finetune import finetune
from usmoe.train.texts import Epochs, Texts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return pretrained(tmp_path_factory.mktemp("checkpoint"), steps=60)


@pytest.fixture(scope="module")
def keyword(tmp_path_factory) -> Path:
    return keyword_csv(tmp_path_factory.mktemp("data") / "keyword.csv")


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """With gates whose logits differ, as a fresh model's hardly do."""
    draws = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "gate" in name:
            parameter.data = torch.randn(parameter.shape, generator=draws)
    return model


def classifier(router: str = "usmoe(k=2)", classes: int = 3, **changes: Any) -> Classifier:
    torch.manual_seed(0)
    body = LanguageModel(TINY.replace(vocabulary=256, router=router, **changes))
    return spread(Classifier(body, classes)).eval()  # pyright: ignore[reportReturnType]


# the model


@pytest.mark.parametrize("name", ["transformer-xl-small", "decoder-small"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_the_head_reads_the_last_real_token_or_the_mean_of_all(name: str, pooling: Pooling):
    model = classifier(position=MODELS[name].position)
    model.pooling = pooling
    texts = texts_of("a", "a longer one", "mid")
    batch = texts.batch(np.arange(3))
    logits = model(batch.tokens, batch.valid).logits
    for row, tokens in enumerate(texts.tokens):
        alone = model.body(torch.from_numpy(tokens.astype(np.int64))[None]).hidden[0]
        alone = alone[-1] if pooling == "last" else alone.mean(0)
        weight, bias, out, shift = model.head.parameters()
        by_hand = torch.tanh(alone @ weight.T + bias) @ out.T + shift
        torch.testing.assert_close(logits[row], by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", ["usmoe(k=2)", "usmoe(k=1.5, alpha=0.5)", "token_choice(k=2)", "expert_choice(k=2)"])
def test_a_class_does_not_depend_on_the_texts_beside_it(router: str, keyword: Path):
    model, beside = classifier(router), [*sentences(20), "", "x"]
    each = [classify(model, texts_of(*beside), config_of(keyword, evaluation_batch=size)) for size in (1, 5, 64)]
    alone = torch.cat([classify(model, texts_of(text), config_of(keyword)).logits for text in beside])
    for one in each:
        torch.testing.assert_close(one.logits, alone, rtol=1e-4, atol=1e-5)
        assert one.routed == pytest.approx(each[0].routed)


def test_under_a_pool_of_the_batch_it_does_and_the_result_says_so(checkpoint: Path, keyword: Path, tmp_path: Path):
    model, texts = classifier("usmoe(k=2, pool=batch)"), texts_of(*sentences(20))
    one, other = (classify(model, texts, config_of(keyword, evaluation_batch=size)).logits for size in (1, 20))
    assert (one - other).abs().max() > 1e-4
    config = config_of(keyword, router="usmoe(k=2, pool=batch)", steps=2)
    assert not finetune(config, tmp_path / "run", checkpoint=checkpoint, progress=False).alone


def test_what_stands_in_padding_changes_nothing():
    model, texts = classifier(), texts_of("a", "a longer one")
    batch = texts.batch(np.arange(2))
    wide = torch.nn.functional.pad(batch.tokens, (0, 5), value=77)
    valid = torch.nn.functional.pad(batch.valid, (0, 5), value=False)
    wide[~valid] = 99
    torch.testing.assert_close(model(wide, valid).logits, model(batch.tokens, batch.valid).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("pooling", ["last", "mean", "weighted_mean"])
def test_weights_may_be_of_another_dtype(dtype: torch.dtype, pooling: Pooling):
    model, batch = classifier(), texts_of("a", "a longer one").batch(np.arange(2))
    model.pooling = pooling
    expected = model(batch.tokens, batch.valid).logits
    logits = model.to(dtype)(batch.tokens, batch.valid).logits
    assert logits.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    if dtype == torch.float64:  # in bfloat16 a token may go to another expert
        torch.testing.assert_close(logits.float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean"])
def test_a_mean_is_of_float32_at_least(pooling: Pooling):
    """Under autocast, too; of float64 to the last bits."""
    states = torch.randn(2, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([7, 3])
    weights = (torch.arange(1.0, 8.0, dtype=torch.float64) if pooling == "weighted_mean" else torch.ones(7).double())[
        :3
    ]
    whole = POOLINGS[pooling](states, lengths)
    torch.testing.assert_close(whole[1], weights @ states[1, :3] / weights.sum(), rtol=1e-14, atol=1e-14)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean = POOLINGS[pooling](states.float(), lengths)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, whole.float())


def test_a_head_needs_two_classes():
    with pytest.raises(ValueError, match="1 classes leave nothing to tell apart"):
        classifier(classes=1)


# texts and batches


def test_texts_are_cut_to_their_beginning_and_none_is_without_a_token():
    texts = texts_of("abcdef", "", "ab", length=4)
    assert [one.tolist() for one in texts.tokens] == [[97, 98, 99, 100], [10], [97, 98]]
    assert texts.cut == 1
    batch = texts.batch(np.array([2, 0]))
    assert batch.tokens.tolist() == [[97, 98, 0, 0], [97, 98, 99, 100]]
    assert batch.valid.tolist() == [[True, True, False, False], [True] * 4]
    words = learn("word", ["the sea the sea"])
    assert [one.tolist() for one in Texts(words, ["sea the", "", "none"], 9).tokens] == [[2, 3], [0], [1]]
    assert Texts(Characters(" ab", unknown=False), [""], 9).tokens[0].tolist() == [0]


def test_what_the_vocabulary_does_not_know_is_counted():
    """Of tokens that are read: "one" is cut off."""
    words = learn("word", ["the sea the sea"])
    assert Texts(words, ["sea the ship", "the the", "a a a one"], 3).unknown == 4 / 8
    assert Texts(Characters(" ab"), ["ab c"], 9).unknown == 1 / 4
    assert Texts(Characters(" ab", unknown=False), ["ab"], 9).unknown is None
    assert texts_of("anything").unknown is None


def test_each_epoch_reads_every_text_once_in_an_order_of_its_own():
    texts = texts_of(*sentences(203))
    epochs = Epochs(texts, 4, seed=3)
    assert epochs.steps == 51
    orders = [[row for step in range(51) for row in epochs.at(51 * epoch + step).rows.tolist()] for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(203))
    assert orders[0] != orders[1]
    again = Epochs(texts, 4, seed=3)
    assert [again.at(step).rows.tolist() for step in (70, 3)] == [epochs.at(step).rows.tolist() for step in (70, 3)]
    assert any(Epochs(texts, 4, seed=4).at(step).rows.tolist() != again.at(step).rows.tolist() for step in range(9))


def test_texts_of_a_length_stand_together():
    texts = texts_of(*("x" * (1 + 37 * number % 40) for number in range(200)))
    padding = [float((~Epochs(texts, 8, seed=0).at(step).valid).float().mean()) for step in range(25)]
    assert np.mean(padding) < 0.1


# figures


def test_accuracy_and_macro_f1_by_hand():
    """True classes 0 0 0 1 1 2, said 0 0 1 1 2 2; class 3 neither occurs nor is said."""
    table = confusion(np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 2, 2]), 4)
    assert table.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert accuracy(table) == pytest.approx(4 / 6)
    assert macro_f1(table) == pytest.approx((4 / 5 + 2 / 4 + 2 / 3) / 3)


def test_the_band_is_that_of_rows_drawn_again():
    draws = np.random.default_rng(0)
    true = draws.integers(0, 3, 200)
    said = np.where(draws.random(200) < 0.7, true, draws.integers(0, 3, 200))
    found, values = agreement(true, said, 3), []
    for _ in range(2000):
        rows = draws.integers(0, 200, 200)
        table = confusion(true[rows], said[rows], 3)
        values.append((accuracy(table), macro_f1(table)))
    low, high = np.quantile(values, (0.025, 0.975), axis=0)
    assert found.accuracy_band == pytest.approx((low[0], high[0]), abs=0.015)
    assert found.macro_f1_band == pytest.approx((low[1], high[1]), abs=0.015)
    assert agreement(true, said, 3) == found
