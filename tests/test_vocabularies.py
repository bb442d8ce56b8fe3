"""Vocabularies: learned, saved, read again, and given to another text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from small_corpora import at, folder
from usmoe.data import array
from usmoe.data.prepare import prepare
from usmoe.data.vocabulary import Bytes, Characters, Words, digest, learn, load, save


@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=50))
def test_bytes_and_characters_and_bpe_give_back_the_text(text: str):
    for vocabulary in (Bytes(), learn("char", [text + "x"]), VOCABULARIES[-1]):
        ids = vocabulary.encode(text)
        assert ids.max(initial=0) < vocabulary.size
        assert vocabulary.decode(ids) == text


@given(words=st.lists(st.sampled_from(["a", "bb", "c", "AAA", "\n", "<unk>", "<eos>"]), max_size=30))
def test_words_are_ranked_by_frequency(words: list[str]):
    text = " ".join(words)
    vocabulary = learn("word", [text])
    assert isinstance(vocabulary, Words)
    counts = Counter(word for word in text.split() if word not in ("<eos>", "<unk>"))
    ranked = [word for word in vocabulary.words[2:] if word in counts]
    assert ranked == sorted(counts, key=lambda word: (-counts[word], word))
    assert vocabulary.decode(vocabulary.encode(text)).split() == [word for word in text.split() if word != "<eos>"]


VOCABULARIES = [
    Bytes(),
    Characters("\n aé\U0001f600"),
    Characters("ab", unknown=False),
    learn("word", ["z y\nz \u2028 \ud7ff"]),
    learn("bpe", ["so so la la\n" * 9], size=262),
]


@pytest.mark.parametrize("vocabulary", VOCABULARIES, ids=lambda one: f"{one.level}-{one.size}")
def test_a_vocabulary_is_saved_and_read_again(tmp_path: Path, vocabulary):
    save(vocabulary, tmp_path / "vocabulary.json")
    again = load(tmp_path / "vocabulary.json")
    assert again == vocabulary
    assert digest(again) == digest(vocabulary)
    assert [again == other for other in VOCABULARIES].count(True) == 1
    assert (again.encode("ab") == vocabulary.encode("ab")).all()


@pytest.mark.parametrize(
    "said",
    ["{", "[]", "{}", '{"level": "letters"}', '{"level": "word", "words": ["a"]}', '{"level": "char", "alphabet": ""}'],
)
def test_a_file_without_a_vocabulary_is_refused(tmp_path: Path, said: str):
    (tmp_path / "vocabulary.json").write_text(said)
    with pytest.raises(ValueError, match=r"vocabulary\.json holds no vocabulary: .*\. Give one that usmoe wrote"):
        load(tmp_path / "vocabulary.json")


def test_ids_are_of_the_smallest_type_that_holds_them(tmp_path: Path):
    for size, dtype in ((256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)):
        with array.writing(tmp_path / "tokens.npy", size) as write:
            write(np.array([0, 1]))
            write(np.array([size - 1]))
        tokens = array.reading(tmp_path / "tokens.npy", 3)
        assert tokens.dtype == dtype
        assert tokens.tolist() == [0, 1, size - 1]


def test_another_text_is_encoded_by_a_given_vocabulary(tmp_path: Path):
    given = prepare(at(folder(tmp_path / "one"), level="word"), tmp_path / "cache").vocabulary
    other = folder(tmp_path / "other", {"test": "the bird sat\n"})
    made = prepare(at(other), tmp_path / "cache", vocabulary=given)
    assert made.vocabulary == given
    assert made.corpus.level == "word"
    assert made.test.tolist() == [3, 1, 2, 0]
    with pytest.raises(ValueError, match=r"was prepared without train: it has test\. Add its text"):
        _ = made.train
    with pytest.raises(ValueError, match=r"asks for level=byte and .* given vocabulary has level=word and 7 tokens"):
        prepare(at(other, level="byte"), tmp_path / "cache", vocabulary=given)
    with pytest.raises(ValueError, match="vocabulary_size=5, and the given vocabulary has level=word and 7 tokens"):
        prepare(at(other, level="word", vocabulary_size=5), tmp_path / "cache", vocabulary=given)
    assert prepare(at(other, level="word", vocabulary_size=9), tmp_path / "cache", vocabulary=given).test.size == 4
    large = Words(("<eos>", "<unk>", "bird", "sat", "the", "x", "AAA"))  # as large as the one before
    assert prepare(at(other), tmp_path / "cache", vocabulary=large).test.tolist() == [4, 2, 3, 0]


def test_only_the_splits_that_are_wanted_are_prepared(tmp_path: Path):
    place = folder(tmp_path / "mine")
    made = prepare(at(place, level="word"), tmp_path / "cache", splits=["test"])
    assert set(made.tokens) == {"test"}
    assert made.vocabulary.size == 7  # learned from the training split all the same
    assert set(prepare(at(place, level="word"), tmp_path / "cache").tokens) == {"train", "validation", "test"}
    with pytest.raises(ValueError, match=r"splits=\('dev',\) are not splits. Choose from train, validation, test"):
        prepare(at(place), tmp_path / "cache", splits=["dev"])
