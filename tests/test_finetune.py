"""`usmoe finetune`: a classifier from a checkpoint learns, selects and is tested on different rows; it goes on bit for
bit where it was stopped; and a text's class does not depend on the texts beside it."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("datasets", reason="the extra usmoe[train]")
pytest.importorskip("accelerate", reason="the extra usmoe[train]")

from safetensors.torch import load_file

from usmoe.cli import main
from usmoe.data.classification import Labelled
from usmoe.data.corpus import Corpus
from usmoe.data.vocabulary import Bytes, Characters, learn
from usmoe.models.config import MODELS
from usmoe.models.language import LanguageModel
from usmoe.routing.text import parse_router
from usmoe.train import finetune as module
from usmoe.train.agreement import accuracy, agreement, confusion, macro_f1
from usmoe.train.classifier import Classifier
from usmoe.train.classify import classify
from usmoe.train.config import Evaluation, TrainConfig
from usmoe.train.finetune import finetune
from usmoe.train.finetune_config import FINETUNE_PRESETS, FinetuneConfig, finetune_preset
from usmoe.train.finetuned import classifier_of, load_classifier, resolved, start_of
from usmoe.train.folder import RunFolder
from usmoe.train.loop import train
from usmoe.train.scored import Scored
from usmoe.train.texts import Epochs, Texts

SHARED = Path(__file__).parents[2] / "shared" / "data"
WORDS = ("the", "a", "sea", "ship", "man", "woman", "old", "young", "house", "road", "sang", "walked")
TINY = MODELS["transformer-xl-small"].replace(layers=2, d_model=16, d_ff=16, num_experts=4, dropout=0.1)


def sentences(number: int, seed: int = 0) -> list[str]:
    draws = np.random.default_rng(seed)
    return [" ".join(draws.choice(WORDS, size=draws.integers(2, 7))) for _ in range(number)]


def pretrained(folder: Path, steps: int = 4, **changes: Any) -> Path:
    """A run of usmoe train on a few kB."""
    text = folder / "text.txt"
    text.write_text("\n".join(sentences(150)), encoding="utf-8")
    config = TrainConfig(
        corpus=Corpus(source=str(text)),
        model=TINY,
        batch=4,
        segment=16,
        memory=16,
        steps=steps,
        lr=1e-2,
        evaluate_every=steps,
        evaluation=Evaluation(batch=2, segment=16, memory=16, tokens=100),
    )
    train(config.replace(**changes), folder / "run", cache=folder / "cache", progress=False)
    return folder / "run"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return pretrained(tmp_path_factory.mktemp("checkpoint"), steps=60)


@pytest.fixture(scope="module")
def keyword(tmp_path_factory) -> Path:
    """A csv in which one word of a sentence decides its class."""
    path = tmp_path_factory.mktemp("data") / "keyword.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        for number, text in enumerate(sentences(160, seed=1)):
            table.writerow([f"{text} {('good', 'bad')[number % 2]}", ("yes", "no")[number % 2]])
    return path


def config_of(keyword: Path, **changes: Any) -> FinetuneConfig:
    said: dict[str, Any] = dict(data=Labelled(source=str(keyword)), length=48, batch=8, epochs=2, lr=3e-3)
    return FinetuneConfig(**{**said, **changes})


def texts_of(*texts: str, length: int = 48) -> Texts:
    return Texts(Bytes(), texts, length)


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """With gates whose logits differ, as a fresh model's hardly do."""
    draws = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "gate" in name:
            parameter.data = torch.randn(parameter.shape, generator=draws)
    return model


def classifier(router: str = "usmoe(k=2)", classes: int = 3, **changes: Any) -> Classifier:
    torch.manual_seed(0)
    body = LanguageModel(TINY.replace(vocabulary=256, router=router, **changes))
    return spread(Classifier(body, classes)).eval()  # pyright: ignore[reportReturnType]


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
    monkeypatch.setattr(module, "accuracy", lambda table: next(made_up))
    select = module._Loop._select
    monkeypatch.setattr(
        module._Loop,
        "_select",
        lambda loop, *rest: (
            models.append({n: t.clone() for n, t in loop.model.state_dict().items()}) or select(loop, *rest)
        ),
    )
    monkeypatch.setattr(
        module, "classify", lambda model, texts, *rest, **more: read.append(texts) or classify(model, texts, *rest)
    )
    said = finetune(config_of(keyword, epochs=4), tmp_path / "run", checkpoint=checkpoint, progress=False)
    assert said.best.epoch == 2
    tested = load_file(tmp_path / "run" / "best.safetensors")
    assert all(torch.equal(tested[name], models[1][name]) for name in tested)
    assert [len(texts) for texts in read] == [14] * 4 + [16]


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


