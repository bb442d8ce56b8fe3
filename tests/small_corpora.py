"""A small text in three splits, and the real texts where they are beside the checkout: what the tests of corpora
share."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from usmoe.data.corpus import Corpus

SHARED = Path(__file__).parents[2] / "shared" / "data"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not here")

ABC = {"train": "the cat sat\nthe dog sat\n", "valid": "the cat ran\n", "test": "a dog sat\n"}


def folder(place: Path, texts: dict[str, str] = ABC, ending: str = ".txt") -> Path:
    place.mkdir(parents=True, exist_ok=True)
    for split, text in texts.items():
        packed = gzip.compress(text.encode()) if ending.lower().endswith(".gz") else text.encode()
        (place / f"{split}{ending}").write_bytes(packed)
    return place


def at(path: Path, **settings) -> Corpus:
    return Corpus(source=str(path), **settings)
