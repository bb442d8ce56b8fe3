"""AAA in the place of words, or before them."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from usmoe.data.corrupt import corrupt

TEXT = "  one two\n\nthree,\tfour 5\n"
texts = st.text(alphabet=st.sampled_from("ab é\n\t\u3000.A"), max_size=60)
modes = st.sampled_from(["replace", "insert"])
rates = st.floats(0, 1)
seeds = st.integers(0, 2**32)


def test_every_word_is_replaced_at_rate_1_and_none_at_rate_0():
    assert corrupt(TEXT, "replace", 1, 0) == ("  AAA AAA\n\nAAA\tAAA AAA\n", 5)
    assert corrupt(TEXT, "insert", 1, 0) == ("  AAA one AAA two\n\nAAA three,\tAAA four AAA 5\n", 5)
    assert corrupt(TEXT, "replace", 0, 0) == (TEXT, 0)


def test_the_nth_word_is_chosen_by_the_nth_number_of_the_seed():
    draws = np.random.default_rng(3).random(5)
    expected = ["AAA" if draw < 0.5 else word for draw, word in zip(draws, TEXT.split(), strict=True)]
    changed, count = corrupt(TEXT, "replace", 0.5, 3)
    assert changed.split() == expected
    assert count == expected.count("AAA") > 0


def test_bytes_that_are_no_text_are_corrupted_too():
    assert corrupt(b"\xff\xfe a\n", "insert", 1, 0) == (b"AAA \xff\xfe AAA a\n", 2)


def test_another_word_is_written_where_it_is_asked_for():
    assert corrupt("a b", "replace", 1, 0, word="aaa") == ("aaa aaa", 2)


def test_text_without_words_stays():
    assert corrupt("", "replace", 1, 0) == ("", 0)
    assert corrupt(b" \n", "insert", 1, 0) == (b" \n", 0)


@given(text=texts, mode=modes, rate=rates, seed=seeds)
def test_white_space_stays(text: str, mode: str, rate: float, seed: int):
    changed, count = corrupt(text, mode, rate, seed)  # pyright: ignore[reportArgumentType]
    written = str(changed).replace("AAA ", "", count) if mode == "insert" and "A" not in text else None
    assert written in (None, text)
    if mode == "replace":
        assert re.sub(r"\S+", "", str(changed)) == re.sub(r"\S+", "", text)
        assert sum(a != b for a, b in zip(text.split(), str(changed).split(), strict=True)) <= count


@given(text=texts, mode=modes, rate=rates, seed=seeds, place=st.integers(0, 60))
def test_a_text_cut_between_words_gives_the_same(text: str, mode: str, rate: float, seed: int, place: int):
    spaces = [match.end() for match in re.finditer(r"\s", text)]
    ends = [end for end in spaces if end <= place][-1:]
    draws = np.random.default_rng(seed)
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *ends, len(text)])]
    parts = [corrupt(piece, mode, rate, draws) for piece in pieces]  # pyright: ignore[reportArgumentType]
    whole = corrupt(text, mode, rate, seed)  # pyright: ignore[reportArgumentType]
    assert ("".join(str(part.text) for part in parts), sum(part.count for part in parts)) == whole


@given(text=texts, seed=seeds, rates=st.tuples(rates, rates))
def test_a_higher_rate_corrupts_all_that_a_lower_one_does(text: str, seed: int, rates: tuple[float, float]):
    low, high = (str(corrupt(text, "replace", rate, seed).text).split() for rate in sorted(rates))
    assert all(b == "AAA" for a, b, word in zip(low, high, text.split(), strict=True) if a != word)


def test_the_rate_is_the_share_of_words():
    """Bernoulli: 20,000 words at 0.04 are 800, with a deviation of 28."""
    assert abs(corrupt("w " * 20_000, "replace", 0.04, 0).count - 800) < 4 * 28
    assert corrupt("w " * 99, "replace", 0.5, 0) != corrupt("w " * 99, "replace", 0.5, 1)


@pytest.mark.parametrize("rate", [-0.01, 1.01, float("nan")])
def test_a_rate_outside_0_and_1_is_refused(rate: float):
    with pytest.raises(ValueError, match=r"no share of words. Choose 0 <= corrupt_rate <= 1"):
        corrupt("a", "replace", rate, 0)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"'swap' is unknown\. Choose replace or insert"):
        corrupt("a", "swap", 0.1, 0)  # pyright: ignore[reportArgumentType]
