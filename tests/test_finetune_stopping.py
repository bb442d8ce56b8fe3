"""A fine-tuning run goes on bit for bit where it was stopped, and refuses in a sentence what cannot be gone on with."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("datasets", reason="the extra usmoe[train]")
pytest.importorskip("accelerate", reason="the extra usmoe[train]")

from safetensors.torch import load_file

from tiny_finetuning import TINY, config_of, keyword_csv, pretrained
from usmoe.data.classification import Labelled
from usmoe.train import finetune as finetune_module
from usmoe.train import finetune_loop
from usmoe.train.classify import classify
from usmoe.train.finetune import finetune
from usmoe.train.finetune_config import FINETUNE_PRESETS, FinetuneConfig, finetune_preset
from usmoe.train.finetune_loop import FinetuneLoop
from usmoe.train.finetuned import load_classifier, resolved, start_of
from usmoe.train.folder import RunFolder
from usmoe.train.scored import Scored
from usmoe.train.texts import Texts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return pretrained(tmp_path_factory.mktemp("checkpoint"), steps=60)


@pytest.fixture(scope="module")
def keyword(tmp_path_factory) -> Path:
    return keyword_csv(tmp_path_factory.mktemp("data") / "keyword.csv")


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
from usmoe.train.finetune import finetune
from usmoe.train.finetune_config import FinetuneConfig
from usmoe.train.finetune_loop import FinetuneLoop
import json
learn = FinetuneLoop._learn
def mortal(loop, batch):
    if loop.step == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    return learn(loop, batch)
FinetuneLoop._learn = mortal
config = FinetuneConfig.from_dict(json.loads(sys.argv[1]))
finetune(config, Path(sys.argv[2]), checkpoint=Path(sys.argv[3]), progress=False)
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
    assert RunFolder(tmp_path / "stopped").read()["step"] == {"learning": 21, "selection": 17, "test": 34}[place]
    finetune(config, tmp_path / "stopped", checkpoint=checkpoint, resume=True, progress=False)
    same(tmp_path / "whole", tmp_path / "stopped")


def stop_at(patched: pytest.MonkeyPatch, place: str) -> None:
    """SIGTERM in step 20, in the first selection, or in the test."""
    learn, size = FinetuneLoop._learn, {"selection": 14, "test": 16}.get(place)

    def interrupted(loop: Any, batch: Any) -> Any:
        if loop.step == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(loop, batch)

    def read(model: Any, texts: Texts, *rest: Any, **more: Any) -> Any:
        if len(texts) == size:
            os.kill(os.getpid(), signal.SIGTERM)
        return classify(model, texts, *rest, **more)

    if place == "learning":
        patched.setattr(FinetuneLoop, "_learn", interrupted)
    else:
        for module in (finetune_module, finetune_loop):
            patched.setattr(module, "classify", read)


def test_a_whole_run_is_not_run_again(checkpoint: Path, keyword: Path, tmp_path: Path, monkeypatch):
    config = config_of(keyword, steps=3)
    said = finetune(config, tmp_path / "run", checkpoint=checkpoint, progress=False)
    with pytest.raises(ValueError, match=r"holds a run already\. Give --resume to go on with it, --force to begin"):
        finetune(config, tmp_path / "run", checkpoint=checkpoint, progress=False)
    monkeypatch.setattr(FinetuneLoop, "_learn", None)
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
    with pytest.raises(ValueError, match=r"no model 'first' of a run\. Choose one of: best, last"):
        finetune(config, tmp_path / "run", checkpoint=checkpoint, which="first", progress=False)
    with pytest.raises(ValueError, match="holds a run of usmoe train"):
        finetune(config, checkpoint, checkpoint=checkpoint, anew=True, progress=False)
    finetune(config, tmp_path / "run", checkpoint=checkpoint, progress=False)
    with pytest.raises(ValueError, match="is a run of usmoe finetune"):
        finetune(config, tmp_path / "other", checkpoint=tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="holds no classifier"):
        load_classifier(checkpoint)


def test_a_damaged_configuration_is_named(checkpoint: Path, keyword: Path, tmp_path: Path):
    finetune(config_of(keyword, steps=1), tmp_path, checkpoint=checkpoint, progress=False)
    path = tmp_path / "config.json"
    said = json.loads(path.read_text())
    for text, sentence in (
        (path.read_text()[:50], r"config\.json is no JSON \("),
        ("[]", r"config\.json is no JSON object"),
        (
            json.dumps({**said, "task": {"digest": ""}}),
            r"config\.json lacks task\.classes\. Put the one of the run back",
        ),
        (json.dumps({**said, "schema": 0}), r"config\.json is of another version"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=sentence):
            load_classifier(tmp_path)
        with pytest.raises(ValueError, match=sentence):
            finetune(config_of(keyword, steps=1), tmp_path, checkpoint=checkpoint, resume=True, progress=False)


def test_a_loss_that_is_no_number_is_refused(checkpoint: Path, keyword: Path, tmp_path: Path, monkeypatch):
    """The parameters are as they were, and the checkpoint stays."""
    config, balance = config_of(keyword, checkpoint_every=2, balance=0.1), finetune_loop.balance_loss
    calls = []
    monkeypatch.setattr(
        finetune_loop,
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
        ({"pooling": "first"}, "no pooling 'first'. Known: last, mean, weighted_mean"),
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
