"""What the plug-in costs and saves: overhead, memory, the frontier of `tune`, drift on shifted text, 4-bit experts.

python scripts/measure_plugin.py > results/plugin.json          # also draws docs/frontier.png
python scripts/measure_plugin.py --peak grouped_mm              # one child of the memory part

Overhead: one process and thread, ways alternating; the least of the rounds of each way, and only ratios mean anything.
Memory: the peak of a process of its own over what it held before the forward. Frontier: the shipped model on the
shipped sample, tuned on the shipped calibration text; all routers are causal, so the figures are honest. Differences to
the model's own choice are paired, token by token.
"""

from __future__ import annotations

import argparse
import codecs
import inspect
import json
import math
import subprocess
import sys
import time
import typing
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import usmoe
from usmoe.cli.tokens import Corpus, corpus, token_ids
from usmoe.hf.compare import compare
from usmoe.hf.frontier import WAYS, frontier
from usmoe.hf.likelihood import teacher_forced
from usmoe.hf.load import load
from usmoe.models import SAMPLE
from usmoe.report.frontier import frontier_plot

BUDGETS = ("1x", "0.75x", "0.5x")
BACKENDS = ("eager", "grouped_mm")
GERMAN = """Als Gregor Samsa eines Morgens aus unruhigen Träumen erwachte, fand er sich in seinem Bett zu einem
ungeheueren Ungeziefer verwandelt. Er lag auf seinem panzerartig harten Rücken und sah, wenn er den Kopf ein wenig hob,
seinen gewölbten, braunen, von bogenförmigen Versteifungen geteilten Bauch, auf dessen Höhe sich die Bettdecke, zum
gänzlichen Niedergleiten bereit, kaum noch erhalten konnte. Seine vielen, im Vergleich zu seinem sonstigen Umfang
kläglich dünnen Beine flimmerten ihm hilflos vor den Augen. Was ist mit mir geschehen? dachte er. Es war kein Traum.
Sein Zimmer, ein richtiges, nur etwas zu kleines Menschenzimmer, lag ruhig zwischen den vier wohlbekannten Wänden."""
"""The beginning of Kafka's Die Verwandlung (1915)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", help="measure the peak of one way, and print it")
    parser.add_argument("--only", help="one part: overhead, memory, frontier, drift, packed")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if args.peak:
        print(peak(args.peak))
        return
    torch.manual_seed(0)
    parts = {"overhead": overhead, "memory": memory, "frontier": costs, "drift": drift, "packed": packed}
    said = {}
    for name, part in parts.items():
        if args.only in (None, name):
            print(name, file=sys.stderr)
            said[name] = part()
    json.dump(said, sys.stdout, indent=1)


def wide(dtype: torch.dtype = torch.bfloat16) -> Any:
    """Two layers of half the width of OLMoE-1B-7B, all its experts."""
    config = transformers.OlmoeConfig(
        hidden_size=1024,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=64,
        num_experts_per_tok=8,
        vocab_size=1024,
        eos_token_id=1,
    )
    return transformers.OlmoeForCausalLM(config).eval().to(dtype)


@torch.no_grad()
def overhead() -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shipped = load(None)[0]
    cases = [
        ("shipped", shipped, (8, 256), 15),
        ("shipped", shipped, (1, 1), 60),
        ("64 experts of 1024 x 512, float32", wide(torch.float32), (1, 1024), 8),
        ("64 experts of 1024 x 512, bfloat16", wide(), (1, 1024), 8),
        ("64 experts of 1024 x 512, bfloat16", wide(), (1, 1), 40),
    ]
    rows = []
    for name, model, shape, rounds in cases:
        tokens = torch.randint(2, 200, shape)
        best: dict[str, float] = {}
        for _ in range(rounds):
            for way in (*BACKENDS, "usmoe"):
                usmoe.patch(model, usmoe.OwnChoice()) if way == "usmoe" else model.set_experts_implementation(way)
                start = time.perf_counter()
                model(input_ids=tokens, use_cache=False)
                best[way] = min(best.get(way, math.inf), time.perf_counter() - start)
                usmoe.unpatch(model)
        ratio = best["usmoe"] / min(best[way] for way in BACKENDS)
        rows.append({"model": name, "tokens": shape[0] * shape[1], "seconds": best, "ratio": ratio})
    torch.set_num_threads(threads)
    return rows


@torch.no_grad()
def peak(way: str) -> int:
    """Bytes that a process needs for a forward beyond what it held before."""
    model = wide()
    usmoe.patch(model, usmoe.OwnChoice()) if way == "usmoe" else model.set_experts_implementation(way)
    model(input_ids=torch.randint(2, 200, (1, 16)), use_cache=False)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    before = resident("VmHWM")
    model(input_ids=torch.randint(2, 200, (4, 1024)), use_cache=False)
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """Bytes, from what the kernel says of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def memory() -> dict[str, int]:
    return {
        way: int(subprocess.check_output([sys.executable, __file__, "--peak", way])) for way in (*BACKENDS, "usmoe")
    }


