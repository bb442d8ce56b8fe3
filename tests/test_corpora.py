"""Text corpora: found, cut into splits, encoded by a vocabulary, and prepared once."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from usmoe.data import array, hub
from usmoe.data import prepare as prepare_module
from usmoe.data import vocabulary as vocabularies
from usmoe.data.corpus import Corpus
from usmoe.data.prepare import prepare, prepared_before
from usmoe.data.sources import find_source
from usmoe.data.text import FilePart, Text, between_words, cut, decoded, of_length
from usmoe.data.vocabulary import Bytes, Characters, Words, digest, learn, load, save

SHARED = Path(__file__).parents[2] / "shared" / "data"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not here")

ABC = {"train": "the cat sat\nthe dog sat\n", "valid": "the cat ran\n", "test": "a dog sat\n"}


def folder(place: Path, texts: dict[str, str] = ABC, ending: str = ".txt") -> Path:
    place.mkdir(parents=True, exist_ok=True)
    for split, text in texts.items():
        packed = gzip.compress(text.encode()) if ending.endswith(".gz") else text.encode()
        (place / f"{split}{ending}").write_bytes(packed)
    return place


def at(path: Path, **settings) -> Corpus:
    return Corpus(source=str(path), **settings)


# ------------------------------------------------------------------------------------------- what is prepared


def test_bytes_of_a_folder_of_text_files(tmp_path: Path):
    made = prepare(at(folder(tmp_path / "mine")), tmp_path / "cache")
    assert made.train.tobytes() == b"the cat sat\nthe dog sat\n"
    assert made.validation.tobytes() == b"the cat ran\n"
    assert made.test.tobytes() == b"a dog sat\n"
    assert isinstance(made.train, np.memmap)
    assert made.train.dtype == np.uint8
    assert (made.unit, made.units) == ("character", {"train": 24, "validation": 12, "test": 10})
    assert made.vocabulary == Bytes()
    assert made.corrupted == {"train": 0, "validation": 0, "test": 0}
    assert made.source == "mine, from train.txt, valid.txt, test.txt"
    assert made.folder == tmp_path / "cache" / f"mine-{made.digest}"
    names = {"vocabulary.json", "train.npy", "validation.npy", "test.npy", "manifest.json"}
    assert {path.name for path in made.folder.iterdir()} == names


def test_words_of_a_folder_of_text_files(tmp_path: Path):
    """the 2, sat 2, then cat and dog 1 by code points; the test's word a is unknown, its line end is <eos>."""
    made = prepare(at(folder(tmp_path / "mine"), level="word"), tmp_path / "cache")
    assert made.vocabulary == Words(("<eos>", "<unk>", "sat", "the", "cat", "dog", "AAA"))
    assert made.train.tolist() == [3, 4, 2, 0, 3, 5, 2, 0]
    assert made.test.tolist() == [1, 5, 2, 0]
    assert made.vocabulary.decode(made.test) == "<unk> dog sat\n"
    assert (made.unit, made.units) == ("word", {"train": 8, "validation": 4, "test": 4})


def test_characters_of_a_folder_of_text_files(tmp_path: Path):
    made = prepare(at(folder(tmp_path / "mine"), level="char"), tmp_path / "cache")
    assert made.vocabulary == Characters("\n acdeghost", unknown=True)
    assert made.vocabulary.decode(made.validation) == "the cat \ufffda\ufffd\n"
    assert (made.unit, made.units["train"]) == ("character", 24)


def test_bpe_of_a_folder_of_text_files(tmp_path: Path):
    texts = {"train": "der Fluß ist über die Ufer\n" * 40, "valid": "Fluß\n", "test": "über Ufer \U0001f600\n"}
    made = prepare(at(folder(tmp_path / "mine", texts), level="bpe", vocabulary_size=270), tmp_path / "cache")
    assert made.vocabulary.size == 270
    assert made.train.dtype == np.uint16
    assert made.vocabulary.decode(made.test) == texts["test"]
    assert (made.unit, made.units["test"]) == ("byte", len(texts["test"].encode()))
    assert len(made.train) < 0.6 * made.units["train"]
    tokenizer = made.vocabulary.for_transformers(64)  # pyright: ignore[reportAttributeAccessIssue]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (0, 1, 64)
    assert tokenizer(texts["test"])["input_ids"] == made.test.tolist()


