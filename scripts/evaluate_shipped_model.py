"""Bits per byte of the shipped model on whole texts, as JSON on stdout.

python scripts/evaluate_shipped_model.py novels/validation.txt.gz novels/test.txt.gz > results/shipped_model.json

Teacher-forced under the model's own choice, in windows of the model's whole context, side by side: the first token of
a window is context alone. Bits of all predicted tokens over the bytes that these tokens decode to on average.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch

from train_shipped_model import read_text, tokens_of
from usmoe.hf.likelihood import teacher_forced
from usmoe.hf.load import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="+", help="plain or .gz")
    parser.add_argument("--model", default=None, help="a folder; by default the shipped model")
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    length = model.config.max_position_embeddings
    rows = []
    for path in args.texts:
        text = read_text(path)
        ids = torch.from_numpy(tokens_of(text, tokenizer).astype("int64"))
        windows = ids[: len(ids) // length * length].view(-1, length)
        nats = teacher_forced(model, windows, batch_size=16).double().mean().item()
        bits = nats / math.log(2) * len(ids) / len(text.encode())
        rows.append({"text": path.name, "tokens": len(ids), "bits_per_byte": bits})
        print(f"{path.name}: {bits:.4f}", file=sys.stderr)
    json.dump({"length": length, "rows": rows}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
