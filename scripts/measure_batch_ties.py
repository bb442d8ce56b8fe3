"""How often the vector of a text moves with the other texts of its batch, as JSON on stdout; and whether it would help
to rank pairs by coarser scores.

    python scripts/measure_batch_ties.py stsbenchmark/test.parquet novels/validation.txt.gz

A product of another number of rows is rounded otherwise, so that two tokens (or two experts of a token) whose scores
lie within a rounding of each other may change places with the batch. Each text is encoded alone, and again in batches
of 32: with texts of about its length, and among any, so that it is padded. A vector has moved when it is further from
that of the text alone than a share of its length. The scores that rank, in float32, are taken as they are, and rounded
to so many bits: what is coarser has more ties (which the lower index wins in any batch), and as likely as before a
rounding carries a score over an edge of the grid.

Beside it, what coarser scores cost: bits a byte of the second file (its first 30,000 characters, teacher-forced, in
windows of the whole context), and the share of pairs that the scores as they are would not choose of the same logits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet
import torch

import usmoe
from usmoe.data.bpe import Pieces
from usmoe.data.text import FilePart
from usmoe.hf.likelihood import teacher_forced
from usmoe.hf.load import load
from usmoe.lp import greedy
from usmoe.routing import prefix, select, token_choice, unified

BITS = (None, 16, 12, 8)
ROUTERS = ("usmoe(alpha=0.5)", "usmoe(alpha=0.0)", "expert_choice", "own_choice")
FAR = (1e-4, 1e-3, 1e-2)
"""Shares of the length of a vector."""


def coarse(scores: torch.Tensor, bits: int | None) -> torch.Tensor:
    """Scores to so many binary digits, to nearest."""
    if bits is None:
        return scores
    mantissa, exponent = scores.double().frexp()
    return (mantissa * 2**bits).round().div(2**bits).ldexp(exponent).where(scores.isfinite(), scores).to(scores.dtype)


@contextlib.contextmanager
def ranked_by(bits: int | None) -> Iterator[dict[str, int]]:
    """All selections are made by coarser scores; given: the pairs so far, and those of them that the scores as they are
    would not choose."""
    count = {"pairs": 0, "other pairs": 0}
    top, top_alike = greedy.top, greedy.top_alike
    with contextlib.ExitStack() as stack:
        for module in (prefix, select, token_choice, unified):
            for name, function in (("top", top), ("top_alike", top_alike)):
                if hasattr(module, name):
                    rounded = _rounded(function, bits, count)
                    stack.enter_context(mock.patch.object(module, name, rounded))
        yield count


def _rounded(function: Any, bits: int | None, count: dict[str, int]) -> Any:
    def choose(scores: torch.Tensor, *rest: Any) -> Any:
        found = function(coarse(scores, bits), *rest)
        exact = found if bits is None else function(scores, *rest)
        if found is not None and exact is not None:
            count["pairs"] += int(found[0].sum())
            count["other pairs"] += int((found[0] & ~exact[0]).sum())
        return found

    return choose


def moved(encoder: Any, texts: list[str]) -> dict[str, Any]:
    """Shares of the texts whose vector moves, and the furthest."""
    alone = np.concatenate([encoder.encode([text], progress=False) for text in texts])
    order = list(range(len(texts)))
    random.Random(0).shuffle(order)
    far = np.zeros(len(texts))
    together = encoder.encode(texts, batch_size=32, progress=False)  # sorted by length
    mixed = np.zeros_like(alone)
    for start in range(0, len(order), 32):
        part = order[start : start + 32]
        mixed[part] = encoder.encode([texts[index] for index in part], batch_size=32, progress=False)
    for vectors in (together, mixed):
        far = np.maximum(far, np.linalg.norm(vectors - alone, axis=1) / np.linalg.norm(alone, axis=1))
    return {f"over {share:g}": float((far > share).mean()) for share in FAR} | {"furthest": float(far.max())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="a parquet file")
    parser.add_argument("--column", default="sentence1", help="of the texts")
    parser.add_argument("--characters", type=int, help="of each text, its first ones")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("held_out", type=Path, help="a text, plain or .gz")
    parser.add_argument("--count", type=int, default=400, help="texts")
    given = parser.parse_args()
    column = pyarrow.parquet.read_table(given.texts, columns=[given.column])[given.column].to_pylist()
    texts = list(dict.fromkeys(text[: given.characters] for text in column))[: given.count]
    rows = []
    for dtype in given.dtypes.split(","):
        model, tokenizer = load(None, dtype=dtype)
        length = model.config.max_position_embeddings
        text = b"".join(FilePart(given.held_out).blocks()).decode()[:30_000]
        ids = torch.tensor(Pieces(tokenizer.backend_tokenizer.to_str()).encode(text), dtype=torch.int64)
        windows = ids[: len(ids) // length * length].view(-1, length)
        for name in ROUTERS:
            router = usmoe.parse_router(name)
            for bits in BITS:
                with ranked_by(bits) as count:
                    row = {"dtype": dtype, "router": name, "bits": bits}
                    row |= moved(usmoe.Encoder(model, tokenizer, router=router), texts)
                    with usmoe.patched(model, router):
                        nats = teacher_forced(model, windows, batch_size=16).double().mean().item()
                row["bits_per_byte"] = nats / math.log(2) * len(ids) / len(text.encode())
                row["other_pairs"] = count["other pairs"] / count["pairs"]
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    json.dump({"texts": len(texts), "rows": rows}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
