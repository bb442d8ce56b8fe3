"""`usmoe train` and `usmoe eval RUN` as they are typed."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from usmoe.cli.app import app
from usmoe.models import CALIBRATION, SAMPLE
from usmoe.routing import TokenChoice

SMALL = {
    "batch": "4",
    "segment": "16",
    "memory": "16",
    "evaluate_every": "3",
    "checkpoint_every": "2",
    "warmup": "0",
    "model.layers": "1",
    "model.d_model": "16",
    "model.d_ff": "8",
    "model.num_experts": "4",
    "evaluation": '{"batch": 4, "segment": 16, "memory": 16, "tokens": 400}',
}


def usmoe(*words: object, fails: bool = False) -> str:
    """What it prints on stdout; its error where it is to fail, on one line."""
    said = CliRunner().invoke(app, [str(word) for word in words])
    assert (said.exit_code != 0) == fails, said.output
    return " ".join(f"{said.stderr} {said.exception}".split()) if fails else said.stdout


@pytest.fixture
def train(tmp_path):
    """`usmoe train` of a few steps on the sample, into tmp_path/run."""

    def go(*words: object, **given) -> str:
        small = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
        place = ("--run", tmp_path / "run", "--cache", tmp_path / ".corpora")
        return usmoe("train", "--data", SAMPLE, "--steps", 6, *small, *place, *words, **given)

    return go


def test_a_text_is_learned_and_evaluated(train, tmp_path):
    said = json.loads(train("--router", "usmoe(k=1.5)", "--json"))
    assert [row["step"] for row in said["evaluations"]] == [3, 6]
    assert said["unit"] == "character"
    run = ("eval", tmp_path / "run", "--positions", 5)
    cache = ("--cache", tmp_path / ".corpora")
    figures = json.loads(usmoe(*run, *cache, "--tokens", 300, "--serve-k", 1, "--json"))
    assert figures["routers"] == ["usmoe(k=1.5)"]
    assert set(figures["served"]) == {"threshold", "prefix", "threshold k=1 calibrated"}
    assert figures["tokens"] == 299
    assert figures["honest"]["positions"] == 5
    shown = usmoe(*run, "--text", CALIBRATION, "--tokens", 200)
    assert "teacher-forced" in shown
    assert "served by prefix" in shown
    other = json.loads(usmoe(*run, *cache, "--split", "validation", "--tokens", 300, "--json"))
    assert other["forced"]["nats"] != figures["forced"]["nats"]


def test_a_run_goes_on_and_says_what_changed(train):
    train("--method", "xmoe")
    assert "--resume" in train("--method", "xmoe", fails=True)
    assert "step" in train("--method", "xmoe", "--resume")
    assert "model.gate was 'cosine' and is 'linear'" in train("--method", "usmoe", "--resume", fails=True)


def test_events_for_tensorboard(train, tmp_path):
    train("--tensorboard")
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_the_configuration_is_shown_and_can_be_given_back(train, tmp_path):
    shown = train("--show", "--method", "stablemoe", "--seed", 3)
    assert not (tmp_path / "run").exists()
    said = json.loads(shown)
    assert (said["model"]["gate"], said["seed"], said["steps"]) == ("stable", 3, 6)
    (tmp_path / "again.json").write_text(shown)
    assert json.loads(usmoe("train", tmp_path / "again.json", "--show")) == said


def test_a_size_for_the_time(tmp_path):
    text = ("--data", SAMPLE, "--cache", tmp_path / ".corpora")
    one = json.loads(usmoe("train", *text, "--minutes", 0.01, "--show"))
    assert one["model"]["layers"] == 2
    assert one["steps"] >= 20
    assert "no time" in usmoe("train", *text, "--minutes", 0, fails=True)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "Give a configuration"),
        (("enwik9",), "There is no preset 'enwik9'. Known: enwik8"),
        (("none.toml",), "There is no configuration none.toml"),
        (("--data", "none.txt"), "none.txt"),
        (("enwik8", "--method", "usmo", "--show"), "Did you mean usmoe"),
        (("enwik8", "--router", "usmoe(k=2", "--show"), "usmoe(k=2"),
        (("enwik8", "--set", "lr", "--show"), "sets nothing"),
        (("enwik8", "--set", "modle.layers=3", "--show"), "no table 'modle'"),
        (("enwik8", "--set", "steps=many", "--show"), "steps='many' is not possible"),
        (("enwik8", "--resume"), "Say which: --run"),
        (("enwik8", "--minutes", "3", "--steps", "5"), "Give one of"),
        (("enwik8", "--offline"), "enwik8 is not prepared"),
        (("enwik8", "--export", "x"), "OLMoE has no"),
    ],
)
def test_what_cannot_be_is_refused(words: tuple[str, ...], sentence: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sentence in usmoe("train", *words, fails=True)
    assert not [path for path in Path("usmoe-runs").glob("*") if path.name != ".corpora"]


# ------------------------------------------------------------------------------------ usmoe eval RUN


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    """A folder of local corpora: text8, 3,000 characters of it."""
    place = tmp_path_factory.mktemp("corpora")
    (place / "text8").mkdir()
    words = "the cat sat on the mat and the dog sat by the door while it rained all day long "
    (place / "text8" / "text8").write_text((words * 40)[:3000], encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def runs(tmp_path_factory, corpora) -> Path:
    """A folder with three runs of a few steps: `bytes` of the sample, `words` of a text, and `named`, of text8 with
    --data; and the cache of all three."""
    place = tmp_path_factory.mktemp("runs")
    (place / "book.txt").write_text("one two three four five six seven\n" * 400, encoding="utf-8")
    for name, words in (
        ("bytes", ("--data", SAMPLE)),
        ("words", ("--data", place / "book.txt", "--level", "word")),
        ("named", ("text8", "--data", corpora, "--set", "model.heads=2", "--set", "model.num_experts=4")),
    ):
        small = [word for field, value in SMALL.items() for word in ("--set", f"{field}={value}")]
        usmoe("train", *words, "--steps", 3, *small, "--run", place / name, "--cache", place / "cache")
    return place


def evaluated(run: Path, *words: object, **given) -> str:
    """`usmoe eval RUN` of a short text, with the cache beside the run."""
    cache = () if "--text" in words and "--serve-k" not in words else ("--cache", run.parent / "cache")
    return usmoe("eval", run, *cache, "--tokens", 100, "--positions", 3, *words, **given)


def figures(run: Path, *words: object) -> dict:
    return json.loads(evaluated(run, *words, "--json"))


def route(logits, valid, **_):
    """A router of one's own."""
    return TokenChoice(k=1)(logits, valid)


