"""What the shipped model reaches on whole texts, and two figures of the patch, as JSON on stdout.

python scripts/evaluate_shipped_model.py novels/validation.txt.gz novels/test.txt.gz > results/shipped_model.json

Teacher-forced under the model's own choice, in windows of the model's whole context, side by side: the first token of
a window is context alone. Bits of all predicted tokens over the bytes that these tokens decode to on average.

The patch, on the first 4,096 tokens of the last text: the largest difference between the logits of the model and those
of the model under OwnChoice() through our path, in float32; and the share of (token, expert) pairs chosen in float32
that are not chosen when the model runs in bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from pathlib import Path

import torch

import usmoe
from usmoe.data.bpe import Pieces
from usmoe.data.text import FilePart
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
        text = b"".join(FilePart(path).blocks()).decode()
        ids = torch.tensor(Pieces(tokenizer.backend_tokenizer.to_str()).encode(text), dtype=torch.int64)
        windows = ids[: len(ids) // length * length].view(-1, length)
        nats = teacher_forced(model, windows, batch_size=16).double().mean().item()
        bits = nats / math.log(2) * len(ids) / len(text.encode())
        rows.append({"text": path.name, "tokens": len(ids), "bits_per_byte": bits})
        print(f"{path.name}: {bits:.4f}", file=sys.stderr)
    patch = figures_of_the_patch(model, windows[: 4096 // length])
    json.dump({"length": length, "rows": rows, "patch": patch}, sys.stdout, indent=1)


@torch.no_grad()
def figures_of_the_patch(model, tokens: torch.Tensor) -> dict[str, float]:
    theirs = model(tokens).logits
    with usmoe.patched(model, usmoe.OwnChoice()):
        ours = model(tokens).logits
    figures = {
        "largest_logit": theirs.abs().max().item(),
        "largest_difference_under_own_choice": (ours - theirs).abs().max().item(),
    }
    coarse = copy.deepcopy(model).to(torch.bfloat16)
    for router in (usmoe.OwnChoice(), usmoe.USMoE(), usmoe.USMoE(k="0.75x")):
        flipped = [1 - kept for kept in map(kept_pairs, chosen(model, router, tokens), chosen(coarse, router, tokens))]
        figures[f"share_of_pairs_flipped_in_bfloat16 {router}"] = sum(flipped) / len(flipped)
    return figures


def chosen(model, router, tokens: torch.Tensor) -> list[torch.Tensor]:
    """The pairs of every layer."""
    with usmoe.patched(model, router), usmoe.record(model) as trace:
        model(tokens)
    return [said.routing.pair for said in trace.last.values()]


def kept_pairs(fine: torch.Tensor, coarse: torch.Tensor) -> float:
    return torch.isin(fine, coarse).double().mean().item()


if __name__ == "__main__":
    main()