@pytest.mark.parametrize("ending", [".txt", ".txt.gz", ".txt.raw.gz", ".tokens", ".text.gz", ""])
def test_the_same_text_packed_in_another_way_gives_the_same_tokens(tmp_path: Path, ending: str):
    made = prepare(at(folder(tmp_path / "mine", ending=ending), level="word"), tmp_path / "cache")
    assert made.train.tolist() == [3, 4, 2, 0, 3, 5, 2, 0]


def test_rows_of_parquet_are_lines_whether_they_end_so_or_not(tmp_path: Path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "mine").mkdir()
    for split, rows in {
        "train-00000-of-00002": ["", " the cat sat \n"],
        "train-00001-of-00002": ["the dog sat"],
        "validation": ["the cat\n"],
        "test": ["dog"],
    }.items():
        pq.write_table(pa.table({"text": rows}), tmp_path / "mine" / f"{split}.parquet")
    made = prepare(at(tmp_path / "mine", level="word"), tmp_path / "cache")
    assert made.vocabulary.decode(made.train) == "\nthe cat sat\nthe dog sat\n"
    pq.write_table(pa.table({"texts": ["a"]}), tmp_path / "mine" / "test.parquet")
    with pytest.raises(ValueError, match=r"test\.parquet cannot be read as parquet: it has no column text, but texts"):
        prepare(at(tmp_path / "mine", level="word"), tmp_path / "cache")


def test_a_last_line_without_an_end_is_a_line(tmp_path: Path):
    made = prepare(at(folder(tmp_path / "mine", {**ABC, "test": "the\ncat"}), level="word"), tmp_path / "cache")
    assert made.vocabulary.decode(made.test) == "the\ncat\n"


def test_the_most_frequent_words_are_kept(tmp_path: Path):
    made = prepare(at(folder(tmp_path / "mine"), level="word", vocabulary_size=5), tmp_path / "cache")
    assert made.vocabulary == Words(("<eos>", "<unk>", "sat", "the", "AAA"))
    assert made.train.tolist() == [3, 1, 2, 0, 3, 1, 2, 0]


def test_a_word_of_the_text_may_be_AAA(tmp_path: Path):
    texts = {**ABC, "train": "AAA AAA b\n"}
    made = prepare(at(folder(tmp_path / "mine", texts), level="word"), tmp_path / "cache")
    assert made.vocabulary == Words(("<eos>", "<unk>", "AAA", "b"))


# ----------------------------------------------------------------------------------------------- one file


def test_one_file_is_cut_from_the_end(tmp_path: Path):
    (tmp_path / "book.txt").write_bytes(bytes(range(65, 85)) * 5)
    made = prepare(at(tmp_path / "book.txt", split=(0.1, 0.2)), tmp_path / "cache")
    assert {split: len(tokens) for split, tokens in made.tokens.items()} == {"train": 70, "validation": 10, "test": 20}
    assert np.concatenate([made.train, made.validation, made.test]).tobytes() == bytes(range(65, 85)) * 5


def test_a_cut_falls_between_lines_between_words_or_between_characters(tmp_path: Path):
    def pieces(text: str, level: str) -> list[str]:
        (tmp_path / "text").write_text(text, encoding="utf-8")
        parts = cut(Text(parts=(FilePart(tmp_path / "text"),)), (0.5, 0.25), level)  # pyright: ignore
        return ["".join(decoded(part)) for part in parts]

    assert pieces("ab\ncdefg\nhij\nk\n", "word") == ["ab\ncdefg\n", "hij\n", "k\n"]
    assert pieces("ab cdefg hij k l", "bpe") == ["ab cdefg ", "hij ", "k l"]
    assert pieces("aéüxö", "char") == ["aéü", "x", "ö"]  # bytes a éé üü x öö: cuts at 4 of 8, within ü, and at 6
    assert pieces("abcdefgh", "char") == ["abcd", "ef", "gh"]


@given(
    text=st.text(alphabet="aé\n \u3000\U0001f600", max_size=40),
    shares=st.tuples(st.floats(0.01, 0.6), st.floats(0.01, 0.39)),
    level=st.sampled_from(["byte", "char", "word", "bpe"]),
)
def test_cuts_lose_nothing_and_leave_characters_whole(tmp_path_factory, text: str, shares, level):
    path = tmp_path_factory.getbasetemp() / "cuts"
    path.write_text(text, encoding="utf-8", newline="")
    parts = cut(Text(parts=(FilePart(path),)), shares, level)
    pieces = [b"".join(part.blocks()) for part in parts]
    assert b"".join(pieces) == text.encode()
    if level == "byte":
        total = len(text.encode())
        assert len(pieces[0]) == round(shares[0] * total)
    else:
        assert "".join(piece.decode() for piece in pieces) == text