def test_other_routers_read_the_same_model(runs):
    routers = "own,usmoe(k=1),token_choice(k=1)"
    own, found = figures(runs / "bytes"), figures(runs / "bytes", "--routers", routers)
    assert own["under"] == {}
    assert found["forced"]["nats"] == own["forced"]["nats"]
    assert list(found["under"]) == ["usmoe(k=1)", "token_choice(k=1)"]
    assert found["under"]["usmoe(k=1)"]["forced"]["experts"] == pytest.approx(1)
    assert found["under"]["usmoe(k=1)"]["honest"]["positions"] == 3
    assert found["under"]["token_choice(k=1)"]["honest"]["positions"] == 0
    shown = evaluated(runs / "bytes", "--routers", routers)
    assert "usmoe(k=1), honest" in shown
    assert "token_choice(k=1)" in shown


def test_a_router_of_ones_own_has_a_name_that_stays(runs):
    found = figures(runs / "bytes", "--routers", f"{__name__}:route")
    assert list(found["under"]) == [f"{__name__}:route"]
    assert found["under"][f"{__name__}:route"]["forced"]["experts"] == 1


def test_segment_memory_and_dtype_are_honoured(runs):
    own = figures(runs / "bytes")
    assert (own["setting"]["segment"], own["setting"]["memory"], own["dtype"]) == (16, 16, "float32")
    found = figures(runs / "bytes", "--segment", 8, "--memory", 0)
    assert (found["setting"]["segment"], found["setting"]["memory"], found["reset"]) == (8, 0, None)
    assert found["forced"]["nats"] != own["forced"]["nats"]
    assert found["forced"]["flops"] < own["forced"]["flops"]
    half = figures(runs / "bytes", "--dtype", "bfloat16")
    assert half["dtype"] == "bfloat16"
    assert half["forced"]["nats"] != own["forced"]["nats"]
    assert half["forced"]["nats"] == pytest.approx(own["forced"]["nats"], rel=0.01)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--embeddings", "hidden"), "--embeddings is of mteb and lm-eval, and"),
        (("--prompts", "none", "--results", "x"), "--prompts, --results are of mteb and lm-eval"),
        (("--tasks", "STS12"), "--tasks is of mteb"),
        (("--lm-eval", "arc_easy", "--batch-size", "2"), "--lm-eval, --batch-size are of"),
        (("--text", SAMPLE, "--split", "test"), "--split is of the run's own corpus, and --text is another"),
        (("--text", SAMPLE, "--data", "x"), "--data is of the run's own corpus, of which --text reads nothing"),
        (("--serve-k", 0), "--serve-k 0 is impossible with 4 experts. Choose 0 < k <= 4"),
        (("--serve-k", 4.5), "--serve-k 4.5 is impossible with 4 experts"),
        (("--serve-k", "nan"), "--serve-k nan is impossible"),
        (("--dtype", "int8"), "dtype 'int8' is unknown. Choose one of: float32"),
        (("--split", "dev"), "There is no split 'dev'. Choose from train, validation, test"),
        (("--routers", "usmoe(k=9)"), "cannot be read under usmoe(k=9): "),
        (("--routers", "own_choice"), "cannot be read under own_choice: "),
        (("--routers", "usmo(k=1)"), "There is no router 'usmo'"),
        (("--routers", "tuned.json"), "tuned.json names layers of a pretrained model"),
    ],
)
def test_what_a_run_cannot_be_asked_is_refused(words, sentence, runs):
    assert sentence in evaluated(runs / "bytes", *words, fails=True)


