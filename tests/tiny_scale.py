"""The small scale of training experiments, made tiny: two layers, six steps, a few kilobytes of text.

python tests/tiny_scale.py table14 --data DIR --results DIR    # usmoe reproduce at that scale
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from usmoe.models import SAMPLE
from usmoe.reproduce.training import plan, runs, study
from usmoe.train.config import Evaluation
from usmoe.types import Routing

EVALUATION = Evaluation(batch=4, segment=16, memory=16, tokens=600)
TINY = runs.SMALL.replace(
    model__layers=2,
    model__d_model=16,
    model__d_ff=8,
    steps=6,
    batch=4,
    segment=16,
    memory=16,
    warmup=2,
    evaluate_every=3,
    log_every=2,
    checkpoint_every=2,
    evaluation=EVALUATION,
)


def write_texts(folder: Path) -> Path:
    """A folder with the text "novels" in three splits."""
    (folder / "novels").mkdir(parents=True)
    text, start = SAMPLE.read_text(encoding="utf-8"), 0
    for split, length in (("train", 8000), ("valid", 1500), ("test", 1500)):
        (folder / "novels" / f"{split}.txt").write_text(text[start : start + length], encoding="utf-8")
        start += length
    return folder


def shrink(patch: Any) -> None:
    """Make the small scale tiny. `patch` is pytest's monkeypatch."""
    patch.setattr(study, "SMALL", TINY)
    measurement = plan.Measurement(evaluation=EVALUATION, positions=10)
    patch.setitem(plan.MEASUREMENTS, "small", measurement)
    for name, one in study.STUDIES.items():
        patch.setitem(study.STUDIES, name, dataclasses.replace(one, steps=6))


def first_two(logits: torch.Tensor, valid: torch.Tensor | None = None, **given: Any) -> Routing:
    """A router of one's own: every token goes to experts 0 and 1, half to each."""
    flat = logits.flatten(0, 1)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[:, :2] = True
    return Routing.from_dense(flat.sigmoid() * mask, mask, valid=valid, sequences=len(logits))


if __name__ == "__main__":
    import pytest

    from usmoe.cli.app import main

    shrink(pytest.MonkeyPatch())
    sys.argv[1:1] = ["reproduce"]
    main()
