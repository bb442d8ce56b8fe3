"""Text corpora: prepared from files of text, corrupted, refused."""

from __future__ import annotations

import dataclasses
import gzip
from pathlib import Path

import numpy as np
import pytest

from small_corpora import ABC, at, folder
from usmoe.data.corpus import Corpus
from usmoe.data.prepare import prepare
from usmoe.data.sources import find_source
from usmoe.data.vocabulary import Bytes, Characters, Words

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


@pytest.mark.parametrize("ending", [".txt", ".txt.gz", ".txt.raw.gz", ".tokens", ".text.gz", ".TXT.GZ", ""])
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
