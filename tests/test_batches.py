"""Batches of a corpus: streams, windows, and every token of a split once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from usmoe.data.batches import IGNORED, Streams, Windows, evaluation

sizes = st.tuples(st.integers(20, 120), st.integers(1, 5), st.integers(1, 7))


def corpus(length: int) -> np.ndarray:
    """Each token is its own place."""
    return np.arange(length, dtype=np.uint16)


def test_streams_go_on_where_the_step_before_stopped():
    """13 tokens, 2 streams of 6, 2 tokens a step; the 13th is never read.

    0 1 2 3 4 5         step 0   step 1   step 2
    6 7 8 9 10 11       0 1|2    2 3|4    4|5       inputs | what the last one predicts
                        6 7|8    8 9|10   10|11
    """
    streams = Streams(corpus(13), 2, 2)
    assert streams.steps_per_epoch == 3
    steps = [streams.at(step) for step in range(4)]
    assert [batch.inputs.tolist() for batch in steps] == [
        [[0, 1], [6, 7]],
        [[2, 3], [8, 9]],
        [[4], [10]],
        [[0, 1], [6, 7]],
    ]
    assert [batch.targets.tolist() for batch in steps[:3]] == [[[1, 2], [7, 8]], [[3, 4], [9, 10]], [[5], [11]]]
    assert [batch.first for batch in steps] == [True, False, False, True]
    assert steps[0].inputs.dtype == steps[0].targets.dtype == torch.int64


@given(sizes=sizes)
def test_every_token_of_a_stream_but_its_first_is_predicted_once_an_epoch(sizes: tuple[int, int, int]):
    length, batch, width = sizes
    if length < batch * width + 1:
        return
    streams = Streams(corpus(length), batch, width)
    seen = [streams.at(step) for step in range(streams.steps_per_epoch)]
    for row in range(batch):
        begin = row * (length // batch)
        targets = torch.cat([one.targets[row] for one in seen]).tolist()
        assert targets == list(range(begin + 1, begin + length // batch))
        assert all((one.targets[row] - one.inputs[row] == 1).all() for one in seen)


def test_a_window_is_a_run_of_the_corpus_and_an_epoch_reads_each_once():
    windows = Windows(corpus(70), 3, 8, seed=5)  # 70 // 8 - 2 = 6 windows, two steps
    assert windows.steps_per_epoch == 2
    starts = []
    for step in range(4):
        batch = windows.at(step)
        assert batch.first
        assert batch.inputs.shape == (3, 8)
        for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            assert inputs == list(range(inputs[0], inputs[0] + 8))
            assert targets == [token + 1 for token in inputs]
            starts.append(inputs[0])
    for epoch in (starts[:6], starts[6:]):
        offset = min(epoch)
        assert offset < 8
        assert sorted(epoch) == [offset + 8 * number for number in range(6)]
        assert epoch != sorted(epoch)
    assert starts[:6] != starts[6:]


def test_the_numbers_of_windows_are_those_of_the_script_that_trained_the_shipped_model():
    """batch_at of scripts/corpus.py at commit ea51486: tokens 0 .. 999, batch 4, context 16, seed 7."""
    windows = Windows(corpus(1000), 4, 16, seed=7)
    assert [windows.at(step).inputs[:, 0].tolist() for step in (0, 14, 15, 200)] == [
        [575, 767, 367, 543],
        [111, 95, 223, 255],
        [877, 77, 157, 221],
        [577, 689, 945, 97],
    ]


@pytest.mark.parametrize("make", [Streams, Windows])
def test_a_step_is_a_function_of_its_number_alone(make: type):
    tokens = np.random.default_rng(0).integers(0, 50, 500).astype(np.uint8)
    one, other = make(tokens, 4, 9), make(tokens, 4, 9)
    forwards = [one.at(step) for step in range(40)]
    for step in reversed(range(40)):
        again = other.at(step)
        assert torch.equal(again.inputs, forwards[step].inputs)
        assert torch.equal(again.targets, forwards[step].targets)
        assert again.first == forwards[step].first


def test_another_seed_is_another_order():
    starts = {tuple(Windows(corpus(500), 4, 9, seed).at(0).inputs[:, 0].tolist()) for seed in range(5)}
    assert len(starts) == 5


def test_batches_are_copies_of_a_memory_map(tmp_path):
    np.save(tmp_path / "tokens.npy", corpus(100))
    tokens = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    for batch in (Streams(tokens, 2, 5).at(0), Windows(tokens, 2, 5).at(0), next(evaluation(tokens, 2, 5))):
        batch.inputs[:] = -1
        assert not (batch.targets == -1).any()
    assert (tokens == corpus(100)).all()


def test_evaluation_predicts_the_first_token_of_a_stream_in_the_one_before():
    """8 tokens, 7 targets, 2 streams: 1 2 3 and 4 5 6 7; the shorter one is padded.

    inputs  0 1   2 .       targets  1 2   3 .
            3 4   5 6                4 5   6 7
    """
    first, last = evaluation(corpus(8), 2, 2)
    assert (first.inputs.tolist(), first.targets.tolist()) == ([[0, 1], [3, 4]], [[1, 2], [4, 5]])
    assert (last.inputs.tolist(), last.targets.tolist()) == ([[2, 0], [5, 6]], [[3, IGNORED], [6, 7]])
    assert (first.first, last.first) == (True, False)
    assert (first.count, last.count) == (4, 3)
    assert last.valid.tolist() == [[True, False], [True, True]]


@given(sizes=sizes)
def test_evaluation_predicts_every_token_but_the_first_exactly_once(sizes: tuple[int, int, int]):
    length, batch, width = sizes
    batches = list(evaluation(corpus(length), batch, width))
    assert sorted(token for one in batches for token in one.targets[one.valid].tolist()) == list(range(1, length))
    assert sum(one.count for one in batches) == length - 1
    assert [one.first for one in batches] == [True] + [False] * (len(batches) - 1)
    for one in batches:
        assert (one.targets - one.inputs)[one.valid].eq(1).all()
        assert one.inputs[~one.valid].eq(0).all()
    for row in range(batch):  # a stream is one run of text, so that memory holds what stands before
        inputs = torch.cat([one.inputs[row][one.valid[row]] for one in batches]).tolist()
        assert inputs == list(range(inputs[0], inputs[0] + len(inputs)))


def test_the_weighted_mean_over_batches_is_the_mean_over_the_split():
    losses = torch.rand(38, generator=torch.Generator().manual_seed(0))
    batches = list(evaluation(corpus(38), 4, 5))
    means = [losses[one.targets[one.valid]].mean() * one.count for one in batches]
    torch.testing.assert_close(sum(means) / 37, losses[1:].mean())


def test_a_corpus_shorter_than_a_step_is_refused():
    with pytest.raises(ValueError, match=r"A corpus of 20 tokens is too short for 4 sequences of 5 .* which need 21\."):
        Streams(corpus(20), 4, 5)
    assert Streams(corpus(21), 4, 5).steps_per_epoch == 1
    with pytest.raises(ValueError, match=r"of 20 tokens .* need 21\."):
        Windows(corpus(20), 4, 5)
    with pytest.raises(ValueError, match=r"of 14 tokens .* need 15\."):
        Windows(corpus(14), 1, 5)
    assert Windows(corpus(15), 1, 5).at(7).targets.max() <= 14
    with pytest.raises(ValueError, match="4 tokens cannot be evaluated in 4 streams of 3 tokens a step: 5 tokens are"):
        next(evaluation(corpus(4), 4, 3))
    with pytest.raises(ValueError, match="batch=0 and length=5 make no batch"):
        Streams(corpus(21), 0, 5)
