"""The vocabulary of a trained model as a tokenizer that transformers loads, and folders that have none."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("transformers", reason="the extra usmoe[hf]")

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, OlmoeConfig
from typer.testing import CliRunner

import usmoe
from families import FAMILIES, configuration
from tiny import tiny
from usmoe.cli.app import app
from usmoe.data.tokenizer import for_transformers
from usmoe.data.vocabulary import Characters, learn
from usmoe.hf.load import load_tokenizer

TEXT = "Der Fluß <eos> a<eos>b\n\n  is\u2028 über\x85 den\xa0Ufern\t\U0001f600 <unk> xy (<eos>) \r\n AAA\n"
LEVELS = {"byte": {}, "char": {}, "word": {}, "word, few": {"size": 6}, "bpe": {"size": 300}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{level: (vocabulary, the tokenizer that transformers loads)}."""
    found = {}
    for name, size in LEVELS.items():
        folder = tmp_path_factory.mktemp("model")
        vocabulary = learn(name.partition(",")[0], [TEXT * 3], **size)  # pyright: ignore[reportArgumentType]
        OlmoeConfig().save_pretrained(folder)
        for_transformers(vocabulary, 64).save_pretrained(folder)
        found[name] = vocabulary, load_tokenizer(folder)
    return found


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=[*TEXT, "\x00", "\x1c", "中"], max_size=40))
def test_the_tokens_are_those_that_the_model_was_trained_on(made, level: str, text: str):
    vocabulary, tokenizer = made[level]
    for one in (TEXT, text):
        ids = vocabulary.encode(one).tolist()
        assert tokenizer(one, verbose=False).input_ids == ids
    assert len(tokenizer) == vocabulary.size
    if level != "word, few" and "<eos>" not in text:  # <eos> within a word is written as a line end
        assert tokenizer.decode(ids) == vocabulary.decode(np.array(ids, dtype=np.int64))


def test_a_closed_alphabet_refuses_other_characters():
    tokenizer = for_transformers(Characters(" abc", unknown=False), 8)
    assert tokenizer("cab a").input_ids == [3, 1, 2, 0, 1]
    with pytest.raises(Exception, match="UNK"):
        tokenizer("d")


EMPTY = ["olmoe", "qwen2_moe", "qwen3_moe", "qwen3_vl_moe", "zaya"]
"""Families of whose folder transformers makes a tokenizer without a vocabulary, in silence."""


@pytest.mark.parametrize("family", EMPTY)
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, family: str, quiet_transformers):
    configuration(FAMILIES[family]).save_pretrained(tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) <= 5
    with pytest.raises(
        ValueError, match=r"has no tokenizer: .* special tokens and no text\. Put the model's tokenizer"
    ):
        load_tokenizer(tmp_path)


def test_every_command_refuses_it_and_another_tokenizer_serves(tmp_path):
    tiny("olmoe").save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("a text\n")
    model, text = str(tmp_path / "model"), str(tmp_path / "a.txt")
    for words in (
        ["embed", model, text, "-o", str(tmp_path / "a.npy")],
        ["route", text, "--model", model],
        ["patch", model, "--router", "usmoe(k=2)", "--text", text],
        ["demo", "--model", model, "--text", text],
        ["tune", model, "--text", text],
    ):
        said = CliRunner().invoke(app, words)
        assert said.exit_code == 1
        assert "has no tokenizer" in str(said.exception)
    empty = AutoTokenizer.from_pretrained(model)
    with pytest.raises(ValueError, match="has no tokenizer"):
        usmoe.Encoder(tiny("olmoe"), tokenizer=empty)
    letters = for_transformers(Characters("".join(sorted(set("a text another\n")))), 64)
    one, other = usmoe.Encoder(model, tokenizer=letters).encode(["a text", "another"], progress=False)
    assert abs(one - other).max() > 1e-3