def test_a_stretch_over_several_files(tmp_path: Path):
    folder(tmp_path, {"a": "0123", "b": "4567", "c": "89"})
    text = Text(parts=tuple(FilePart(tmp_path / f"{name}.txt") for name in "abc"), start=2, stop=9)
    assert b"".join(text.blocks()) == b"2345678"
    assert b"".join(Text(parts=text.parts, start=1, stop=3).blocks()) == b"12"


def test_an_archive_of_one_file_is_read(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "enwik8.zip", "w") as packed:
        packed.writestr("enwik8", "x" * 200)
    made = prepare(Corpus(source="enwik8"), tmp_path / "cache", data=tmp_path / "enwik8.zip")
    assert made.units == {"train": 180, "validation": 10, "test": 10}
    with zipfile.ZipFile(tmp_path / "enwik8.zip", "a") as packed:
        packed.writestr("other", "x")
    with pytest.raises(ValueError, match=r"enwik8\.zip cannot be read: it packs 2 files, and a text is one"):
        prepare(Corpus(source="enwik8"), tmp_path / "cache", data=tmp_path / "enwik8.zip")


# ------------------------------------------------------------------------------------------ pieces of text


@given(words=st.lists(st.text(alphabet="ab \n\u3000", max_size=7), max_size=9))
def test_pieces_end_between_words_and_lose_nothing(words: list[str]):
    pieces = list(between_words(words))
    assert "".join(pieces) == "".join(words)
    assert all(piece[-1].isspace() for piece in pieces[:-1])
    assert all(pieces)
    assert list(of_length(words, 3)) == ["".join(words)[n : n + 3] for n in range(0, len("".join(words)), 3)]


def test_tokens_do_not_depend_on_how_much_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = "äöü wort\n zwei a  \t drei" * 30
    place = folder(tmp_path / "mine", {"train": text, "valid": text, "test": text})
    for number, settings in enumerate(
        ({}, {"level": "char"}, {"level": "word"}, {"level": "bpe", "vocabulary_size": 300})
    ):
        corpus = at(place, corrupt_mode="insert", corrupt_rate=0.3, **settings)
        monkeypatch.setattr("usmoe.data.text.BLOCK", 1 << 21)
        whole = prepare(corpus, tmp_path / f"whole{number}")
        monkeypatch.setattr("usmoe.data.text.BLOCK", 5)
        small = prepare(corpus, tmp_path / f"small{number}")
        assert small.vocabulary == whole.vocabulary
        assert small.corrupted == whole.corrupted
        assert small.units == whole.units
        assert all((small.tokens[split] == whole.tokens[split]).all() for split in whole.tokens)


# ------------------------------------------------------------------------------------------- vocabularies


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


# --------------------------------------------------------------------------------------------- corruption


def test_the_test_split_alone_is_corrupted_and_AAA_is_known(tmp_path: Path):
    place = folder(tmp_path / "mine")
    clean = prepare(at(place, level="word"), tmp_path / "cache")
    made = prepare(at(place, level="word", corrupt_mode="replace", corrupt_rate=1), tmp_path / "cache")
    assert made.vocabulary == clean.vocabulary
    assert made.corrupted == {"train": 0, "validation": 0, "test": 3}
    assert made.vocabulary.decode(made.test) == "AAA AAA AAA\n"
    assert (made.train == clean.train).all()
    assert made.digest != clean.digest


def test_a_corrupted_training_split_gives_the_vocabulary_of_the_clean_one(tmp_path: Path):
    place = folder(tmp_path / "mine")
    corpus = at(place, level="word", corrupt_mode="insert", corrupt_rate=0.5, corrupt_splits=["train", "test"])
    made = prepare(corpus, tmp_path / "cache")
    assert corpus.corrupt_splits == ("train", "test")
    assert made.vocabulary == prepare(at(place, level="word"), tmp_path / "cache").vocabulary
    assert made.corrupted["train"] == made.train.tolist().count(6) > 0
    assert len(made.train) == 8 + made.corrupted["train"]


def test_splits_are_corrupted_each_in_its_own_way(tmp_path: Path):
    place = folder(tmp_path / "mine", dict.fromkeys(ABC, "a b c d e f g h\n" * 9))
    corpus = at(place, corrupt_mode="replace", corrupt_rate=0.5, corrupt_splits=["validation", "test"])
    made = prepare(corpus, tmp_path / "cache")
    assert made.validation.tobytes() != made.test.tobytes()
    again = prepare(dataclasses.replace(corpus, corrupt_seed=1), tmp_path / "cache")
    assert again.test.tobytes() != made.test.tobytes()


