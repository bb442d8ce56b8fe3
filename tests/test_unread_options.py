"""What is typed is read, or refused: no option is dropped in silence."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import usmoe
from usmoe.cli import main
from usmoe.embed.settings import EncoderSettings
from usmoe.evaluate.setting import grid


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """refused("embed", ...) -> the one line that refuses it, in a folder of its own with a run and texts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("a text\n")
    (tmp_path / "run").mkdir()
    for name, said in (("config.json", '{"corpus": {}}'), ("vocabulary.json", "{}"), ("log.jsonl", "")):
        (tmp_path / "run" / name).write_text(said)

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["usmoe", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        assert end.value.code, out
        assert out == ""
        (line,) = err.strip().splitlines()
        return line

    return run


EMBED = ("embed", "shipped", "texts.txt", "-o", "x.npy")
EVAL = ("eval", "shipped", "--tasks", "STS12")


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ((*EMBED, "--moee", "concat"), "--moee is not read under --embedding hidden"),  # at its default, and typed
        ((*EMBED, "--w", "2", "--router-features", "logits"), "--router-features, --w are not read under --embedding"),
        ((*EMBED, "--embedding", "hidden", "--layers", "0"), "--layers is not read under --embedding hidden"),
        ((*EMBED, "--embedding", "router", "--moee", "sum"), "--moee is not read under --embedding router"),
        ((*EMBED, "--embedding", "moee", "--w", "2"), "--w is not read under --embedding moee and --moee concat"),
        ((*EVAL, "--w", "1"), "--w is not read under --embeddings hidden and --moee concat"),
        (
            (*EVAL, "--embeddings", "hidden,router", "--moee", "sum"),
            "--moee is not read under --embeddings hidden,router",
        ),
        ((*EVAL, "--fewshot", "0"), "--fewshot is not read: --scoring, --limit, --fewshot and --include belong to"),
        (("eval", "shipped", "--lm-eval", "arc_easy", "--w", "1"), "--w is not read: Options of embeddings belong to"),
        ((*EVAL, "--serve-k", "1"), "--serve-k is of runs, and shipped is none"),
        (
            ("eval", "run", "--limit", "3", "--tasks", "STS12"),
            "--tasks, --limit are of mteb and lm-eval, and run is a run",
        ),
        (("eval", "run", "--force"), "--force is for the file of --markdown, which is not given"),
        (("eval", "run", "--text", "texts.txt", "--split", "test"), "--split is of the run's own corpus"),
        (
            ("patch", "shipped", "--check", "--calibrate"),
            "--calibrate is for a model that is patched, and --check only",
        ),
        (("patch", "shipped", "--check", "--tokens", "64", "--text", "-"), "--text, --tokens are for a model that is"),
        (("patch", "shipped", "--router", "usmoe(k=2)", "--force"), "--force is for the folder of --save"),
        (("tune", "shipped", "--force"), "--force is for --output, --plot and --save, and none is given"),
        (("demo", "--force"), "--force is for the file of --output, which is not given"),
        (("info", "--dtype", "float32"), "--dtype is of a model, and none is given"),
        (
            ("route", "x.npy", "--router", "usmoe(k=1)", "--tokens", "5"),
            "--tokens is of a model and its text, and x.npy",
        ),
        (
            ("route", "x.npy", "--model", "shipped", "--dtype", "float32"),
            "--model, --dtype are of a model and its text",
        ),
        (("finetune", "run", "sst2", "--from-scratch", "--which", "last"), "--which is of the checkpoint's parameters"),
        (("reproduce", "table5", "--list"), "NAME is of one experiment, and --list is of all"),
        (("reproduce", "--list", "--row", "usmoe", "--markdown", "x"), "--row, --markdown are of one experiment"),
        (("reproduce", "table2", "--show", "--data", ".", "--seeds", "1"), "--data, --seeds are of a run, and --show"),
    ],
)
def test_what_is_typed_and_not_read_is_refused_by_its_flags(refused, words, flags):
    said = refused(*words)
    assert said.startswith(f"usmoe: Invalid value: {flags}")
    assert said.endswith(f"Leave {'them' if ' are ' in flags else 'it'} out. See --help.")


