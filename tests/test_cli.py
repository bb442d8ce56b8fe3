"""The command line, as a user types it: results on stdout, one line of error on stderr, an exit status that is true."""

import io
import json
import sys

import numpy as np
import pytest

from rounding import assert_to_rounding
from tiny import tiny
from usmoe.cli import main
from usmoe.models import SAMPLE, SHIPPED


@pytest.fixture
def usmoe_command(monkeypatch, capsys):
    """usmoe_command("info", "shipped") -> (exit status, stdout, stderr)."""

    def run(*words: str, stdin: str | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["usmoe", *words])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return run


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory):
    """A folder with a tiny Mixtral and the shipped tokenizer, cut to its vocabulary."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("mixtral")
    tiny("mixtral", vocab_size=4096).save_pretrained(folder)
    AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(folder)
    return folder


SMALL = ("--tokens", "256", "--length", "64", "--positions", "4")


@pytest.mark.slow
def test_demo_prints_nine_rows_and_a_picture(usmoe_command, tmp_path):
    picture = tmp_path / "maps.png"
    status, out, err = usmoe_command("demo", "--json", "--output", str(picture), *SMALL)
    assert status == 0, err
    said = json.loads(out)
    rows = said["rows"]
    assert len(rows) == 9
    by_label = {row["label"]: row for row in rows}
    own = by_label["the model's own choice"]
    assert (own["experts_mean"], own["experts_min"], own["experts_max"], own["dropped"]) == (4.0, 4, 4, 0.0)
    assert by_label["own choice, 3 instead of 4"]["experts_mean"] == 3.0
    assert by_label["USMoE, own score, 0.75x"]["experts_mean"] == 3.0
    assert by_label["expert choice"]["load_cv"] == 0.0
    for row in rows:
        assert row["perplexity"] > 1
        assert row["honest_positions"] == 4
        if row["causal"]:  # nothing to gain from looking ahead where there is no looking ahead
            assert row["honest_perplexity"] == pytest.approx(row["perplexity"], rel=1e-3)
    assert own["moe_flops"] == 4 * (4 * 6 * 96 * 256 + 2 * 16 * 256)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    status, _, err = usmoe_command("demo", "--output", str(picture), *SMALL)
    assert status == 1
    assert "--force" in err


def test_demo_on_a_folder_with_text_from_stdin(usmoe_command, mixtral, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = SAMPLE.read_text(encoding="utf-8")[:6000]
    status, out, err = usmoe_command("demo", "--model", str(mixtral), "--text", "-", *SMALL, stdin=text)
    assert status == 0, err
    assert "2 MoE layers of 8 experts, 2 a token" in out
    assert "usmoe-demo.png" in out
    assert (tmp_path / "usmoe-demo.png").exists()


def test_patch_measures_a_router_beside_the_models_own_choice(usmoe_command, mixtral):
    words = ("patch", str(mixtral), "--router", "usmoe(k=1.5)", "--calibrate", "--json", *SMALL)
    status, out, err = usmoe_command(*words)
    assert status == 0, err
    own, ours = json.loads(out)["rows"]
    assert own["router"] == "own_choice"
    assert ours["causal"]
    assert [text.split("(")[0] for text in ours["router"]] == ["usmoe", "usmoe"]
    assert ours["experts_mean"] == pytest.approx(1.5, rel=0.2)  # a random model, little text
    assert ours["perplexity"] != own["perplexity"]


def test_route_shows_tokens_and_experts(usmoe_command):
    status, out, err = usmoe_command("route", "-", "--json", stdin="It was a dark and stormy night.")
    assert status == 0, err
    said = json.loads(out)
    assert "".join(said["tokens"]) == "It was a dark and stormy night."
    assert [layer["experts_per_token"] for layer in said["layers"]] == [4.0] * 4
    status, out, _ = usmoe_command("route", "--tokens", "5", "--json")  # the shipped sample
    assert status == 0
    assert len(json.loads(out)["tokens"]) == 5
    status, out, _ = usmoe_command("route", "-", "--router", "usmoe(k=0.5x)", stdin="It was a dark night.")
    assert status == 0
    assert "2.00" in out


def test_route_takes_logits(usmoe_command, tmp_path):
    file = tmp_path / "logits.npy"
    np.save(file, np.array([[3.0, 1.0, 0.0], [0.0, 0.0, 2.0]], dtype=np.float32))
    status, out, err = usmoe_command("route", str(file), "--router", "token_choice(k=1)", "--json")
    assert status == 0, err
    pairs = json.loads(out)["layers"][0]["pairs"]
    assert [(pair["token"], pair["expert"]) for pair in pairs] == [(0, 0), (1, 2)]


def test_info_of_usmoe_and_of_a_model(usmoe_command, mixtral):
    status, out, _ = usmoe_command("info", "--json")
    assert status == 0
    pools = {row["router"]: row for row in json.loads(out)["routers"]}
    assert pools["usmoe(pool=threshold)"]["causal"]
    assert not pools["expert_choice"]["causal"]
    status, out, _ = usmoe_command("info", str(mixtral), "--json")
    assert status == 0
    assert [row["own_choice"] for row in json.loads(out)["layers"]] == ["top 2 of softmax normalised over chosen"] * 2
    status, out, _ = usmoe_command("info", str(mixtral))
    assert status == 0
    assert "MixtralForCausalLM" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("info", "./no-such-folder"), "There is no folder ./no-such-folder"),
        (("info", "{empty}"), "has no config.json"),
        (("info", "no/such-model", "--offline"), "the hub did not give it"),
        (("info", "{dense}"), "no MoE layer"),
        (("demo", "--model", "{dense}"), "no MoE layer"),
        (("demo", "--text", "{missing}"), "There is no text file"),
        (("demo", "--text", "{latin}"), "is not UTF-8: line 2 holds byte 0xe9"),
        (("demo", "--text", "{short}"), "The text is too short"),
        (("demo", "--device", "abacus"), "is not available here"),
        (("demo", "--dtype", "float7"), "Choose one of: float32"),
        (("demo", "--output", "{missing}/x.png"), "There is no folder"),
        (("patch", "shipped", "--router", "usmoo(k=2)"), "Did you mean 'usmoe'?"),
        (("patch", "shipped", "--router", "usmoe(k=99)"), "impossible with 16 experts"),
        (("patch", "shipped", "--router", "nowhere:router"), "cannot be imported"),
        (("route", "{missing}.npy", "--router", "usmoe(k=1)"), "There is no file"),
        (("route", "{broken}", "--router", "usmoe(k=1)"), "is not an array"),
        (("route", "{broken}"), "Name a router"),
    ],
)
def test_bad_input_is_one_line_and_status_one(usmoe_command, words, message, tmp_path):
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    (tmp_path / "empty").mkdir()
    if "{dense}" in words:
        GPT2LMHeadModel(
            GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=4096, bos_token_id=0, eos_token_id=0)
        ).save_pretrained(tmp_path / "dense")
        AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(tmp_path / "dense")
    (tmp_path / "latin").write_bytes(b"plain\ncaf\xe9\n")
    (tmp_path / "short").write_text("Too short.")
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00{'desc")
    names = {"empty": "empty", "dense": "dense", "missing": "missing", "latin": "latin", "short": "short"}
    places = {name: str(tmp_path / place) for name, place in names.items()} | {"broken": str(tmp_path / "broken.npy")}
    status, out, err = usmoe_command(*(word.format(**places) for word in words))
    assert status == 1
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("usmoe: ")
    assert message in last
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("demo", "--tokens", "3"), "greater than or equal to 32"),
        (("no-such-command",), "No such command"),
        (("patch", "shipped"), "Missing option"),
    ],
)
def test_a_mistyped_command_is_one_line_and_status_two(usmoe_command, words, message):
    status, out, err = usmoe_command(*words)
    assert status == 2
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert message in err


def test_help_has_an_example(usmoe_command):
    for command in ("demo", "route", "patch", "info"):
        status, out, _ = usmoe_command(command, "--help")
        assert status == 0
        assert f"usmoe {command}" in out
        assert "Example" in out


def test_a_router_from_a_file_beside_the_user(usmoe_command, tmp_path, monkeypatch):
    (tmp_path / "mine_of_the_test.py").write_text(
        "import usmoe\n"
        "def first(logits, valid=None, **_):\n"
        "    mask = (logits * 0).bool()\n"
        "    mask[..., 0] = True\n"
        "    return usmoe.Routing.from_dense(logits.sigmoid(), mask)\n"
    )
    monkeypatch.chdir(tmp_path)
    status, out, err = usmoe_command("route", "-", "--router", "mine_of_the_test:first", "--json", stdin="A word.")
    assert status == 0, err
    assert {pair["expert"] for pair in json.loads(out)["layers"][0]["pairs"]} == {0}


def test_code_that_a_model_brings_is_never_run(usmoe_command, tmp_path):
    folder = tmp_path / "foreign"
    folder.mkdir()
    auto = {"AutoConfig": "foreign.C", "AutoModelForCausalLM": "foreign.M"}
    (folder / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": auto}))
    (folder / "foreign.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    status, out, err = usmoe_command("info", str(folder), "--json", stdin="y\ny\n")
    assert (status, out) == (1, "")
    assert err.startswith("usmoe: ")
    assert not (tmp_path / "ran").exists()


def test_a_weights_file_cut_short_is_one_line(usmoe_command, mixtral, tmp_path):
    import shutil

    folder = tmp_path / "cut"
    shutil.copytree(mixtral, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    status, out, err = usmoe_command("info", str(folder))
    assert (status, out) == (1, "")
    assert "cannot be loaded from its folder" in err.strip().splitlines()[-1]


def test_json_has_no_nan(usmoe_command):
    status, out, err = usmoe_command(
        "route", "-", "--router", "usmoe(pool=threshold, threshold=2)", "--json", stdin="A word."
    )
    assert status == 0, err
    layer = json.loads(out, parse_constant=lambda name: pytest.fail(name))["layers"][0]
    assert (layer["load_cv"], layer["dropped"]) == (None, 1.0)


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["usmoe", "info", "./no-such-folder", "--debug"])
    with pytest.raises(ValueError, match="There is no folder"):
        main()


def test_ctrl_c_is_status_130(monkeypatch, capsys):
    import usmoe.hf.load

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(usmoe.hf.load, "load_model", interrupted)
    monkeypatch.setattr(sys, "argv", ["usmoe", "info", "shipped"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130
    assert "Traceback" not in capsys.readouterr().err


def test_patch_check_prints_a_row_a_layer_and_needs_no_router(usmoe_command, mixtral):
    status, out, err = usmoe_command("patch", str(mixtral), "--check", "--json")
    assert status == 0, err
    rows = json.loads(out)["layers"]
    assert [row["layer"] for row in rows] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert rows[0]["own_choice"] == "top 2 of softmax normalised over chosen"
    assert rows[0]["weights"] == "float32"
    status, out, err = usmoe_command("patch", str(mixtral), "--check")
    assert status == 0
    assert out.count("model.layers.") == 2


def test_patch_check_says_why_a_model_cannot_be_patched(usmoe_command, tmp_path):
    from families import OUTSIDERS, build

    build(OUTSIDERS["dbrx"]).save_pretrained(tmp_path / "dbrx")
    status, out, err = usmoe_command("patch", str(tmp_path / "dbrx"), "--check")
    assert status == 1
    assert "dbrx" in out
    assert "not behind transformers' experts interface" in err
    assert err.strip().splitlines()[-1].startswith("usmoe: ")
    status, _, err = usmoe_command("patch", "shipped")
    assert status == 2
    assert "Missing option --router" in err


def test_a_patched_model_is_saved_and_loaded_with_its_router(usmoe_command, mixtral, tmp_path):
    import torch

    import usmoe

    folder = tmp_path / "out"
    words = ("patch", str(mixtral), "--router", "usmoe(k=1.5)", "--calibrate", "--save", str(folder), *SMALL)
    status, _, err = usmoe_command(*words)
    assert status == 0, err
    model = usmoe.from_pretrained(folder)
    x = torch.arange(2, 30)[None]
    with usmoe.patched(usmoe.from_pretrained(mixtral), list(model._usmoe_patch.routers)) as other:
        assert_to_rounding(model(x).logits, other(x).logits)
    status, _, err = usmoe_command(*words)
    assert status == 1
    assert "is not empty. Give --force" in err


@pytest.mark.slow
def test_tune_prints_three_ways_a_budget_and_its_routers_come_back(usmoe_command, mixtral, tmp_path):
    routers, picture = tmp_path / "routers.json", tmp_path / "frontier.png"
    words = ("tune", str(mixtral), "--budget", "0.75x", "--budget", "1.2", "--tokens", "256", "--length", "64")
    status, out, err = usmoe_command(*words, "--output", str(routers), "--plot", str(picture), "--json")
    assert status == 0, err
    said = json.loads(out)
    assert [row["label"].rsplit(", ", 1)[-1] for row in said["rows"][1:]] == ["0.75x"] * 3 + ["1.2"] * 3
    assert all(row["causal"] for row in said["rows"])
    assert picture.stat().st_size > 1000
    status, out, err = usmoe_command("patch", str(mixtral), "--router", str(routers), "--json", *SMALL)
    assert status == 0, err
    assert json.loads(out)["rows"][1]["budget"] == pytest.approx(1.2, abs=1e-6)
    status, _, err = usmoe_command(*words, "--output", str(routers))
    assert status == 1
    assert "already there" in err


def test_routers_in_a_file_that_are_none_are_refused(usmoe_command, mixtral, tmp_path):
    wrong = tmp_path / "wrong.json"
    for text, sentence in (
        ("{", "is not JSON"),
        ("[]", "holds no routers"),
        ('{"schema": 7, "routers": {}}', "has schema 7"),
        ('{"schema": 1, "routers": {"model.layers.7.mlp": {"router": "own_choice"}}}', "no MoE layer 'model.layers.7"),
    ):
        wrong.write_text(text)
        status, _, err = usmoe_command("patch", str(mixtral), "--router", str(wrong), *SMALL)
        assert status == 1
        assert sentence in err
    status, _, err = usmoe_command("patch", str(mixtral), "--router", str(tmp_path / "none.json"), *SMALL)
    assert (status, "There is no file" in err) == (1, True)
