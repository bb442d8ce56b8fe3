"""Table 13 as settings.

What the paper leaves open is decided here:

- It does not say which pre-trained model is fine-tuned: at paper scale that of enwik8, at small scale that of novels,
  both as trained for Table 14.
- At small scale the sets are cut (SMALL_*), so that all rows fit on two cores.
"""

from __future__ import annotations

from collections.abc import Mapping

from usmoe.reproduce.experiment import Scale
from usmoe.reproduce.training.study import STUDIES, Row
from usmoe.train.finetune_config import FINETUNE_PRESETS, FinetuneConfig

TASKS: Mapping[str, str] = {"sst2": "SST-2", "sst5": "SST-5", "imdb": "IMDB", "banking77": "BANKING77"}
"""Ours -> as the paper writes it."""

ROWS: tuple[Row, ...] = tuple(row for row in STUDIES["table14"].rows if row.paper and row.name != "usmoe_time_step")
"""The paper's seven columns; their pre-trained models are those of Table 14."""

CORPORA: Mapping[Scale, tuple[str, ...]] = {"small": ("novels",), "paper": ("enwik8",)}
"""On what the models are pre-trained."""

SMALL_LENGTH = 200
"""Tokens of a text that are read: bytes."""
SMALL_ROWS: Mapping[str, int] = {"sst2": 8_000, "sst5": 3_000, "imdb": 1_500, "banking77": 6_000}
"""Training rows: some 0.3 to 0.4 million bytes an epoch."""
SMALL_TEST_ROWS = 1000
SMALL_SELECTION_ROWS = 500
SMALL_EPOCHS = 3
SMALL_LR = 5e-4


def small(task: str) -> FinetuneConfig:
    """What the small scale has in place of Table 16: fewer rows, shorter texts, fewer epochs, a higher rate, and a head
    on the mean of a text's states, since these bodies carry little to the last of them."""
    return FINETUNE_PRESETS[task].replace(
        batch=16,
        length=SMALL_LENGTH,
        epochs=SMALL_EPOCHS,
        lr=SMALL_LR,
        pooling="mean",
        data__train_rows=SMALL_ROWS[task],
        data__validation_rows=SMALL_SELECTION_ROWS,
        data__test_rows=SMALL_TEST_ROWS,
    )


def settings(task: str, scale: Scale) -> FinetuneConfig:
    """The configuration of a set at a scale."""
    return small(task) if scale == "small" else FINETUNE_PRESETS[task]