# the model


@pytest.mark.parametrize("name", ["transformer-xl-small", "decoder-small"])
def test_the_head_reads_the_last_real_token(name: str):
    model = classifier(position=MODELS[name].position)
    texts = texts_of("a", "a longer one", "mid")
    batch = texts.batch(np.arange(3))
    logits = model(batch.tokens, batch.valid).logits
    for row, tokens in enumerate(texts.tokens):
        alone = model.body(torch.from_numpy(tokens.astype(np.int64))[None]).hidden[0, -1]
        weight, bias, out, shift = model.head.parameters()
        by_hand = torch.tanh(alone @ weight.T + bias) @ out.T + shift
        torch.testing.assert_close(logits[row], by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", ["usmoe(k=2)", "usmoe(k=1.5, alpha=0.5)", "token_choice(k=2)", "expert_choice(k=2)"])
def test_a_class_does_not_depend_on_the_texts_beside_it(router: str, keyword: Path):
    model, texts = classifier(router), texts_of(*sentences(20), "", "x")
    each = [classify(model, texts, config_of(keyword, evaluation_batch=size)) for size in (1, 5, 64)]
    for one in each[1:]:
        torch.testing.assert_close(one.logits, each[0].logits, rtol=1e-4, atol=1e-5)
        assert one.routed == pytest.approx(each[0].routed)


def test_under_a_pool_of_the_batch_it_does_and_the_result_says_so(checkpoint: Path, keyword: Path, tmp_path: Path):
    model, texts = classifier("usmoe(k=2, pool=batch)"), texts_of(*sentences(20))
    one, other = (classify(model, texts, config_of(keyword, evaluation_batch=size)).logits for size in (1, 20))
    assert (one - other).abs().max() > 1e-4
    config = config_of(keyword, router="usmoe(k=2, pool=batch)", steps=2)
    assert not finetune(config, tmp_path / "run", checkpoint=checkpoint, progress=False).alone


def test_what_stands_in_padding_changes_nothing():
    model, texts = classifier(), texts_of("a", "a longer one")
    batch = texts.batch(np.arange(2))
    wide = torch.nn.functional.pad(batch.tokens, (0, 5), value=77)
    valid = torch.nn.functional.pad(batch.valid, (0, 5), value=False)
    wide[~valid] = 99
    torch.testing.assert_close(model(wide, valid).logits, model(batch.tokens, batch.valid).logits, rtol=1e-4, atol=1e-5)


def test_a_head_needs_two_classes():
    with pytest.raises(ValueError, match="1 classes leave nothing to tell apart"):
        classifier(classes=1)


# texts and batches


def test_texts_are_cut_to_their_beginning_and_none_is_without_a_token():
    texts = texts_of("abcdef", "", "ab", length=4)
    assert [one.tolist() for one in texts.tokens] == [[97, 98, 99, 100], [10], [97, 98]]
    assert texts.cut == 1
    batch = texts.batch(np.array([2, 0]))
    assert batch.tokens.tolist() == [[97, 98, 0, 0], [97, 98, 99, 100]]
    assert batch.valid.tolist() == [[True, True, False, False], [True] * 4]
    words = learn("word", ["the sea the sea"])
    assert [one.tolist() for one in Texts(words, ["sea the", "", "none"], 9).tokens] == [[2, 3], [0], [1]]
    assert Texts(Characters(" ab", unknown=False), [""], 9).tokens[0].tolist() == [0]


def test_each_epoch_reads_every_text_once_in_an_order_of_its_own():
    texts = texts_of(*sentences(203))
    epochs = Epochs(texts, 4, seed=3)
    assert epochs.steps == 51
    orders = [[row for step in range(51) for row in epochs.at(51 * epoch + step).rows.tolist()] for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(203))
    assert orders[0] != orders[1]
    again = Epochs(texts, 4, seed=3)
    assert [again.at(step).rows.tolist() for step in (70, 3)] == [epochs.at(step).rows.tolist() for step in (70, 3)]
    assert any(Epochs(texts, 4, seed=4).at(step).rows.tolist() != again.at(step).rows.tolist() for step in range(9))


def test_texts_of_a_length_stand_together():
    texts = texts_of(*("x" * (1 + 37 * number % 40) for number in range(200)))
    padding = [float((~Epochs(texts, 8, seed=0).at(step).valid).float().mean()) for step in range(25)]
    assert np.mean(padding) < 0.1


# figures


def test_accuracy_and_macro_f1_by_hand():
    """True classes 0 0 0 1 1 2, said 0 0 1 1 2 2; class 3 neither occurs nor is said."""
    table = confusion(np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 2, 2]), 4)
    assert table.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert accuracy(table) == pytest.approx(4 / 6)
    assert macro_f1(table) == pytest.approx((4 / 5 + 2 / 4 + 2 / 3) / 3)