def test_a_packed_text_is_read_as_training_reads_it(runs, tmp_path):
    (tmp_path / "plain.txt").write_text("one two three four\n" * 30, encoding="utf-8")
    (tmp_path / "packed.txt.gz").write_bytes(gzip.compress((tmp_path / "plain.txt").read_bytes()))
    for run in ("bytes", "words"):
        plain, packed = (figures(runs / run, "--text", tmp_path / name) for name in ("plain.txt", "packed.txt.gz"))
        assert plain["forced"]["nats"] == packed["forced"]["nats"]
        assert packed["text"].endswith("packed.txt.gz")


def test_what_the_vocabulary_does_not_know_is_said(runs, tmp_path):
    (tmp_path / "half.txt").write_text("one zwei three vier\n" * 30, encoding="utf-8")
    found = figures(runs / "words", "--text", tmp_path / "half.txt")
    assert found["unknown"] == pytest.approx(0.4, abs=0.01)  # two of four words and a line end
    assert "40.0 % of the tokens are unknown" in evaluated(runs / "words", "--text", tmp_path / "half.txt")
    (tmp_path / "none.txt").write_text("zwei " * 90, encoding="utf-8")
    assert "Every token of" in evaluated(runs / "words", "--text", tmp_path / "none.txt", fails=True)
    assert figures(runs / "bytes")["unknown"] is None


def test_figures_say_which_split_was_read_and_how_it_was_corrupted(runs, tmp_path):
    assert figures(runs / "bytes")["text"].endswith(", test")
    run = shutil.copytree(runs / "bytes", tmp_path / "run")
    said = json.loads((run / "config.json").read_text())
    said["corpus"] |= {"corrupt_mode": "insert", "corrupt_rate": 0.3}
    del said["text"]
    (run / "config.json").write_text(json.dumps(said))
    found = json.loads(usmoe("eval", run, "--cache", tmp_path / "cache", "--tokens", 100, "--positions", 3, "--json"))
    assert found["text"].endswith(", test, 30 % of the words with AAA before them")


def test_weights_of_another_model_are_refused_in_a_sentence(runs, tmp_path):
    run = shutil.copytree(runs / "bytes", tmp_path / "run")
    shutil.copy(runs / "words" / "best.safetensors", run)
    words = evaluated(run, "--text", SAMPLE, fails=True)
    assert "best.safetensors is not of the model that config.json describes (size mismatch for" in words


def test_the_configuration_of_a_run_begins_another(runs, tmp_path):
    said = json.loads(usmoe("train", runs / "bytes" / "config.json", "--seed", 5, "--show"))
    before = json.loads((runs / "bytes" / "config.json").read_text())
    assert said == {name: one for name, one in before.items() if name not in ("schema", "text")} | {"seed": 5}