def test_text8_has_no_A(tmp_path: Path):
    texts = {"train": "the quick fox " * 9, "valid": "the fox", "test": " the fox"}
    made = prepare(
        Corpus(source="text8", corrupt_mode="insert", corrupt_rate=1),
        tmp_path / "cache",
        data=folder(tmp_path / "text8", texts),
    )
    assert made.vocabulary == Characters(" abcdefghijklmnopqrstuvwxyz", unknown=False)
    assert made.vocabulary.size == 27
    assert made.vocabulary.decode(made.test) == " aaa the aaa fox"
    folder(tmp_path / "text8", {**texts, "valid": "the Fox"})
    with pytest.raises(
        ValueError, match=r"The validation split of .*text8/valid\.txt: The text holds 'F', which is none"
    ):
        prepare(Corpus(source="text8"), tmp_path / "cache", data=tmp_path / "text8")
    greek = folder(tmp_path / "greek", dict.fromkeys(ABC, "ψλω"))
    with pytest.raises(ValueError, match="The alphabet has neither A nor a"):
        prepare(at(greek, level="char", corrupt_mode="insert"), tmp_path / "cache")


def test_bytes_that_are_no_text_are_corrupted_and_read(tmp_path: Path):
    (tmp_path / "raw").write_bytes(b"\xff\xfe \x80\n" * 40)
    made = prepare(at(tmp_path / "raw", corrupt_mode="replace", corrupt_rate=1), tmp_path / "cache")
    assert made.test.tobytes() == b"AAA AAA\n" * 2
    with pytest.raises(ValueError, match=r"raw is no UTF-8 in line 1: invalid start byte\. Save it as UTF-8"):
        prepare(at(tmp_path / "raw", level="char"), tmp_path / "cache")


# --------------------------------------------------------------------------------------------- named corpora


def test_lm1b_as_it_is_published(tmp_path: Path):
    """One sentence a line; the first file held out is the test, the second ours to validate on."""
    pytest.importorskip("datasets")
    place = tmp_path / "1-billion-word-language-modeling-benchmark-r13output"
    train, held_out = (
        place / "training-monolingual.tokenized.shuffled",
        place / "heldout-monolingual.tokenized.shuffled",
    )
    for where, names in (
        (train, ("news.en-{:05}-of-00100", 1, 4)),
        (held_out, ("news.en.heldout-{:05}-of-00050", 0, 3)),
    ):
        where.mkdir(parents=True)
        for number in range(*names[1:]):
            (where / names[0].format(number)).write_text(f"Sentence {number} .\nNext .\n")
    made = prepare(Corpus(source="lm1b"), tmp_path / "cache", data=tmp_path)
    assert made.corpus.reads == "word"
    assert made.vocabulary.decode(made.train) == "".join(f"Sentence {n} .\nNext .\n" for n in (1, 2, 3))
    assert made.vocabulary.decode(made.test) == "Sentence <unk> .\nNext .\n"
    assert made.vocabulary.decode(made.validation) == "Sentence 1 .\nNext .\n"
    assert made.source.endswith(
        "from news.en-00001-of-00100, news.en-00002-of-00100, news.en-00003-of-00100 and 2 more"
    )


