"""A model that was saved with routers means the same to every command: it runs under them, `own` is its own choice."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import usmoe
from tiny import tiny, tokenizer
from usmoe.cli.app import app
from usmoe.evaluate.run import router_of
from usmoe.hf.load import load, load_model, saved_with

NAMES = ["model.layers.0.mlp", "model.layers.1.mlp"]
SAVED = usmoe.USMoE(k=0.5)


def mine(logits, valid=None, **kw):
    return usmoe.TokenChoice(k=1)(logits, valid, **kw)


def folder_of(path: Path, router=None) -> Path:
    model = tiny() if router is None else usmoe.patch(tiny(), router)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def saved(tmp_path) -> Path:
    return folder_of(tmp_path / "saved", SAVED)


@pytest.fixture
def plain(tmp_path) -> Path:
    return folder_of(tmp_path / "plain")


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("It was a dark and stormy night. " * 60)
    return path


def usmoe_says(*words: object):
    said = CliRunner().invoke(app, [str(word) for word in words])
    assert not said.exit_code, said.exception
    return said


def first_line(said) -> str:
    return next(line for line in said.stderr.splitlines() if line.startswith("usmoe:"))


def test_a_model_is_loaded_with_its_routers_unless_another_is_given(saved, plain):
    assert usmoe.routers(load(saved)[0]) == dict.fromkeys(NAMES, SAVED)
    assert usmoe.routers(load_model(saved, router=usmoe.OwnChoice())) == dict.fromkeys(NAMES, usmoe.OwnChoice())
    assert usmoe.routers(load_model(saved, router={})) == {} == usmoe.routers(load_model(plain))
    assert saved_with(saved) == dict.fromkeys(NAMES, str(SAVED))
    assert saved_with(plain) == {} == saved_with("shipped")


def experts(folder, text, *words) -> list[float]:
    said = usmoe_says("route", text, "--model", folder, "--json", *words)
    return [layer["experts_per_token"] for layer in json.loads(said.stdout)["layers"]]


def test_route_shows_what_the_model_does(saved, plain, text):
    own = experts(plain, text)
    assert own != experts(saved, text) == experts(plain, text, "--router", SAVED) == [0.5, 0.5]
    assert experts(saved, text, "--router", "saved") == experts(saved, text)
    assert experts(saved, text, "--router", "own") == own == experts(plain, text, "--router", "own")
    assert experts(saved, text, "--router", "token_choice(k=1)") == [1, 1]


@pytest.mark.parametrize("words", [(), ("--router", "own"), ("--router", "saved"), ("--router", "usmoe(k=1)")])
def test_every_command_says_what_a_model_was_saved_with(words, saved, text, tmp_path):
    for command in (
        ("route", text, "--model", saved),
        ("embed", saved, text, "-o", tmp_path / "vectors.npy", "--force"),
    ):
        assert f"was saved with the router {SAVED} in its 2 MoE layers" in first_line(usmoe_says(*command, *words))


@pytest.mark.parametrize("command", [("info",), ("patch", "--check")])
def test_info_and_check_show_them_a_layer(command, saved, plain):
    said = usmoe_says(command[0], saved, *command[1:], "--json")
    assert [row["saved_with"] for row in json.loads(said.stdout)["layers"]] == [str(SAVED)] * 2
    assert str(SAVED) in first_line(said)
    said = usmoe_says(command[0], plain, *command[1:], "--json")
    assert "saved with" not in said.stderr
    assert all("saved_with" not in row for row in json.loads(said.stdout)["layers"])


TABLES = {
    "patch": ("--router", "token_choice(k=1)", "--positions", 0),
    "tune": ("--budget", "0.5x"),
    "demo": ("--positions", 0),
}


@pytest.mark.parametrize("command", TABLES)
def test_a_table_has_a_row_of_them(command, saved, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ("--model", saved) if command == "demo" else (saved,)
    size = ("--text", text, "--tokens", 128, "--length", 32, "--json")
    said = usmoe_says(command, *given, *TABLES[command], *size)
    rows = {row["label"]: row for row in json.loads(said.stdout)["rows"]}
    assert rows["the routers it was saved with"]["router"] == str(SAVED)
    assert rows["the routers it was saved with"]["experts_mean"] == pytest.approx(
        16 / 31
    )  # floor(0.5 * 31 + 0.5) of 31
    assert next(iter(rows)) == "the model's own choice"
    assert next(iter(rows.values()))["experts_mean"] > 1
    assert "a row of the table is theirs" in first_line(said)


def vectors(folder, text, tmp_path, *words) -> np.ndarray:
    usmoe_says("embed", folder, text, "-o", tmp_path / "vectors.npy", "--force", *words)
    return np.load(tmp_path / "vectors.npy")


def test_embed_tells_own_from_saved(saved, plain, text, tmp_path):
    own = vectors(plain, text, tmp_path)
    assert np.allclose(vectors(saved, text, tmp_path, "--router", "own"), own, atol=1e-5)
    kept = vectors(saved, text, tmp_path)
    assert np.array_equal(kept, vectors(saved, text, tmp_path, "--router", "saved"))
    assert not np.allclose(kept, own, atol=1e-3)


def test_own_in_an_evaluation_is_the_models_own_choice_and_saved_what_it_was_saved_with():
    assert router_of("own") is None
    assert router_of("own", True) == usmoe.OwnChoice() == usmoe.parse_router("own")
    assert router_of("saved", True) is None
    with pytest.raises(ValueError, match="saved without routers"):
        router_of("saved")


@pytest.mark.parametrize("command", ["route", "embed", "patch"])
def test_saved_is_refused_where_nothing_was(command, plain, text, tmp_path):
    words = {
        "route": (text, "--model", plain),
        "embed": (plain, text, "-o", tmp_path / "x.npy"),
        "patch": (plain, "--text", text, "--tokens", 64, "--length", 16),
    }[command]
    said = CliRunner().invoke(app, [command, *map(str, words), "--router", "saved"])
    assert said.exit_code
    assert "was saved without routers" in str(said.exception)


def test_code_of_its_authors_own_is_named_and_the_rest_is_shown(tmp_path, text):
    folder = folder_of(tmp_path / "mine", mine)
    for words in (("info", folder), ("patch", folder, "--check")):
        assert "test_saved_commands:mine (code of its author's own)" in first_line(usmoe_says(*words))
    shown = usmoe_says(
        "patch", folder, "--router", "usmoe(k=1)", "--text", text, "--tokens", 64, "--length", 16, "--json"
    )
    assert len(json.loads(shown.stdout)["rows"]) == 2
    assert "not run from a file" in shown.stderr
    refused = CliRunner().invoke(app, ["route", str(text), "--model", str(folder)])
    assert refused.exit_code
    assert "does not run from a file" in str(refused.exception)
    assert experts(folder, text, "--router", "test_saved_commands:mine") == [1, 1]


def test_shipped_is_a_name_in_every_place():
    for words in (("route", "--model", "shipped", "--tokens", 8), ("info", "shipped")):
        assert usmoe_says(*words).stdout
    named, unnamed = usmoe.Encoder("shipped"), usmoe.Encoder()
    texts = ["a dark night", "a ship"]
    assert np.array_equal(named.encode(texts, progress=False), unnamed.encode(texts, progress=False))
    assert named.source == unnamed.source
    assert usmoe.from_pretrained("shipped").dtype == torch.bfloat16