def test_the_band_is_that_of_rows_drawn_again():
    draws = np.random.default_rng(0)
    true = draws.integers(0, 3, 200)
    said = np.where(draws.random(200) < 0.7, true, draws.integers(0, 3, 200))
    found, values = agreement(true, said, 3), []
    for _ in range(2000):
        rows = draws.integers(0, 200, 200)
        table = confusion(true[rows], said[rows], 3)
        values.append((accuracy(table), macro_f1(table)))
    low, high = np.quantile(values, (0.025, 0.975), axis=0)
    assert found.accuracy_band == pytest.approx((low[0], high[0]), abs=0.015)
    assert found.macro_f1_band == pytest.approx((low[1], high[1]), abs=0.015)
    assert agreement(true, said, 3) == found


# stopping and going on


def same(one: Path, other: Path) -> None:
    """Two runs ended alike, bit for bit."""
    for name in ("model", "optimiser"):
        ends = [flat(RunFolder(path).read()[name]) for path in (one, other)]
        assert ends[0].keys() == ends[1].keys()
        for key, value in ends[0].items():
            assert torch.equal(value, ends[1][key]), key
    best, also = (load_file(path / "best.safetensors") for path in (one, other))
    assert all(torch.equal(best[name], also[name]) for name in best)
    timed = {"seconds": 0.0, "test_seconds": 0.0}
    result, again = (dataclasses.replace(Scored.load(path / "result.json"), **timed) for path in (one, other))
    assert result == again
    logs = [[{**row, "tokens_per_second": 0, "elapsed": 0} for row in RunFolder(path).rows()] for path in (one, other)]
    assert logs[0] == logs[1]


