"""Embeddings of the shipped model (or another) in every type of mteb task, under four routers, with and without a
prompt: the hidden state, and, standardised by a sample, what the routers say, and both (MoEE).

    python scripts/make_ranking_sets.py DATA SETS       # retrieval and reranking, which DATA lacks
    python scripts/measure_embeddings.py DATA+SETS > results/embeddings.json

DATA+SETS is a folder of local data sets in the hub's columns. A run that was stopped goes on; --results says where.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from usmoe.evaluate.run import Score, evaluate
from usmoe.evaluate.setting import Setting

TASKS = (
    "EmotionClassification",
    "TwentyNewsgroupsClustering",
    "TwitterURLCorpus",
    "BankingIntents",
    "NewsgroupsSubjects",
    "STS13",
    "STSBenchmark",
    "BIOSSES",
    "SummEval",
)
ROUTERS = ("own", "expert_choice", "usmoe(alpha=0.0)", "usmoe(alpha=0.5)")
PROMPTS = ("none", "prompteol")


def settings(dense: bool, pooling: str, prompts: list[str]) -> list[Setting]:
    """Every router, prompt and embedding; of a dense model its hidden state alone."""
    found = []
    for router in ROUTERS[:1] if dense else ROUTERS:
        for prompt in prompts:
            shared = dict(router=router, prompt=prompt, pooling=pooling)
            found.append(Setting(**shared))
            for embedding in () if dense else ("router", "moee"):
                found.append(Setting(**shared, embedding=embedding, standardize="novels"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default=None, help="a folder, a .gguf file or a hub id; without it the shipped one")
    parser.add_argument("--dense", action="store_true", help="a model without experts: hidden states, own choice")
    parser.add_argument("--pooling", default="last")
    parser.add_argument("--prompts", default=",".join(PROMPTS))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--results", type=Path, default=Path("usmoe-results"))
    given = parser.parse_args()

    def tell(score: Score) -> None:
        sys.stderr.write(f"{score.task}  {score.setting.label}: {100 * score.score:.2f}  {score.seconds:.1f} s\n")

    found = evaluate(
        given.model,
        given.tasks.split(","),
        settings(given.dense, given.pooling, given.prompts.split(",")),
        data=given.data,
        results=given.results,
        dtype=given.dtype,
        offline=True,
        done=tell,
    )
    said = {"model": given.model or "shipped", "dtype": given.dtype, "scores": [score.to_dict() for score in found]}
    json.dump(said, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
