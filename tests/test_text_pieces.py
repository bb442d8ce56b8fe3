"""A text in pieces: one file cut into splits, and what is read of it at a time."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from small_corpora import at, folder
from usmoe.data.corpus import Corpus
from usmoe.data.prepare import prepare
from usmoe.data.text import FilePart, Text, between_words, cut, decoded, of_length

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
