"""Corpora by name: as they are published, downloaded, found in a folder, and as they really are."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from small_corpora import ABC, SHARED, at, folder, shared
from usmoe.data import hub
from usmoe.data import vocabulary as vocabularies
from usmoe.data.corpus import Corpus
from usmoe.data.prepare import prepare, prepared_before
from usmoe.data.sources import find_source

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
