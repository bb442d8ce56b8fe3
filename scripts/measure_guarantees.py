"""What the guarantees of step 2 do and cost on the shipped model: bounds, prefix, bucket, and the solver's time.

python scripts/measure_guarantees.py > results/guarantees.json

Perplexity on the shipped sample (16,384 tokens in sequences of 512), thresholds from the shipped calibration text.
Times are medians of one run on this machine, of routing alone, all four layers' logits of eight sequences; only their
ratio means anything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import usmoe
from usmoe import BoundedChoice, TokenChoice, USMoE
from usmoe.cli.tokens import corpus, token_ids
from usmoe.hf.compare import Contender, Tally, compare, settled, steps
from usmoe.hf.load import load
from usmoe.hf.patch import listening, patch_of
from usmoe.models import SAMPLE

BOUNDED: list[Contender] = [
    Contender(label="token choice", router=TokenChoice()),
    Contender(label="USMoE", router=USMoE()),
    Contender(label="bounded: 1 to 4 experts, load at most 1.25", router=BoundedChoice()),
    Contender(label="bounded: 1 to 8 experts, load at most 1.25", router=BoundedChoice(per_token=(1, 8))),
    Contender(label="token choice, 3 of 4", router=TokenChoice(k=3)),
    Contender(label="USMoE, 0.75x", router=USMoE(k="0.75x")),
    Contender(label="bounded, 0.75x: 1 to 4 experts, load at most 1.25", router=BoundedChoice(k="0.75x")),
    Contender(label="prefix", router=USMoE(pool="prefix")),
    Contender(label="prefix, burst 8", router=USMoE(pool="prefix", burst=8)),
    Contender(label="threshold", router=USMoE(pool="threshold"), calibrated=True),
    Contender(label="threshold, burst 8", router=USMoE(pool="threshold", burst=8), calibrated=True),
    Contender(label="threshold, 0.75x", router=USMoE(k="0.75x", pool="threshold"), calibrated=True),
    Contender(
        label="threshold, 0.75x, at least 1", router=USMoE(k="0.75x", pool="threshold", min_experts=1), calibrated=True
    ),
]

SHIFTED = ("threshold", "threshold, burst 8", "prefix", "prefix, burst 8")


@torch.no_grad()
def spent(model: Any, router: Any, tokens: Tensor) -> float:
    """Mean experts a token."""
    with usmoe.patched(model, router):
        state = patch_of(model)
        assert state is not None
        tally = Tally(state.layers)
        with listening(model, tally):
            for part in tokens.split(8):
                model(input_ids=part, use_cache=False)
    return tally.summary()["experts_mean"]


@torch.no_grad()
def fullest(model: Any, router: Any, tokens: Tensor) -> float:
    """Tokens of the fullest expert of any sequence and layer, as a multiple of an even share."""
    most = 0.0
    for sequence in tokens[:, None]:
        with usmoe.patched(model, router), usmoe.record(model) as trace:
            model(input_ids=sequence, use_cache=False)
        loads = [said.routing.load.double() for said in trace.last.values()]
        most = max(most, *((load.max() / load.mean()).item() for load in loads))
    return most


@torch.no_grad()
def times(model: Any, tokens: Tensor, repeats: int) -> list[dict[str, Any]]:
    """Seconds to route the logits of all layers, and to run the whole model once."""
    with usmoe.record(model) as trace:
        model(input_ids=tokens, use_cache=False)
    logits = [said.logits for said in trace.last.values()]
    routers = {
        "top-n (USMoE, sequence)": USMoE(k=4, alpha=0.0),
        "prefix": USMoE(k=4, alpha=0.0, pool="prefix"),
        "threshold, burst 8": USMoE(k=4, alpha=0.0, pool="threshold", threshold=0.07, burst=8),
        "bounded (both sides)": BoundedChoice(k=4, alpha=0.0),
    }
    work = {name: lambda router=router: [usmoe.route(x, router) for x in logits] for name, router in routers.items()}
    work["the model's forward pass"] = lambda: model(input_ids=tokens, use_cache=False)
    rows = []
    for name, do in work.items():
        do()
        taken = []
        for _ in range(repeats):
            start = time.perf_counter()
            do()
            taken.append(time.perf_counter() - start)
        rows.append({"what": name, "seconds": statistics.median(taken)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=60, help="of the honest perplexity")
    parser.add_argument("--repeats", type=int, default=5, help="of each timing")
    args = parser.parse_args()
    torch.manual_seed(0)
    model, tokenizer = load()
    data = corpus(tokenizer, model, None, 16384, 512)
    entries = settled(model, BOUNDED, data.calibration)
    with tqdm(total=steps(entries, args.positions), file=sys.stderr) as bar:
        rows = compare(
            model,
            data.tokens,
            entries,
            bytes_per_token=data.bytes_per_token,
            positions=args.positions,
            tick=lambda label: bar.update(),
        )
    upper = token_ids(tokenizer, SAMPLE.read_text(encoding="utf-8").upper())
    upper = upper[: len(upper) // 512 * 512].view(-1, 512)[:32]
    by_label = {entry.label: entry.router for entry in entries}
    said = {
        "length": data.tokens.shape[1],
        "tokens": data.tokens.numel(),
        "rows": [
            row.to_dict() | {"fullest": fullest(model, entry.router, data.tokens)}
            for row, entry in zip(rows, entries, strict=True)
        ],
        "upper_case": [
            {
                "label": label,
                "plain": spent(model, by_label[label], data.tokens),
                "upper": spent(model, by_label[label], upper),
            }
            for label in SHIFTED
        ],
        "times": times(model, data.tokens[:8], args.repeats),
    }
    sys.stdout.write(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
