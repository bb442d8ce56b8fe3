"""Render results/*.json into docs/results.md.

usmoe demo --json --output docs/router-maps.png --force > results/demo.json
python scripts/evaluate_shipped_model.py validation.txt.gz test.txt.gz > results/shipped_model.json
python scripts/measure_guarantees.py > results/guarantees.json
python scripts/measure_plugin.py > results/plugin.json
python scripts/render_results.py
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    (ROOT / "docs/results.md").write_text(page(), encoding="utf-8")


def page() -> str:
    """The page of what lies in results/."""
    demo = json.loads((ROOT / "results/demo.json").read_text())
    shipped = json.loads((ROOT / "results/shipped_model.json").read_text())
    lines = [
        "# Results",
        "",
        "Rendered by `python scripts/render_results.py` from `results/`; not edited by hand.",
        "",
        "## The shipped model on whole held-out novels",
        "",
        "`python scripts/evaluate_shipped_model.py validation.txt.gz test.txt.gz`: bits per byte, teacher-forced, the "
        f"model's own choice, windows of {shipped['length']} tokens side by side (no overlap).",
        "",
        "| text | tokens | bits per byte |",
        "|---|--:|--:|",
        *(f"| {row['text']} | {row['tokens']:,} | {row['bits_per_byte']:.4f} |" for row in shipped["rows"]),
        "",
        "The same model under `OwnChoice()`, through our routing and experts, in float32: the largest difference of "
        f"a logit is {shipped['patch']['largest_difference_under_own_choice']:.1e}, where the largest logit is "
        f"{shipped['patch']['largest_logit']:.0f}.",
        "",
        "In bfloat16 pairs near the cut flip. Share of the pairs chosen in float32 that bfloat16 does not choose, mean "
        "over the layers:",
        "",
        "| router | pairs flipped |",
        "|---|--:|",
        *(
            f"| `{name.split(' ', 1)[1]}` | {100 * share:.2f} % |"
            for name, share in shipped["patch"].items()
            if name.startswith("share_of_pairs")
        ),
        "",
        "## The demo",
        "",
        f"`usmoe demo`: {demo['model']}, {demo['layers']} MoE layers of {demo['experts']} experts, "
        f"{demo['experts_per_token']} a token; {demo['text']}; {demo['tokens']:,} tokens in sequences of "
        f"{demo['length']}; seed {demo['seed']}. Honest: each token predicted from the tokens before it alone, "
        f"{demo['rows'][0]['honest_positions']} sampled positions, 95 % interval. Where intervals overlap, no ranking "
        "can be read from the honest column; teacher-forced figures of routers that look ahead (marked *) are no "
        "autoregressive model's.",
        "",
        "| router | perplexity | honest | bits/byte | experts a token (least-most) | dropped | load CV | MoE MFLOPs |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in demo["rows"]:
        low, high = row["honest_interval"]
        lines.append(
            f"| {row['label']} | {row['perplexity']:.2f}{'' if row['causal'] else '*'} "
            f"| {row['honest_perplexity']:.2f} ({low:.2f} to {high:.2f}) | {row['bits_per_byte']:.4f} "
            f"| {row['experts_mean']:.2f} ({row['experts_min']}-{row['experts_max']}) | {100 * row['dropped']:.1f} % "
            f"| {row['load_cv']:.2f} | {row['moe_flops'] / 1e6:.2f} |"
        )
    lines += [
        "",
        "On these 16,384 tokens the causal threshold at 0.75x costs .0004 bits a byte, and one expert fewer .0022. On "
        "245,760 tokens of novels that nobody tuned to it is .0008 (± .0002) against .0019 (± .0002).",
        "",
        "![Router maps: tokens by experts, a panel a layer, a row of panels a router](router-maps.png)",
        "",
    ]
    lines += guarantees(json.loads((ROOT / "results/guarantees.json").read_text()))
    lines += plugin(json.loads((ROOT / "results/plugin.json").read_text()))
    return "\n".join(lines)


def guarantees(said: dict) -> list[str]:
    """What bounds, prefix and bucket do, and what the solver costs."""
    forward = next(row["seconds"] for row in said["times"] if row["what"] == "the model's forward pass")
    top = said["times"][0]["seconds"]
    return [
        "## Guarantees: bounds, prefix, bucket",
        "",
        f"`python scripts/measure_guarantees.py`: the same model and text, {said['tokens']:,} tokens in sequences of "
        f"{said['length']}, with the model's own score; honest figures from {said['rows'][0]['honest_positions']} "
        "positions. Fullest: tokens of the fullest expert of any sequence and layer, over an even share.",
        "",
        "| router | perplexity | honest | bits/byte | experts a token (least-most) | dropped | load CV | fullest |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        *(
            f"| {row['label']} | {row['perplexity']:.2f}{'' if row['causal'] else '*'} "
            f"| {row['honest_perplexity']:.2f} ({row['honest_interval'][0]:.2f} to {row['honest_interval'][1]:.2f}) "
            f"| {row['bits_per_byte']:.4f} | {row['experts_mean']:.2f} ({row['experts_min']}-{row['experts_max']}) "
            f"| {100 * row['dropped']:.1f} % | {row['load_cv']:.2f} | {row['fullest']:.2f} |"
            for row in said["rows"]
        ),
        "",
        "Mean experts a token on the same text, and on the same text in capitals:",
        "",
        "| router | text | in capitals |",
        "|---|--:|--:|",
        *(f"| {row['label']} | {row['plain']:.2f} | {row['upper']:.2f} |" for row in said["upper_case"]),
        "",
        "Time to route the logits of all layers for eight sequences, on a CPU, one run; only ratios mean anything:",
        "",
        "| what | ratio to top-n | share of the model's forward pass |",
        "|---|--:|--:|",
        *(
            f"| {row['what']} | {row['seconds'] / top:.1f} | {100 * row['seconds'] / forward:.0f} % |"
            for row in said["times"]
        ),
        "",
    ]


def plugin(said: dict) -> list[str]:
    """What the plug-in costs and saves."""
    costs, own = said["frontier"], said["frontier"]["rows"][0]
    peaks = said["memory"]
    return [
        "## Cheaper inference: the frontier",
        "",
        f"`python scripts/measure_plugin.py`: the shipped model, {costs['tokens']:,} tokens of the shipped sample in "
        f"sequences of {costs['length']}, thresholds and splits found on the shipped calibration text. All routers are "
        "causal, so these figures are honest. Above: bits a byte above the model's own choice, paired token by token, "
        "with 95 % bands; where bands overlap, no ranking can be read.",
        "",
        "| router | bits/byte | above | experts a token (least-most) | experts by layer | MoE MFLOPs | seconds |",
        "|---|--:|--:|--:|---|--:|--:|",
        *(
            f"| {row['label']} | {row['bits_per_byte']:.4f} | {row['above']:+.4f} ± {row['band']:.4f} "
            f"| {row['experts_mean']:.2f} ({row['experts_min']}-{row['experts_max']}) | {split_of(row)} "
            f"| {row['moe_flops'] / 1e6:.2f} | {row['seconds']:.1f} |"
            for row in costs["rows"]
        ),
        "",
        f"The model's own MoE layers: {own['moe_flops'] / 1e6:.2f} million operations a token, counted from the pairs.",
        "",
        "![Bits a byte above own choice against the share of MoE operations](frontier.png)",
        "",
        "## Budgets on shifted text",
        "",
        "Thresholds from novels, on other text: mean experts a token, and nats a token, without a bucket and with "
        "`burst=8` (sequences of 256, so that at most 8/256 = 0.03 goes beyond the budget).",
        "",
        "| budget | text | tokens | threshold | nats | with burst 8 | nats |",
        "|---|---|--:|--:|--:|--:|--:|",
        *(
            f"| {row['budget']} | {row['text']} | {row['tokens']:,} | {row['threshold']['experts']:.2f} "
            f"| {row['threshold']['nats']:.3f} | {row['burst 8']['experts']:.2f} | {row['burst 8']['nats']:.3f} |"
            for row in said["drift"]
        ),
        "",
        "## What the patch itself costs",
        "",
        "A forward under `OwnChoice()` against the unpatched model with its best experts backend on a CPU; one "
        "process, one thread, ways alternating, the least of the rounds. Only ratios mean anything.",
        "",
        "| model | tokens | eager | grouped_mm | patched | ratio to the best |",
        "|---|--:|--:|--:|--:|--:|",
        *(
            f"| {row['model']} | {row['tokens']:,} | {1e3 * row['seconds']['eager']:.1f} ms "
            f"| {1e3 * row['seconds']['grouped_mm']:.1f} ms | {1e3 * row['seconds']['usmoe']:.1f} ms "
            f"| {row['ratio']:.2f} |"
            for row in said["overhead"]
        ),
        "",
        "Peak memory of a forward over 4,096 tokens (two layers, 64 experts of 1024 x 512, bfloat16), beyond what the "
        f"process held before: eager {peaks['eager'] / 1e6:.0f} MB, grouped_mm {peaks['grouped_mm'] / 1e6:.0f} MB, "
        f"patched {peaks['usmoe'] / 1e6:.0f} MB.",
        "",
        "## Experts in 4 bits",
        "",
        "The shipped model, patched with `OwnChoice()`, before and after `usmoe.quantize_experts`; megabytes of "
        "parameters, buffers and scales (half of this small model is its embedding).",
        "",
        "| experts | megabytes | bits/byte |",
        "|---|--:|--:|",
        *(f"| {name} | {row['megabytes']:.1f} | {row['bits_per_byte']:.4f} |" for name, row in said["packed"].items()),
        "",
    ]


def split_of(row: dict) -> str:
    """Experts a token of each layer, where a router is given one."""
    return (
        ", ".join(f"{k:.2f}" for k in row["split"])
        if row["split"] and all(isinstance(k, int | float) for k in row["split"])
        else ""
    )


if __name__ == "__main__":
    main()