def test_lm1b_as_the_hub_has_it(tmp_path: Path):
    """No validation split: the test and the validation split are the first two fiftieths of the sentences held out."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "lm1b").mkdir()
    for split, count in {"train": 30, "test": 100}.items():
        pq.write_table(pa.table({"text": [f"w{n:03} ." for n in range(count)]}), tmp_path / "lm1b" / f"{split}.parquet")
    made = prepare(Corpus(source="lm1b", level="byte"), tmp_path / "cache", data=tmp_path)
    assert made.test.tobytes() == b"w000 .\nw001 .\n"
    assert made.validation.tobytes() == b"w002 .\nw003 .\n"
    assert len(made.train) == 30 * 7


def test_a_corpus_of_the_hub_is_loaded_as_it_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*names, **settings):
        asked.append((names, settings))
        rows = {"train": ["", " = A = \n", " the the a \n"], "validation": [" the \n"], "test": [" a b \n"]}
        return datasets.Dataset.from_dict({"text": rows[settings["split"]]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"wikitext103 is not prepared in .*, and offline there is no download"):
        prepare(Corpus(source="wikitext103"), tmp_path, offline=True)
    assert not asked
    made = prepare(Corpus(source="wikitext103"), tmp_path)
    assert made.vocabulary.decode(made.train) == "\n= A =\nthe the a\n"
    assert made.vocabulary.decode(made.test) == "a <unk>\n"
    assert asked[0][0] == ("Salesforce/wikitext", "wikitext-103-v1")
    said = capsys.readouterr()
    assert said.err == "wikitext103: downloading Salesforce/wikitext wikitext-103-v1, about 0.3 GB.\n"
    assert said.out == ""
    asked.clear()
    assert prepare(Corpus(source="wikitext103"), tmp_path, offline=True).digest == made.digest
    assert not asked
    assert not capsys.readouterr().err


def test_an_archive_is_downloaded_where_it_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    datasets = pytest.importorskip("datasets")
    with zipfile.ZipFile(tmp_path / "0123abcd", "w") as packed:
        packed.writestr("enwik8", "y" * 100)

    def download(_, place: str) -> str:
        assert place == "http://mattmahoney.net/dc/enwik8.zip"
        return str(tmp_path / "0123abcd")

    monkeypatch.setattr(datasets.DownloadManager, "download", download)
    assert prepare(Corpus(source="enwik8"), tmp_path / "cache").units == {"train": 90, "validation": 5, "test": 5}
    assert capsys.readouterr().err == "enwik8: downloading http://mattmahoney.net/dc/enwik8.zip, about 36 MB.\n"


def test_lm1b_is_downloaded_as_the_hub_converted_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(place: str, configuration: str | None, *, data_files, revision: str, split: str):
        assert (place, configuration) == ("billion-word-benchmark/lm1b", None)
        assert (revision, data_files[split]) == ("refs/convert/parquet", f"plain_text/{split}/*.parquet")
        return datasets.Dataset.from_dict({"text": [f"{split} {number:02} ." for number in range(50)]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    made = prepare(Corpus(source="lm1b", level="byte"), tmp_path)
    assert made.test.tobytes() == b"test 00 .\n"
    assert made.validation.tobytes() == b"test 01 .\n"
    assert made.train.tobytes().startswith(b"train 00 .\ntrain 01 .\n")


def test_a_failed_download_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ValueError, match=r"^lm1b cannot be had from billion-word-benchmark/lm1b: Couldn't reach the Hub\. Get"
    ):
        prepare(Corpus(source="lm1b"), tmp_path)
    assert not list(tmp_path.glob("lm1b*"))


def test_an_archive_that_is_not_reached_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where there is no way to it, datasets says its URL and nothing else."""
    datasets = pytest.importorskip("datasets")

    def download(_, place: str) -> str:
        raise FileNotFoundError(place)

    monkeypatch.setattr(datasets.DownloadManager, "download", download)
    with pytest.raises(
        ValueError, match=r"cannot be had from http://mattmahoney.net/dc/text8.zip: it is not there, or"
    ):
        prepare(Corpus(source="text8"), tmp_path)