def text() -> tuple[Any, Any, Corpus]:
    model, tokenizer = load(None)
    return model, tokenizer, corpus(tokenizer, model, None, 16384, 512)


def costs() -> dict[str, Any]:
    model, _, data = text()
    entries = frontier(model, data.calibration, BUDGETS)
    rows = compare(model, data.tokens, entries, bytes_per_token=data.bytes_per_token)
    bits = 1 / math.log(2) / data.bytes_per_token
    losses = [losses_under(model, entry.router, data.tokens) for entry in entries]
    found = []
    for entry, row, loss in zip(entries, rows, losses, strict=True):
        difference = (loss - losses[0]).double() * bits
        band = 1.96 * difference.std().item() / math.sqrt(difference.numel())
        split = [one.k for one in entry.router] if isinstance(entry.router, list) else None
        found.append(row.to_dict() | {"above": difference.mean().item(), "band": band, "split": split})
    own = found[0]
    points = {way: [(1.0, 0.0)] + [(row["moe_flops"] / own["moe_flops"], row["above"]) for row in of(found, way)]
              for way in WAYS}  # fmt: skip
    frontier_plot(Path(__file__).parent.parent / "docs/frontier.png", points, "the shipped model, held-out novels")
    return {"tokens": data.tokens.numel(), "length": data.tokens.shape[1], "rows": found}


def of(rows: list[dict[str, Any]], way: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["label"].startswith(f"{way}, ")]


def losses_under(model: Any, router: Any, tokens: Tensor) -> Tensor:
    with usmoe.patched(model, router):
        return teacher_forced(model, tokens).flatten()


@torch.no_grad()
def drift() -> list[dict[str, Any]]:
    """Experts a token on text that the thresholds were not found on, with and without a bucket."""
    model, tokenizer, data = text()
    plain = SAMPLE.read_text(encoding="utf-8")[:40000]
    texts = {
        "held-out novels": plain,
        "in capitals": plain.upper(),
        "in German": GERMAN,
        "source code": "".join(inspect.getsource(module) for module in (json, typing))[:40000],
        "letters of no language (rot13)": codecs.encode(plain, "rot13"),
    }
    found = []
    for budget in ("1x", "0.75x"):
        free = usmoe.calibrate(model, data.calibration.split(8), usmoe.USMoE(k=budget))
        capped = usmoe.calibrate(
            model, data.calibration.split(8), usmoe.USMoE(k=budget, pool="threshold", threshold=0.0, burst=8)
        )
        for name, written in texts.items():
            ids = token_ids(tokenizer, written)
            length = min(256, len(ids))
            tokens = ids[: len(ids) // length * length].view(-1, length)[:32]
            row: dict[str, Any] = {"budget": budget, "text": name, "tokens": tokens.numel()}
            for label, routers in (("threshold", free), ("burst 8", capped)):
                with usmoe.patched(model, routers), usmoe.record(model) as trace:
                    nats = teacher_forced(model, tokens).mean().item()
                counts = [said.routing.experts_per_token for outs in trace.values() for said in outs]
                row[label] = {"experts": torch.cat(counts).double().mean().item(), "nats": nats}
            found.append(row)
    return found


@torch.no_grad()
def packed() -> dict[str, Any]:
    """The shipped model in bfloat16, and with experts in 4 bits."""
    _, _, data = text()
    bits = 1 / math.log(2) / data.bytes_per_token
    rows = {}
    for name, kind in (("bfloat16", None), ("nf4", "nf4"), ("fp4", "fp4")):
        model = load(None, dtype="bfloat16")[0]
        if kind:
            usmoe.quantize_experts(model, kind)
        usmoe.patch(model, usmoe.OwnChoice())
        nats = teacher_forced(model, data.tokens).double().mean().item()
        size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        rows[name] = {"megabytes": (size + scales(model)) / 1e6, "bits_per_byte": nats * bits}
    return rows


def scales(model: Any) -> int:
    """Bytes of what bitsandbytes keeps beside the packed weights."""
    total = 0
    for module in model.modules():
        state = getattr(module, "quant_state", None)
        if state is not None:
            held = [state.absmax, *([state.state2.absmax] if state.nested else [])]
            total += sum(t.numel() * t.element_size() for t in held)
    return total


if __name__ == "__main__":
    main()