def test_every_name_that_a_rule_has_is_that_of_a_parameter(monkeypatch, refused):
    """A name of no parameter would refuse nothing, so that it is found in any call of the command."""
    from usmoe.cli import eval as module

    monkeypatch.setattr(module, "_OF_LANGUAGE", ("scorings",))
    assert refused(*EVAL) == "usmoe: KeyError: 'scorings'"


# ------------------------------------------------------------------------------------------------- in Python


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"moee": "sum"}, "moee='sum' means nothing under embedding=\"hidden\""),
        ({"w": 2.0}, 'w=2.0 means nothing under embedding="hidden"'),
        ({"router_features": "probabilities"}, "router_features='probabilities' means nothing"),
        ({"embedding": "router", "w": 0.5}, 'w=0.5 means nothing under embedding="router"'),
        ({"embedding": "moee", "w": 0.5}, 'w=0.5 means nothing under embedding="moee", moee="concat"'),
    ],
)
def test_an_encoder_refuses_what_it_would_not_read(settings, sentence):
    for kind in (EncoderSettings, usmoe.Encoder):
        with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
            kind(**settings)


def test_what_another_embedding_does_not_read_goes_back_to_its_default():
    summed = EncoderSettings(embedding="moee", moee="sum", w=2.0, router_features="probabilities", pooling="mean")
    assert summed.changed(embedding="router") == EncoderSettings(
        embedding="router", router_features="probabilities", pooling="mean"
    )
    assert summed.changed(embedding="hidden") == EncoderSettings(pooling="mean")
    assert summed.changed(moee="concat").w == 1.0
    with pytest.raises(ValueError, match="w=3 means nothing"):
        summed.changed(embedding="hidden", w=3)


def test_of_a_grid_each_embedding_takes_what_it_reads():
    hidden, router, both = grid(
        ["own"], ["hidden", "router", "moee"], ["none"], moee="sum", w=2.0, features="probabilities", pooling="mean"
    )
    assert (hidden.moee, hidden.w, hidden.features, hidden.pooling) == ("concat", 1.0, "logits", "mean")
    assert (router.moee, router.w, router.features) == ("concat", 1.0, "probabilities")
    assert (both.moee, both.w, both.features) == ("sum", 2.0, "probabilities")


# ------------------------------------------------------------------------------------------------- a file's own values

FILE = """
balance = 0.02
[corpus]
source = "novels"
[model]
like = "transformer-xl-small"
gate = "cosine"
num_experts = 8
router = "usmoe(k=2)"
"""


@pytest.fixture
def configuration(tmp_path) -> Path:
    (tmp_path / "my.toml").write_text(FILE)
    return tmp_path / "my.toml"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--method", "usmoe"), "states balance = 0.02, and --method usmoe makes it 0.0. Take it out of the file, or "),
        (("--method", "stablemoe"), "states balance = 0.02, and --method stablemoe makes it 0.01."),
        (("--method", "usmoe", "--set", "balance=0.02"), 'states model.gate = "cosine", and --method usmoe makes it'),
        (("--model", "decoder-small"), "states model.num_experts = 8, and --model decoder-small makes it 16."),
    ],
)
def test_a_value_that_the_file_states_is_not_discarded_without_a_word(refused, configuration, words, sentence):
    assert sentence in refused("train", configuration, *words, "--show")


def test_what_the_file_and_the_method_agree_on_and_what_set_names_is_kept(configuration, monkeypatch, capsys):
    """The router is what --method is about; balance and gate are named by --set, num_experts by nobody."""
    words = ("--method", "usmoe-1.5", "--set", "balance=0.02", "--set", "model.gate=cosine", "--show")
    monkeypatch.setattr(sys, "argv", ["usmoe", "train", str(configuration), *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    said = json.loads(capsys.readouterr().out)
    assert (said["balance"], said["model"]["gate"], said["model"]["num_experts"]) == (0.02, "cosine", 8)
    assert said["model"]["router"] == "usmoe(k=1.5, alpha=0.5)"