def flat(said: Any, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(said, torch.Tensor):
        return {name: said}
    inner = said.items() if isinstance(said, dict) else enumerate(said) if isinstance(said, list) else ()
    return {key: value for part, one in inner for key, value in flat(one, f"{name}.{part}").items()}


CHILD = """
import os, signal, sys
from pathlib import Path
from usmoe.train import finetune as module
from usmoe.train.finetune_config import FinetuneConfig
import json
learn = module._Loop._learn
def mortal(loop, batch):
    if loop.step == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    return learn(loop, batch)
module._Loop._learn = mortal
config = FinetuneConfig.from_dict(json.loads(sys.argv[1]))
module.finetune(config, Path(sys.argv[2]), checkpoint=Path(sys.argv[3]), progress=False)
"""


def test_a_run_that_was_killed_goes_on_bit_for_bit(checkpoint: Path, keyword: Path, tmp_path: Path):
    """Killed in the second epoch, some steps after its last checkpoint; the cut's averages are buffers."""
    config = config_of(keyword, checkpoint_every=5, log_every=3)
    finetune(config, tmp_path / "whole", checkpoint=checkpoint, progress=False)
    said = [json.dumps(config.to_dict()), str(tmp_path / "killed"), str(checkpoint), "28"]
    died = subprocess.run([sys.executable, "-c", CHILD, *said], capture_output=True, text=True, cwd=tmp_path)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert RunFolder(tmp_path / "killed").read()["step"] == 25
    assert not (tmp_path / "killed" / "result.json").exists()
    finetune(config, tmp_path / "killed", checkpoint=checkpoint, resume=True, progress=False)
    same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("place", ["learning", "selection", "test"])
def test_a_signal_loses_nothing(checkpoint: Path, keyword: Path, tmp_path: Path, monkeypatch, place: str):
    config = config_of(keyword, router="token_choice(k=2)", evaluation_batch=4, log_every=3)
    finetune(config, tmp_path / "whole", checkpoint=checkpoint, progress=False)
    with monkeypatch.context() as patched:
        stop_at(patched, place)
        sentence = "--resume tests the best epoch" if place == "test" else r"step \d+ of 34 is saved in .*--resume goes"
        with pytest.raises(KeyboardInterrupt, match=sentence):
            finetune(config, tmp_path / "stopped", checkpoint=checkpoint, progress=False)
    assert not (tmp_path / "stopped" / "result.json").exists()
    finetune(config, tmp_path / "stopped", checkpoint=checkpoint, resume=True, progress=False)
    same(tmp_path / "whole", tmp_path / "stopped")


def stop_at(patched: pytest.MonkeyPatch, place: str) -> None:
    """SIGTERM in step 20, in the first selection, or in the test."""
    learn, size = module._Loop._learn, {"selection": 14, "test": 16}.get(place)

    def interrupted(loop: Any, batch: Any) -> Any:
        if loop.step == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(loop, batch)

    def read(model: Any, texts: Texts, *rest: Any, **more: Any) -> Any:
        if len(texts) == size:
            os.kill(os.getpid(), signal.SIGTERM)
        return classify(model, texts, *rest, **more)

    if place == "learning":
        patched.setattr(module._Loop, "_learn", interrupted)
    else:
        patched.setattr(module, "classify", read)


def test_a_whole_run_is_not_run_again(checkpoint: Path, keyword: Path, tmp_path: Path, monkeypatch):
    config = config_of(keyword, steps=3)
    said = finetune(config, tmp_path / "run", checkpoint=checkpoint, progress=False)
    with pytest.raises(ValueError, match=r"holds a run already\. Give --resume to go on with it, --force to begin"):
        finetune(config, tmp_path / "run", checkpoint=checkpoint, progress=False)
    monkeypatch.setattr(module._Loop, "_learn", None)
    assert finetune(config, tmp_path / "run", checkpoint=checkpoint, resume=True, progress=False) == said
    monkeypatch.undo()
    other = finetune(config.replace(seed=1), tmp_path / "run", checkpoint=checkpoint, anew=True, progress=False)
    assert other.config.seed == 1
    assert all(row["step"] <= 3 for row in RunFolder(tmp_path / "run").rows())


def test_what_changed_between_stop_and_resume_is_said(checkpoint: Path, keyword: Path, tmp_path: Path):
    config = config_of(keyword, steps=3)
    finetune(config, tmp_path / "run", checkpoint=checkpoint, progress=False)
    again: dict[str, Any] = dict(checkpoint=checkpoint, resume=True, progress=False)
    with pytest.raises(ValueError, match=r"begun with another configuration: lr was 0\.003 and is 0\.1"):
        finetune(config.replace(lr=0.1), tmp_path / "run", **again)
    with pytest.raises(ValueError, match=r"checkpoint\.model was 'best' and is 'last'"):
        finetune(config, tmp_path / "run", which="last", **again)
    lines = keyword.read_text(encoding="utf-8").splitlines()
    moved = tmp_path / keyword.name
    moved.write_text("\n".join([*lines[:-1], "another text bad,no"]), encoding="utf-8")
    run = tmp_path / "moved"
    finetune(config_of(moved, steps=3), run, checkpoint=checkpoint, progress=False)
    moved.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=r"another configuration: rows was '\w{12}' and is '\w{12}'"):
        finetune(config_of(moved, steps=3), run, **again)
    finetune(config.replace(log_every=1), tmp_path / "run", **again)  # what is only written may change


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