def test_what_was_prepared_is_found_again_by_its_digest_alone(tmp_path: Path):
    corpus = at(folder(tmp_path / "mine"), level="word")
    made = prepare(corpus, tmp_path / "cache")
    prepare(at(folder(tmp_path / "other", {**ABC, "test": "other"}), level="word"), tmp_path / "cache")
    shutil.rmtree(tmp_path / "mine")
    found = prepared_before(corpus, tmp_path / "cache", made.digest)
    assert found is not None
    assert (found.folder, found.digest, found.vocabulary) == (made.folder, made.digest, made.vocabulary)
    assert found.test.tolist() == made.test.tolist()
    assert prepared_before(corpus, tmp_path / "cache", "0" * 12) is None
    assert prepared_before(corpus, tmp_path / "none", made.digest) is None
    (made.folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        prepared_before(corpus, tmp_path / "cache", made.digest)


def test_a_named_corpus_is_found_by_manifest_then_by_name(tmp_path: Path):
    folder(tmp_path / "wiki" / "enwik8", {**ABC, "test": "by manifest"})
    folder(tmp_path / "wiki" / "later", {**ABC, "test": "inner"})
    folder(tmp_path / "enwik8", {**ABC, "test": "by name"})
    (tmp_path / "wiki" / "manifest.json").write_text(
        '{"hub": "http://mattmahoney.net/dc/enwik8.zip (100 MB)", "cut": "1 KB"}'
    )

    def test(source: str, data: Path) -> bytes:
        return prepare(Corpus(source=source), tmp_path / "cache", data=data).test.tobytes()

    assert test("enwik8", tmp_path) == b"by manifest"
    assert test("enwik8", tmp_path / "wiki") == b"by manifest"
    assert test("enwik8/later", tmp_path) == b"inner"
    assert test("enwik8", tmp_path / "enwik8") == b"by name"
    made = prepare(Corpus(source="enwik8/later"), tmp_path / "cache", data=tmp_path)
    assert made.source == "enwik8/later, from train.txt, valid.txt, test.txt (its manifest: 1 KB)"
    with pytest.raises(ValueError, match=r"has no folder 'earlier'\. Its folders are: enwik8, later\. Choose"):
        test("enwik8/earlier", tmp_path)
    with pytest.raises(ValueError, match=r"enwik8/later is a folder in a copy of enwik8, and no copy is given"):
        prepare(Corpus(source="enwik8/later"), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"has nothing that stands for lm1b\. It has: cache, enwik8, wiki\. Name it"):
        test("lm1b", tmp_path)
    (tmp_path / "enwik8" / "manifest.json").write_text('{"hub": "http://mattmahoney.net/dc/enwik8.zip"}')
    with pytest.raises(ValueError, match="both stand for enwik8"):
        test("enwik8", tmp_path)


def test_bytes_are_read_before_their_numbers(tmp_path: Path):
    """The customary script for enwik8 leaves train.txt.raw, and train.txt with the bytes as numbers."""
    place = folder(folder(tmp_path / "enwik8", dict.fromkeys(ABC, "116 104 101")), ABC, ".txt.raw")
    assert prepare(Corpus(source="enwik8"), tmp_path / "cache", data=place).test.tobytes() == b"a dog sat\n"


def test_lists_of_json_make_the_same_corpus():
    corpus = Corpus(source="x", split=(0.1, 0.1), corrupt_mode="insert", corrupt_splits=("train", "test"))
    again = Corpus(**json.loads(json.dumps(dataclasses.asdict(corpus))))
    assert again == corpus
    assert hash(again) == hash(corpus)


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"source": ""}, r"The source is empty\. Give enwik8, text8, wikitext103, lm1b"),
        ({"level": "letter"}, r"level='letter' is not possible\. Give one of byte, char, word, bpe"),
        ({"level": "bpe"}, r"vocabulary_size=None makes no BPE: it needs 258 tokens at least"),
        ({"level": "bpe", "vocabulary_size": 257}, r"vocabulary_size=257 makes no BPE"),
        ({"level": "char", "vocabulary_size": 50}, r"vocabulary_size=50 means nothing at the level 'char'"),
        ({"level": "word", "vocabulary_size": 3}, r"vocabulary_size=3 leaves room for no word"),
        ({"split": (0.5, 0.5)}, r"split=\(0\.5, 0\.5\) leaves a split empty"),
        ({"split": (0, 0.1)}, r"leaves a split empty"),
        ({"corrupt_mode": "swap"}, r"corrupt_mode='swap' is not possible\. Give one of replace, insert"),
        ({"corrupt_rate": 1.5}, r"corrupt_rate=1\.5 is no share of words"),
        ({"corrupt_splits": ("dev",)}, r"names dev\. Choose from train, validation, test"),
        ({"corrupt_splits": (), "corrupt_mode": "insert"}, r"names no split"),
    ],
)
def test_a_contradiction_is_refused_in_the_words_of_the_field(settings, said: str):
    with pytest.raises(ValueError, match=said):
        Corpus(**{"source": "enwik8", **settings})


def test_what_is_not_there_is_refused(tmp_path: Path):
    def refused(source, said: str, texts: dict[str, str] | None = None, **settings) -> None:
        if texts is not None:
            folder(source, texts)
        with pytest.raises(ValueError, match=said):
            prepare(Corpus(source=str(source), **settings), tmp_path / "cache")

    refused("enwik9", r"no file, folder or corpus 'enwik9'\. Did you mean enwik8\?")
    refused(tmp_path, r"holds no text by the names of splits\. Give a file, or a folder with train\.txt")
    refused(tmp_path / "a", r"^a has no text for test: it has train, validation\. Add", {"train": "a", "val": "b"})
    refused(tmp_path / "b", r"The test split of .* is empty", {**ABC, "test": ""})
    refused(tmp_path / "c", r"The test split of .* is empty", {**ABC, "test": ""}, level="word")
    refused(tmp_path / "d", r"two files of validation: dev\.txt and valid\.txt\. Keep one", {**ABC, "dev": "x"})
    (tmp_path / "e").write_bytes(b"")
    refused(tmp_path / "e", r"The train split of .* is empty")
    (tmp_path / "f.txt").write_bytes(b"good\ngood\n\xe9bad\n" + b"good\n" * 50)
    refused(tmp_path / "f.txt", r"f\.txt is no UTF-8 in line 3: invalid continuation byte", level="word")
    (tmp_path / "g.gz").write_bytes(gzip.compress(bytes(1000))[:-20])
    refused(tmp_path / "g.gz", r"g\.gz cannot be read: .*\. Put a whole copy there")
    with pytest.raises(ValueError, match="There is no folder"):
        find_source(Corpus(source="enwik8"), tmp_path / "nowhere")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


