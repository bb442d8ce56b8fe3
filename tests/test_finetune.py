"""`usmoe finetune`: a classifier from a checkpoint of any kind learns, selects and is tested on different rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("datasets", reason="the extra usmoe[train]")
pytest.importorskip("accelerate", reason="the extra usmoe[train]")

from safetensors.torch import load_file

from tiny_finetuning import TINY, config_of, keyword_csv, pretrained, sentences, texts_of
from usmoe.cli import main
from usmoe.routing.text import parse_router
from usmoe.train import finetune as finetune_module
from usmoe.train import finetune_loop
from usmoe.train.classify import classify
from usmoe.train.finetune import finetune
from usmoe.train.finetune_config import FINETUNE_PRESETS
from usmoe.train.finetune_loop import FinetuneLoop
from usmoe.train.finetuned import classifier_of, load_classifier, resolved, start_of
from usmoe.train.folder import RunFolder
from usmoe.train.scored import Scored

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return pretrained(tmp_path_factory.mktemp("checkpoint"), steps=60)


@pytest.fixture(scope="module")
def keyword(tmp_path_factory) -> Path:
    return keyword_csv(tmp_path_factory.mktemp("data") / "keyword.csv")


# learning


def test_a_classifier_learns_what_a_keyword_says(checkpoint: Path, keyword: Path, tmp_path: Path):
    said = finetune(config_of(keyword, epochs=4), tmp_path / "run", checkpoint=checkpoint, progress=False)
    assert said.accuracy > 0.9
    assert said.accuracy_band[0] <= said.accuracy <= said.accuracy_band[1]
    assert (said.counts["train"], said.counts["validation"], said.counts["test"]) == (130, 14, 16)
    assert [one.epoch for one in said.history] == [1, 2, 3, 4]
    assert said.best == max(said.history, key=lambda one: one.accuracy)
    assert said.router == "usmoe(k=2)"
    assert said.experts == pytest.approx(2, abs=0.05)
    assert said.alone
    made = load_classifier(tmp_path / "run")
    assert made.classes == ("no", "yes")
    likely = made.probabilities(["the old sea good", "the old sea bad", ""])
    assert likely[:2].argmax(1).tolist() == [1, 0]
    torch.testing.assert_close(likely.sum(1), torch.ones(3))
    predictions = np.load(tmp_path / "run" / "predictions.npy")
    assert len(predictions) == 16
    assert Scored.load(tmp_path / "run" / "result.json") == said
    log = RunFolder(tmp_path / "run").rows()
    assert [row["accuracy"] for row in log if "accuracy" in row] == [one.accuracy for one in said.history]
    assert all({"loss", "experts", "dropped", "load_cv"} <= row.keys() for row in log if "loss" in row)


def test_the_first_of_the_best_epochs_is_tested(checkpoint: Path, keyword: Path, tmp_path: Path, monkeypatch):
    """Accuracies of four epochs are made up; the model of the second must come back, for the test rows alone."""
    made_up, models, read = iter([0.5, 0.75, 0.25, 0.75]), [], []
    monkeypatch.setattr(finetune_loop, "accuracy", lambda table: next(made_up))
    select = FinetuneLoop._select
    monkeypatch.setattr(
        FinetuneLoop,
        "_select",
        lambda loop, *rest: (
            models.append({n: t.clone() for n, t in loop.model.state_dict().items()}) or select(loop, *rest)
        ),
    )

    def watched(model, texts, *rest, **more):
        read.append((len(texts), model.head[0].weight.clone()))
        return classify(model, texts, *rest, **more)

    for module in (finetune_module, finetune_loop):
        monkeypatch.setattr(module, "classify", watched)
    said = finetune(config_of(keyword, epochs=4), tmp_path / "run", checkpoint=checkpoint, progress=False)
    assert said.best.epoch == 2
    tested = load_file(tmp_path / "run" / "best.safetensors")
    assert all(torch.equal(tested[name], models[1][name]) for name in tested)
    assert [number for number, _ in read] == [14] * 4 + [16]
    assert torch.equal(read[-1][1], models[1]["head.0.weight"])
    assert not torch.equal(read[-1][1], models[3]["head.0.weight"])


def test_steps_are_a_limit_within_an_epoch(checkpoint: Path, keyword: Path, tmp_path: Path):
    said = finetune(config_of(keyword, steps=20), tmp_path / "run", checkpoint=checkpoint, progress=False)
    assert [one.step for one in said.history] == [17, 20]
    assert said.history[-1].epoch == pytest.approx(20 / 17)


def test_another_router_and_fresh_parameters(checkpoint: Path, keyword: Path, tmp_path: Path):
    other = config_of(keyword, router="usmoe(k=1)", epochs=1)
    said = finetune(other, tmp_path / "other", checkpoint=checkpoint, progress=False)
    own = finetune(config_of(keyword, epochs=1), tmp_path / "own", checkpoint=checkpoint, progress=False)
    assert said.router == "usmoe(k=1)"
    assert said.experts == pytest.approx(1, abs=0.05)
    assert own.experts is not None
    assert own.flops > said.flops
    fresh = config_of(keyword, from_scratch=True, epochs=1)
    start, _ = start_of(checkpoint, "best")
    begun = classifier_of(resolved(fresh, start, "cpu"), start, 2)
    trained = load_file(checkpoint / "best.safetensors")
    assert not torch.equal(begun.body.words.vectors, trained["words.vectors"])  # pyright: ignore
    dense = config_of(keyword, from_scratch=True, model=TINY.replace(num_experts=0), epochs=1)
    said = finetune(dense, tmp_path / "dense", checkpoint=checkpoint, progress=False)
    assert (said.router, said.experts, said.dropped, said.load_cv) == (None, None, None, None)
    assert said.flops > 0


# checkpoints of other kinds


def test_smoe_dropout_keeps_the_k_that_its_training_ended_with(tmp_path: Path, keyword: Path):
    run = pretrained(tmp_path, model__router="token_choice(k=1)", model__gate="frozen", grow_k=(1, 3), evaluate_every=1)
    said = finetune(config_of(keyword, steps=2), tmp_path / "tuned", checkpoint=run, progress=False)
    assert said.router == "token_choice(k=3)"
    assert said.experts == 3
    other = config_of(keyword, steps=2, router="token_choice(k=2)")
    assert finetune(other, tmp_path / "other", checkpoint=run, progress=False).experts == 2


def test_stablemoe_stays_in_its_second_stage(tmp_path: Path, keyword: Path):
    """Though its best model may be of the first."""
    run = pretrained(
        tmp_path,
        model__router="token_choice(k=2, score=sigmoid)",
        model__gate="stable",
        distill=1.0,
        freeze_at=0.75,
        balance=0.01,
        evaluate_every=2,
    )
    tensors = load_file(run / "last.safetensors")
    config = config_of(keyword, steps=4)
    said = finetune(config, tmp_path / "tuned", checkpoint=run, which="last", progress=False)
    assert said.config.balance == 0.01
    after = load_file(tmp_path / "tuned" / "best.safetensors")
    for layer in range(2):
        gate = f"layers.{layer}.feed_forward.gate"
        assert after[f"body.{gate}.frozen"]
        assert torch.equal(after[f"body.{gate}.words"], tensors[f"{gate}.words"])
        assert not torch.equal(after[f"body.{gate}.weight"], tensors[f"{gate}.weight"])
    start, _ = start_of(run, "last")
    for layer in start.model.moe_layers:
        layer.gate._enter(False)  # pyright: ignore
        layer.gate.frozen.fill_(False)  # pyright: ignore
    model = classifier_of(resolved(config, start, "cpu"), start, 2)
    assert all(layer.gate.frozen for layer in model.body.moe_layers)


def test_another_router_begins_an_average_of_its_own(checkpoint: Path, keyword: Path):
    start, _ = start_of(checkpoint, "best")
    before = start.model.moe_layers[0].cut.weight.item()
    assert before > 0.02
    model = classifier_of(resolved(config_of(keyword, router="usmoe(k=1)"), start, "cpu"), start, 2).train()
    batch = texts_of(*sentences(4)).batch(np.arange(4))
    model(batch.tokens, batch.valid)
    cut = model.body.moe_layers[0].cut
    assert cut.weight.item() == pytest.approx(0.01)
    assert cut.router == parse_router("usmoe(k=1)")


# the command line


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["usmoe", "finetune", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return run


def test_the_command_runs_seeds_and_says_which_rows_were_which(
    command, checkpoint: Path, keyword: Path, tmp_path: Path
):
    words = (checkpoint, keyword, "-o", tmp_path / "run", "--seeds", "2", "--steps", "4", "--length", "24")
    words += ("--pooling", "mean")
    status, out, err = command(*words)
    assert status == 0, err
    assert "mean ± deviation" in out
    assert "Selected by: 14 rows set aside from keyword.csv" in out
    assert "Tested on: 16 rows set aside" in out
    assert "test texts are longer than 24 tokens" in out
    assert (tmp_path / "run" / "seed-1" / "result.json").is_file()
    assert "run/seed-1: 4 steps of 16 texts of" in err
    status, out, err = command(*words, "--resume", "--json")
    said = json.loads(out)
    values = [one["accuracy"] for one in said["seeds"]]
    assert said["accuracy"] == {
        "mean": pytest.approx(np.mean(values)),
        "deviation": pytest.approx(np.std(values, ddof=1)),
    }
    assert [one["config"]["seed"] for one in said["seeds"]] == [0, 1]
    assert load_classifier(tmp_path / "run" / "seed-1").model.pooling == "mean"


def test_a_folder_is_of_one_run_or_of_several_seeds(command, checkpoint: Path, keyword: Path, tmp_path: Path):
    """And whether it is free is known before the first seed is trained."""
    one = (checkpoint, keyword, "--steps", "1", "--length", "16")
    several = (*one, "--seeds", "2", "-o", tmp_path / "several")
    assert command(*several, "--seed", "1")[0] == command(*one, "-o", tmp_path / "one")[0] == 0
    before = sorted(tmp_path.rglob("*"))
    for words, sentence in (
        ((*one, "-o", tmp_path / "several"), "holds a run for each of several seeds (seed-1, seed-2). Give --seeds"),
        ((*one, "-o", tmp_path / "several", "--force"), "holds a run for each of several seeds"),
        ((*one, "-o", tmp_path / "one", "--seeds", "2", "--force"), "holds one run, and 2 seeds need a folder"),
        (several, "several/seed-1 holds a run already. Give --resume"),
        ((checkpoint, "nothing.csv", "-o", tmp_path / "new", "--seeds", "2"), "no file, folder or data set"),
    ):
        status, out, err = command(*words)
        assert (status, out) == (1, "")
        assert sentence in " ".join(err.split())
        assert "steps of" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_unknown_words_empty_texts_and_the_names_of_the_classes_are_said(command, tmp_path: Path):
    run = pretrained(tmp_path, corpus__level="word")
    path = keyword_csv(tmp_path / "keyword.csv")  # good and bad are no words of the checkpoint's
    with path.open("a", encoding="utf-8") as file:
        file.write('"",yes\n" ",no\n')
    status, out, err = command(run, path, "-o", tmp_path / "tuned", "--steps", "1")
    assert status == 0, err
    said = Scored.load(tmp_path / "tuned" / "result.json")
    assert said.names == ("no", "yes")
    assert said.empty == 2
    assert said.unknown is not None
    words = " ".join(out.split())
    assert f"{100 * said.unknown:.1f} % of the test's tokens are unknown to the checkpoint's vocabulary" in words
    assert "Texts without a word, of all that were read: 2;" in words
    older = {name: one for name, one in said.to_dict().items() if name not in ("names", "empty", "unknown")}
    assert Scored.from_dict(older).unknown is None


def test_the_command_refuses_in_one_line(command, checkpoint: Path, keyword: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, sentence, expected in (
        ((checkpoint, "nothing.csv"), "There is no file, folder or data set 'nothing.csv'", 1),
        ((checkpoint, "sst22"), "Did you mean sst2?", 1),
        ((tmp_path, keyword), "holds no run of usmoe train", 1),
        ((checkpoint, keyword, "--router", "usmoe(k=9)"), "k=9", 1),
        ((checkpoint, keyword, "--device", "cuda:99"), "There is no cuda:99", 1),
        ((checkpoint, keyword, "--resume"), "Say which: --run FOLDER", 2),
        ((checkpoint, keyword, "-o", "x", "--resume", "--force"), "Give one of them", 2),
    ):
        status, out, err = command(*words)
        assert (status, out) == (expected, ""), err
        assert sentence in err
        assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_the_command_says_how_to_go_on_where_it_was_stopped(command, checkpoint: Path, keyword: Path, monkeypatch):
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt("step 3 of 9 is saved; --resume goes on.")

    monkeypatch.setattr(finetune_module, "finetune", stopped)
    status, out, err = command(checkpoint, keyword, "-o", "never")
    assert (status, out) == (130, "")
    assert "usmoe: stopped; step 3 of 9 is saved; --resume goes on." in err


# real data


@pytest.mark.slow
def test_sst2(checkpoint: Path, tmp_path: Path):
    """A few steps on real sentences: the counts and the words are right, whatever the accuracy."""
    if not (SHARED / "sst2").is_dir():
        pytest.skip("sst2 is not beside the checkout")
    config = FINETUNE_PRESETS["sst2"].replace(steps=5, length=64, data__validation_rows=40, data__test_rows=60)
    said = finetune(config, tmp_path / "run", checkpoint=checkpoint, data=SHARED, progress=False)
    assert said.counts == {"train": 67349, "validation": 40, "test": 60}
    assert said.rows["test"] == "60 rows drawn by class from: test.parquet, 1,821 rows"
    assert load_classifier(tmp_path / "run").classes == ("negative", "positive")
    assert 0.3 < said.accuracy < 0.8
