"""Mean and deviation of each feature over a named sample of texts, taken once and kept: never those of a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from usmoe.embed.rows import texts_of
from usmoe.models import CALIBRATION

SHIPPED_SAMPLE = "novels"
"""Name of the sample that ships with usmoe: some 380 lines of many novels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """What to take off each feature, and what to divide it by."""

    name: str
    """Of the sample."""
    texts: int
    """In the sample."""
    mean: np.ndarray
    """(F,)."""
    deviation: np.ndarray
    """(F,); 1 where a feature does not vary in the sample."""

    @property
    def digest(self) -> str:
        """Hexadecimal digits that other values do not share."""
        return hashlib.sha256(self.mean.tobytes() + self.deviation.tobytes()).hexdigest()

    @staticmethod
    def of(features: np.ndarray, name: str) -> Statistics:
        """Of features (n, F) of a sample. Raises ValueError for fewer than two texts."""
        if len(features) < 2:
            raise ValueError(
                f"The sample {name!r} holds {len(features)} texts, and a deviation needs two at least. Give some "
                "hundred texts that are like yours."
            )
        wide = features.astype(np.float64)
        deviation = wide.std(axis=0)
        deviation[deviation <= 1e-12 * np.maximum(np.abs(wide).max(axis=0), 1e-300)] = 1.0
        return Statistics(
            name=name,
            texts=len(features),
            mean=wide.mean(axis=0).astype(np.float32),
            deviation=deviation.astype(np.float32),
        )

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Features (n, F), standardised. Raises ValueError where F is not that of the sample."""
        if features.shape[1] != len(self.mean):
            raise ValueError(
                f"The statistics of {self.name!r} are of {len(self.mean)} features, and there are {features.shape[1]}. "
                "Take them anew for this embedding: standardize=texts."
            )
        return (features - self.mean) / self.deviation


def sample_of(given: Any) -> tuple[str, list[str]]:
    """Name and texts of a sample: the shipped one ("novels"), a file (as usmoe.embed.rows reads them), a list of
    texts, or {name: texts}.

    Raises ValueError for a file that is missing or not UTF-8, and TypeError for what is none of these.
    """
    if isinstance(given, Mapping) and len(given) == 1:
        name, texts = next(iter(given.items()))
        return str(name), list(texts)
    if given == SHIPPED_SAMPLE:
        text = CALIBRATION.read_text(encoding="utf-8")
        return SHIPPED_SAMPLE, [line.strip() for line in text.split("\n") if len(line.split()) >= 4][::3]
    if isinstance(given, str | Path):
        path = Path(given)
        if not path.is_file():
            raise ValueError(
                f"standardize={str(given)!r} is no sample and no file. Give {SHIPPED_SAMPLE!r}, a file with a text a "
                "line, or a list of texts."
            )
        return path.name, [text for text in texts_of(str(path)) if text.strip()]
    if isinstance(given, Sequence):
        texts = list(given)
        digest = hashlib.sha256("\0".join(map(str, texts)).encode()).hexdigest()[:8]
        return f"{len(texts)} texts {digest}", texts
    raise TypeError(
        f"standardize cannot be a {type(given).__name__}. Give {SHIPPED_SAMPLE!r}, a file, a list of texts, "
        "{name: texts}, or Statistics that were kept."
    )