# what is refused


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path: Path, keyword: Path):
    run = pretrained(tmp_path, corpus__level="char")
    other = config_of(keyword, from_scratch=True, model=TINY.replace(vocabulary=300))
    with pytest.raises(ValueError, match=r"The model knows 300 tokens, and the checkpoint's vocabulary has \d+"):
        finetune(other, tmp_path / "one", checkpoint=run, progress=False)
    said = json.loads((run / "vocabulary.json").read_text(encoding="utf-8"))
    narrow = {**said, "alphabet": said["alphabet"] + "z", "unknown": False}
    (run / "vocabulary.json").write_text(json.dumps(narrow), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"does not fit these texts, as '[a-z ]+ (good|bad)': The text holds '\w', which"
    ):
        finetune(config_of(keyword), tmp_path / "two", checkpoint=run, progress=False)
    (run / "vocabulary.json").write_text(json.dumps({"level": "byte"}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"the vocabulary has 256 tokens, and the model \d+"):
        finetune(config_of(keyword), tmp_path / "three", checkpoint=run, progress=False)
    assert not any((tmp_path / name / "config.json").exists() for name in ("one", "two", "three"))


def test_a_folder_that_is_no_checkpoint_is_refused(checkpoint: Path, keyword: Path, tmp_path: Path):
    config = config_of(keyword, steps=2)
    with pytest.raises(ValueError, match="holds no run of usmoe train"):
        finetune(config, tmp_path / "run", checkpoint=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"has no first\.safetensors"):
        finetune(config, tmp_path / "run", checkpoint=checkpoint, which="first", progress=False)
    with pytest.raises(ValueError, match="holds a run of usmoe train"):
        finetune(config, checkpoint, checkpoint=checkpoint, anew=True, progress=False)
    finetune(config, tmp_path / "run", checkpoint=checkpoint, progress=False)
    with pytest.raises(ValueError, match="is a run of usmoe finetune"):
        finetune(config, tmp_path / "other", checkpoint=tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="holds no classifier"):
        load_classifier(checkpoint)


def test_a_loss_that_is_no_number_is_refused(checkpoint: Path, keyword: Path, tmp_path: Path, monkeypatch):
    """The parameters are as they were, and the checkpoint stays."""
    config, balance = config_of(keyword, checkpoint_every=2, balance=0.1), module.balance_loss
    calls = []
    monkeypatch.setattr(
        module,
        "balance_loss",
        lambda said: calls.append(1) or balance(said) * (float("nan") if len(calls) == 4 else 1),
    )
    sentence = (
        r"gradient's norm is nan at step 3, on the texts (\d+, ){7}\d+ of training; the last good .*, of step 2\."
    )
    with pytest.raises(ValueError, match=sentence):
        finetune(config, tmp_path / "run", checkpoint=checkpoint, progress=False)
    assert RunFolder(tmp_path / "run").read()["step"] == 2


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"epochs": 0}, "epochs=0 is impossible"),
        ({"steps": 0}, "steps=0 is impossible"),
        ({"length": 1.5}, "length=1.5 is impossible"),
        ({"lr": 0.0}, "lr=0.0 learns nothing"),
        ({"clip": -1.0}, "clip=-1.0 is impossible"),
        ({"balance": -1.0}, "balance=-1.0 is impossible"),
        ({"dropout": 1.0}, "dropout=1.0 is no share"),
        ({"precision": "half"}, "no precision 'half'. Known: auto, float32, bfloat16"),
        ({"router": "usmo(k=2)"}, "no router 'usmo'"),
    ],
)
def test_an_impossible_configuration_is_refused(fields: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        FinetuneConfig(data=Labelled(source="sst2"), **fields)


def test_a_configuration_that_contradicts_the_checkpoint_is_refused(checkpoint: Path, keyword: Path):
    start, _ = start_of(checkpoint, "best")
    dense = TINY.replace(num_experts=0)
    for changes, sentence in (
        ({"model": dense}, "Add from_scratch"),
        ({"model": dense, "from_scratch": True, "balance": 0.1}, "A dense model has no experts"),
        ({"model": dense, "from_scratch": True, "router": "usmoe(k=1)"}, "A dense model has no experts"),
    ):
        with pytest.raises(ValueError, match=sentence):
            resolved(config_of(keyword, **changes), start, "cpu")


def test_the_papers_presets():
    """arXiv 2503.22996, Table 16."""
    table = {name: (one.length, one.batch, one.lr, one.epochs) for name, one in FINETUNE_PRESETS.items()}
    row = (512, 16, 1e-4, 15)
    assert table == {"sst2": row, "sst5": row, "imdb": (512, 4, 1e-4, 15), "banking77": row}
    assert finetune_preset("mine.csv").data.source == "mine.csv"
    assert FinetuneConfig.from_dict(finetune_preset("imdb").to_dict()) == finetune_preset("imdb")


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
    status, out, err = command(*words)
    assert status == 0, err
    assert "mean ± deviation" in out
    assert "Selected by: 14 rows set aside from keyword.csv" in out
    assert "Tested on: 16 rows set aside" in out
    assert "test texts are longer than 24 tokens" in out
    assert (tmp_path / "run" / "seed-1" / "result.json").is_file()
    status, out, err = command(*words, "--resume", "--json")
    said = json.loads(out)
    values = [one["accuracy"] for one in said["seeds"]]
    assert said["accuracy"] == {
        "mean": pytest.approx(np.mean(values)),
        "deviation": pytest.approx(np.std(values, ddof=1)),
    }
    assert [one["config"]["seed"] for one in said["seeds"]] == [0, 1]


def test_the_command_refuses_in_one_line(command, checkpoint: Path, keyword: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, sentence, expected in (
        ((checkpoint, "nothing.csv"), "There is no file, folder or data set 'nothing.csv'", 1),
        ((checkpoint, "sst22"), "Did you mean sst2?", 1),
        ((tmp_path, keyword), "holds no run of usmoe train", 1),
        ((checkpoint, keyword, "--router", "usmoe(k=9)"), "k=9", 1),
        ((checkpoint, keyword, "--resume"), "Say which: --run FOLDER", 2),
        ((checkpoint, keyword, "-o", "x", "--resume", "--force"), "Give one of them", 2),
    ):
        status, out, err = command(*words)
        assert (status, out) == (expected, ""), err
        assert sentence in err
        assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


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
