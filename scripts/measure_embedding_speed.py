"""How fast `Encoder.encode` is beside sentence-transformers hosting the same model, and what sorting by length gains.

    python scripts/measure_embedding_speed.py > results/embedding_speed.json

The shipped model in float32, mean pooling, batches of 32; texts are pieces of the novels that ship with it. Each way is
run in turn, several times, and the least time counts: only ratios within one run mean anything.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

import usmoe
from usmoe.models import CALIBRATION, SHIPPED

BATCH = 32


def pieces(lengths: np.ndarray) -> list[str]:
    """Texts of so many words, one after the other from the novels."""
    words = CALIBRATION.read_text(encoding="utf-8").split()
    starts = np.cumsum(lengths) - lengths
    return [
        " ".join(words[(start + at) % len(words)] for at in range(length))
        for start, length in zip(starts, lengths, strict=True)
    ]


def least(ways: dict[str, Callable[[list[str]], object]], texts: list[str], times: int) -> dict[str, float]:
    """Seconds of each way on the texts, the least of several; the ways take turns."""
    found = {name: float("inf") for name in ways}
    for _ in range(times):
        for name, run in ways.items():
            begun = time.perf_counter()
            run(texts)
            found[name] = min(found[name], time.perf_counter() - begun)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    random = np.random.default_rng(0)
    sets = {
        "short (5 to 20 words)": pieces(random.integers(5, 21, 600)),
        "mixed (4 to 300 words, log-uniform)": pieces(np.exp(random.uniform(np.log(4), np.log(300), 300)).astype(int)),
    }
    hosted = Transformer(str(SHIPPED), model_kwargs={"dtype": torch.float32})
    plain = SentenceTransformer(modules=[hosted, Pooling(hosted.get_embedding_dimension(), "mean")], device="cpu")
    ours = usmoe.Encoder(pooling="mean")
    routed = usmoe.Encoder(router=usmoe.OwnChoice(), pooling="mean")
    ways: dict[str, Callable[[list[str]], object]] = {
        "sentence-transformers": lambda texts: plain.encode(texts, batch_size=BATCH),
        "Encoder": lambda texts: ours.encode(texts, BATCH, progress=False),
        "Encoder, OwnChoice()": lambda texts: routed.encode(texts, BATCH, progress=False),
        "Encoder, in the order of arrival": lambda texts: [
            ours.encode(texts[at : at + BATCH], BATCH, progress=False) for at in range(0, len(texts), BATCH)
        ],
    }
    rows = []
    for name, texts in sets.items():
        difference = np.abs(plain.encode(texts) - ours.encode(texts, progress=False)).max()
        seconds = least(ways, texts, given.times)
        rows.append({"texts": name, "number": len(texts), "largest_difference": float(difference), "seconds": seconds})
        sys.stderr.write(f"{rows[-1]}\n")
    json.dump({"threads": given.threads, "times": given.times, "batch": BATCH, "rows": rows}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
