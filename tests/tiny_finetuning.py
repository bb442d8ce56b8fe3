"""A tiny checkpoint of `usmoe train`, and a tiny data set in which a word decides."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from usmoe.data.classification import Labelled
from usmoe.data.corpus import Corpus
from usmoe.data.vocabulary import Bytes
from usmoe.models.config import MODELS
from usmoe.train.config import Evaluation, TrainConfig
from usmoe.train.finetune_config import FinetuneConfig
from usmoe.train.loop import train
from usmoe.train.texts import Texts

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


def keyword_csv(path: Path) -> Path:
    """160 rows: one word of a sentence decides its class."""
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