def test_a_corpus_is_found_in_the_cache_of_training_without_its_files(runs, corpora, tmp_path):
    """With --data it is the same text; without, and without a connection, it is what training has prepared."""
    before = sorted(path.name for path in (runs / "cache").iterdir())
    offline = figures(runs / "named", "--offline")
    assert offline["forced"]["nats"] == figures(runs / "named", "--data", corpora, "--offline")["forced"]["nats"]
    assert figures(runs / "named", "--offline", "--serve-k", 1)["served"]["threshold k=1 calibrated"]["experts"]
    gone = shutil.copytree(runs / "words", tmp_path / "gone")
    said = json.loads((gone / "config.json").read_text())
    said["corpus"]["source"] = str(tmp_path / "gone.txt")
    (gone / "config.json").write_text(json.dumps(said))
    assert figures(gone, "--cache", runs / "cache")["forced"] | {"seconds": 0} == figures(runs / "words")["forced"] | {
        "seconds": 0
    }
    assert sorted(path.name for path in (runs / "cache").iterdir()) == before  # nothing was prepared anew
    assert "gone.txt, is not here" in evaluated(gone, fails=True)  # tmp_path has no cache


def test_what_is_not_the_runs_own_text_is_no_stand_in(runs, tmp_path):
    none = ("--cache", tmp_path / "none")
    assert "offline there is no download" in evaluated(runs / "named", *none, "--offline", fails=True)
    other = shutil.copytree(runs / "words", tmp_path / "other")
    (tmp_path / "data").mkdir()
    said = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(said | {"corpus": said["corpus"] | {"source": "two.txt"}}))
    (tmp_path / "data" / "two.txt").write_text("eight nine ten eleven twelve\n" * 400, encoding="utf-8")
    refused = evaluated(other, *none, "--data", tmp_path / "data", fails=True)
    assert "its vocabulary is not that of" in refused
    (tmp_path / "data" / "two.txt").write_text("seven six five four three two one\n" * 400, encoding="utf-8")
    assert figures(other, *none, "--data", tmp_path / "data")["tokens"] == 99


def test_a_run_of_bytes_reads_any_bytes(runs, tmp_path):
    (tmp_path / "any").write_bytes(bytes(range(256)))
    assert figures(runs / "bytes", "--text", tmp_path / "any")["tokens"] == 99
    assert "is no UTF-8 in line 2" in evaluated(runs / "words", "--text", tmp_path / "any", fails=True)
    assert "There is no file" in evaluated(runs / "bytes", "--text", tmp_path / "none", fails=True)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("vocabulary.json", None, "vocabulary.json is missing, without which no text can be read"),
        ("config.json", None, "config.json is missing, without which"),
        ("config.json", "", "config.json is not JSON"),
        ("config.json", "{}", "config.json holds no configuration of usmoe train"),
        ("config.json", "[]", "config.json holds no configuration of usmoe train"),
        ("config.json", '{"start": {}, "config": {}}', "config.json is of a run of usmoe finetune"),
    ],
)
def test_a_run_that_is_none_is_told_by_its_file(runs, tmp_path, name, content, sentence):
    folder = shutil.copytree(runs / "bytes", tmp_path / "run")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    assert sentence in evaluated(folder, fails=True)


def test_options_of_runs_belong_to_runs():
    assert "--serve-k is of runs, and shipped is none" in usmoe(
        *("eval", "shipped", "--lm-eval", "x", "--serve-k", "2"), fails=True
    )
    assert "--segment, --memory are of runs" in usmoe("eval", "shipped", "--segment", "9", "--memory", 0, fails=True)


def test_a_served_budget_that_is_missed_is_said_on_stderr(runs, tmp_path):
    """The cuts of a run that are not those of its weights (here: halved) spend more than asked for."""
    run = shutil.copytree(runs / "bytes", tmp_path / "run")
    weights = load_file(run / "best.safetensors")
    cuts = {name: value * 0.5 for name, value in weights.items() if name.endswith("cut.total")}
    save_file(weights | cuts, run / "best.safetensors")
    words = ("--cache", runs / "cache", "--tokens", "300", "--positions", "3", "--json")
    for place, missed in ((run, True), (runs / "bytes", False)):
        said = CliRunner().invoke(app, [str(word) for word in ("eval", place, *words)])
        served = json.loads(said.stdout)["served"]["threshold"]
        assert (abs(served["experts"] - served["asked"]) > 0.1 * served["asked"]) is missed
        sentence = (
            f"Served by threshold: {served['experts']:.2f} experts a token are spent, and {served['asked']:g} are"
        )
        assert (sentence in said.stderr) is missed