# ------------------------------------------------------------------------------------------------- once, or not


def test_a_corpus_is_prepared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = folder(tmp_path / "mine")
    first = prepare(at(place), tmp_path / "cache")
    monkeypatch.setattr("usmoe.data.prepare._write", None)
    assert prepare(at(place), tmp_path / "cache").digest == first.digest
    (tmp_path / "moved").mkdir()
    place.rename(tmp_path / "moved" / "mine")
    assert prepare(at(tmp_path / "moved" / "mine"), tmp_path / "cache").digest == first.digest


def test_a_changed_text_is_prepared_anew(tmp_path: Path):
    place = folder(tmp_path / "mine")
    first = prepare(at(place), tmp_path / "cache")
    stamp = (place / "test.txt").stat()
    (place / "test.txt").write_text("a cat sat\n")  # as long
    os.utime(place / "test.txt", (stamp.st_atime, stamp.st_mtime))
    again = prepare(at(place), tmp_path / "cache")
    assert again.digest != first.digest
    assert again.test.tobytes() == b"a cat sat\n"
    assert first.test.tobytes() == b"a dog sat\n"


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = folder(tmp_path / "mine")

    def full(_: np.dtype, length: int) -> bytes:
        raise OSError(28, f"No space left on device, after {length} tokens")

    with monkeypatch.context() as patched:
        patched.setattr(array, "_header", full)
        with pytest.raises(OSError, match="No space left on device, after 24 tokens"):
            prepare(at(place), tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    assert prepare(at(place), tmp_path / "cache").test.tobytes() == b"a dog sat\n"


def test_a_killed_preparation_leaves_nothing_that_is_taken_for_whole(tmp_path: Path):
    """Killed after the training split is written; the next call removes what lies there, and prepares."""
    place = folder(tmp_path / "mine")
    code = f"""
import os, signal
from pathlib import Path
from usmoe.data import prepare as module
from usmoe.data.corpus import Corpus
write = module.write_split
def killed(path, split, *rest):
    if split == "validation":
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, split, *rest)
module.write_split = killed
module.prepare(Corpus(source={str(place)!r}), Path({str(tmp_path / "cache")!r}))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    (left,) = (tmp_path / "cache").glob("*.part")
    assert (left / "train.npy").exists()
    made = prepare(at(place), tmp_path / "cache")
    assert made.train.tobytes() == b"the cat sat\nthe dog sat\n"
    assert not list((tmp_path / "cache").glob("*.part"))


def test_of_two_processes_one_prepares_and_the_other_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = folder(tmp_path / "mine")
    code = f"""
import time
from pathlib import Path
from usmoe.data import prepare as module
from usmoe.data.corpus import Corpus
write = module.write_split
def slow(*given):
    time.sleep(0.3)
    return write(*given)
module.write_split = slow
print(module.prepare(Corpus(source={str(place)!r}), Path({str(tmp_path / "cache")!r})).digest)
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    while not list((tmp_path / "cache").glob(".*.part/vocabulary.json")):
        assert other.poll() is None
        time.sleep(0.01)
    monkeypatch.setattr("usmoe.data.prepare._write", None)  # not this one
    made = prepare(at(place), tmp_path / "cache")
    assert other.communicate()[0].strip() == made.digest
    assert made.test.tobytes() == b"a dog sat\n"


def test_without_locks_processes_do_not_disturb_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """While one writes, another one has prepared the same."""
    place, write = folder(tmp_path / "mine"), prepare_module._write

    def no_lock(*_) -> None:
        raise OSError(37, "No locks available")

    def slow(part: Path, *given) -> None:
        assert part.name.endswith(f".{os.getpid()}.part")
        monkeypatch.setattr(prepare_module, "_write", write)
        monkeypatch.setattr(os, "getpid", lambda: 0)
        other = prepare(at(place), tmp_path / "cache")
        write(part, *given)
        (other.folder / "mark").touch()

    monkeypatch.setattr("fcntl.flock", no_lock)
    monkeypatch.setattr(prepare_module, "_write", slow)
    made = prepare(at(place), tmp_path / "cache")
    assert made.test.tobytes() == b"a dog sat\n"
    assert (made.folder / "mark").exists()
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_cache_that_cannot_be_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = folder(tmp_path / "mine")
    made = prepare(at(place), tmp_path / "cache")
    monkeypatch.setattr("usmoe.data.prepare._alone", None)  # which writes a lock
    assert prepare(at(place), tmp_path / "cache").digest == made.digest


def test_a_damaged_preparation_is_refused(tmp_path: Path):
    place = folder(tmp_path / "mine")
    made = prepare(at(place), tmp_path / "cache")
    whole = (made.folder / "test.npy").read_bytes()
    for damaged in (whole[:-3], whole[:50], b""):
        (made.folder / "test.npy").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is damaged: .*\. Delete it, and it is prepared anew"):
            prepare(at(place), tmp_path / "cache")
    np.save(made.folder / "test.npy", np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match=r"is damaged: test\.npy holds 3 tokens, and 10 were written"):
        prepare(at(place), tmp_path / "cache")


# -------------------------------------------------------------------------------------------------- real data


@shared
def test_the_beginning_of_enwik8(tmp_path: Path):
    made = prepare(Corpus(source="enwik8"), tmp_path, data=SHARED)
    assert made.units == {"train": 900_000, "validation": 50_000, "test": 50_000}
    whole = gzip.decompress((SHARED / "enwik8" / "enwik8_first_1000000.gz").read_bytes())
    assert np.concatenate([made.train, made.validation, made.test]).tobytes() == whole
    cut_here = prepare(at(SHARED / "enwik8" / "enwik8_first_1000000.gz"), tmp_path)
    assert all((cut_here.tokens[split] == made.tokens[split]).all() for split in made.tokens)
    assert "bytes 0..999,999 only" in made.source


@shared
def test_the_beginning_of_text8_and_a_later_dump(tmp_path: Path):
    made = prepare(Corpus(source="text8", corrupt_mode="replace"), tmp_path, data=SHARED)
    assert made.vocabulary.size == 27
    assert made.vocabulary.decode(made.train[:40]).startswith(" anarchism originated as a term of abuse")
    words = gzip.decompress((SHARED / "text8" / "text8" / "test.txt.gz").read_bytes()).split()
    assert abs(made.corrupted["test"] - 0.04 * len(words)) < 4 * (0.04 * 0.96 * len(words)) ** 0.5
    assert prepare(Corpus(source="text8/wiki2016"), tmp_path, data=SHARED).units["train"] == 3_119_904


@shared
def test_wikitext103_has_the_published_number_of_words(tmp_path: Path):
    """217,646 and 245,569 with one <eos> a line; from the files of words and from the hub's rows alike."""
    words = prepare(Corpus(source="wikitext103/mini"), tmp_path, data=SHARED).vocabulary
    made = prepare(Corpus(source="wikitext103"), tmp_path, data=SHARED, vocabulary=words)
    assert made.units == {"validation": 217_646, "test": 245_569}
    (tmp_path / "rows").mkdir()
    for split in ("validation", "test"):
        (tmp_path / "rows" / f"{split}.parquet").symlink_to(SHARED / "wikitext103" / f"{split}.parquet")
    rows = prepare(at(tmp_path / "rows"), tmp_path, vocabulary=words)
    assert (rows.validation == made.validation).all()
    assert (rows.test == made.test).all()
    with pytest.raises(ValueError, match="wikitext103 has no text for train: it has validation, test"):
        prepare(Corpus(source="wikitext103"), tmp_path, data=SHARED)


@shared
def test_novels_by_the_name_of_their_folder(tmp_path: Path):
    made = prepare(Corpus(source="novels"), tmp_path, data=SHARED, splits=["test", "validation"])
    assert made.units == {"validation": 2_270_947, "test": 1_467_982}
    assert made.source == "novels, from train.txt.gz, validation.txt.gz, test.txt.gz"


def test_every_named_corpus_says_where_it_is_published():
    assert all(there.place and there.size for there in hub.PUBLISHED.values())
    assert {find_source(Corpus(source=name)).hub for name in hub.PUBLISHED} == {True}
    assert vocabularies.EOS == "<eos>"
