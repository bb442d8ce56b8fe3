"""Texts of which a beginning is read: no more is tokenised than that takes, and its tokens are those of the whole."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the extra usmoe[hf]")

import torch
from transformers import PreTrainedTokenizerFast

from tiny import tokenizer as characters
from usmoe.cli import tokens
from usmoe.cli.tokens import corpus, first_tokens, token_ids
from usmoe.data.bpe import Pieces
from usmoe.embed.own_tokenizer import OwnTokenizer
from usmoe.embed.texts import Reader
from usmoe.hf.load import load_tokenizer
from usmoe.models import SAMPLE

BOOK = SAMPLE.read_text(encoding="utf-8")[:20_000]
TEXTS = {
    "a book": BOOK,
    "without spaces": BOOK.replace(" ", ""),
    "spaces": " " * 15_000 + "end",
    "one letter": "a" * 15_000,
    "of another script": "中文字" * 3_000,
    "a quote at the end": BOOK[:9_000] + '"',
    "faces": "\U0001f600" * 3_000 + "x",
}


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, inner):
        self.inner, self.read = inner, 0
        self.is_fast = inner.is_fast

    def __call__(self, text, **options):
        self.read += sum(map(len, text)) if isinstance(text, list) else len(text)
        return self.inner(text, **options)


@pytest.fixture(scope="module", params=["shipped", "characters", "byte-level"])
def tokenizer(request) -> PreTrainedTokenizerFast:
    if request.param == "byte-level":
        return Pieces.learn([BOOK], 600).for_transformers(4096)
    return load_tokenizer() if request.param == "shipped" else characters()


@pytest.mark.parametrize("prompt", ["none", "prompteol"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_long_text_has_the_tokens_that_its_whole_has(tokenizer, text: str, prompt: str):
    counting = Counting(tokenizer)
    read = Reader(own=OwnTokenizer(counting), prompt=prompt, max_length=96)
    ids, cut = read.ids_and_cut([TEXTS[text], "short"])
    assert cut.tolist() == [True, False]
    assert ids[0] == read._cut(*_around(prompt, TEXTS[text]))
    assert counting.read < 2 * len(TEXTS[text]) + 16_000  # of which the whole, here, is one
    counting.read = 0
    read([TEXTS[text] * 50])
    assert counting.read < 3 * len(TEXTS[text])


def _around(prompt: str, text: str) -> tuple[str, str, str]:
    from usmoe.embed.prompts import template_of

    before, after = template_of(prompt)
    return before, text, after


@pytest.mark.parametrize("text", TEXTS)
def test_the_first_tokens_are_those_of_the_whole(tokenizer, text: str):
    whole = token_ids(tokenizer, TEXTS[text])
    pieces = [TEXTS[text][start : start + 777] for start in range(0, len(TEXTS[text]), 777)]
    for most in (1, 16, 200, 100_000):
        assert torch.equal(first_tokens(tokenizer, pieces, most), whole[:most])


def test_no_more_of_a_text_is_read_than_its_first_tokens_take():
    read = []

    def pieces():
        for _ in range(10_000):
            read.append(1)
            yield BOOK[:1_000]

    assert len(first_tokens(load_tokenizer(), pieces(), 16)) == 16
    assert len(read) < 10


def test_of_a_text_that_is_very_long_sequences_are_taken_all_over_it(tmp_path, monkeypatch):
    """LONG is made short: its sequences begin at the ends of words, and reach over the whole text."""
    monkeypatch.setattr(tokens, "LONG", 8_000)
    model = type("Model", (), {"config": type("Config", (), {"max_position_embeddings": 64})})
    path = tmp_path / "long.txt"
    path.write_text("".join(f"n{number:06d} " for number in range(20_000)))
    found = corpus(characters(), model, str(path), 16 * 64, 64)
    assert found.tokens.shape == (16, 64)
    first = ["".join(map(characters().decode, row.tolist())).strip()[1:7] for row in found.tokens]
    assert first == sorted(first)
    assert int(first[0]) < 5_100
    assert int(first[-1]) > 19_000
