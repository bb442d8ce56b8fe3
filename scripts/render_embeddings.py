"""Render results/embeddings*.json, results/embedding_speed.json and the paper's tables at small scale into
docs/embedding-results.md.

python scripts/make_ranking_sets.py DATA SETS          # then a folder with what lies in both: ALL
python scripts/measure_embeddings.py ALL > results/embeddings.json
python scripts/measure_embeddings.py ALL --dense --dtype bfloat16 --model SmolLM2.gguf > results/embeddings_dense.json
python scripts/measure_embedding_speed.py > results/embedding_speed.json
usmoe reproduce table5 --data ALL --results results    # and the others
python scripts/render_embeddings.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from usmoe.evaluate.run import Score
from usmoe.reproduce.embeddings.study import STUDIES, one_run
from usmoe.reproduce.experiment import EXPERIMENTS, Experiment
from usmoe.reproduce.saved import load, markdown
from usmoe.reproduce.view import as_markdown
from usmoe.reproduce.views import embedding_views

ROOT = Path(__file__).parent.parent


def main() -> None:
    (ROOT / "docs/embedding-results.md").write_text(page(), encoding="utf-8")


def page() -> str:
    """The page of what lies in results/."""
    moe, dense, speed = (
        json.loads((ROOT / f"results/{name}.json").read_text())
        for name in ("embeddings", "embeddings_dense", "embedding_speed")
    )
    parts = [
        "# Embeddings: results",
        "",
        "Rendered by `python scripts/render_embeddings.py` from `results/`; not edited by hand. "
        "[embeddings.md](embeddings.md) says what the settings are.",
        "",
        _CONTROL,
        "",
        *_scores("The model that ships with usmoe", moe, _SHIPPED),
        *_scores("A dense control", dense, _DENSE),
        *_speed(speed),
        "# The paper's tables at small scale",
        "",
    ]
    for experiment in EXPERIMENTS.values():
        path = experiment.path(ROOT / "results", "small")
        if experiment.kind == "embeddings" and path.is_file():
            first = EXPERIMENTS[one_run(experiment.name)[0]]
            parts.append(_again(experiment, first) if first is not experiment else markdown(load(path)))
    return "\n".join(parts)


def _again(experiment: Experiment, first: Experiment) -> str:
    """A line for an experiment whose run is that of another, which stands above."""
    own, shown = (load(one.path(ROOT / "results", "small")) for one in (experiment, first))
    if own.scores != shown.scores:
        raise ValueError(f"{experiment.name} and {first.name} are one run at small scale, and their results differ.")
    paper = ", ".join(one.paper for one in STUDIES[experiment.name].models)
    return (
        f"## {experiment.name}, small scale: the run of {first.name}\n\nThe model is the same, so that our figures are "
        f"those of {first.name}; `usmoe reproduce {experiment.name} --show` has the paper's of {paper} beside them.\n"
    )


_CONTROL = (
    "What the bands below cannot tell, since each is of a figure by itself, was told by paired ones on three sets that "
    "nobody tuned to: USMoE is above the model's own choice in 15 of 18 settings. A control says why (one of these "
    "sets, PromptEOL, hidden state): own choice 36.8; own choice's pairs with USMoE's weights 38.8; USMoE's pairs with "
    "own choice's weights 36.1; own choice's pairs with half of their weights 39.3. So it is how much the experts "
    "weigh, and not who is chosen: [LOG.md](../LOG.md)."
)
_SHIPPED = (
    "`python scripts/measure_embeddings.py ALL`: novelist, 6.84 M parameters, four MoE layers of 16 experts, trained "
    "on 21 M tokens of novels, float32. Router and MoEE embeddings are standardised by the sample that ships with "
    "usmoe. NewsgroupsSubjects (retrieval) and BankingIntents (reranking) are ours, made of real text by "
    "scripts/make_ranking_sets.py, since mteb's own are not to be had offline; TwentyNewsgroupsClustering has draws of "
    "our own, and TwitterURLCorpus its test half."
)
_DENSE = (
    "`python scripts/measure_embeddings.py ALL --dense --dtype bfloat16 --model SmolLM2-135M-Instruct.Q4_1.gguf`: a "
    "dense language model of real quality (SmolLM2-135M-Instruct, 4-bit weights unpacked to bfloat16). It has no "
    "router, so only hidden states can be compared; five tasks, for the time that it takes on two cores."
)


def _scores(title: str, said: dict[str, Any], about: str) -> list[str]:
    views = embedding_views([Score.from_dict(one) for one in said["scores"]], said["model"])
    tables = [as_markdown(view).partition("\n\n")[2].rstrip("\n") + "\n" for view in views]  # one heading for all
    return [f"## {title}", "", about, "", *tables]


def _speed(said: dict[str, Any]) -> list[str]:
    rows = []
    for row in said["rows"]:
        seconds = row["seconds"]
        ours = seconds["Encoder"]
        rows.append(
            f"| {row['texts']} | {row['number']} | {seconds['sentence-transformers']:.2f} | {ours:.2f} "
            f"| {seconds['sentence-transformers'] / ours:.2f} "
            f"| {seconds['sentence-transformers'] / seconds['Encoder, OwnChoice()']:.2f} "
            f"| {seconds['Encoder, in the order of arrival'] / ours:.2f} |"
        )
    return [
        "## Speed",
        "",
        f"`python scripts/measure_embedding_speed.py`: the shipped model in float32, mean pooling, batches of "
        f"{said['batch']}, {said['threads']} thread; ways in turn, the least of {said['times']}. Only ratios mean "
        "anything; above 1 the Encoder is faster.",
        "",
        "| texts | number | sentence-transformers, s | Encoder, s | ratio | ratio under OwnChoice() | sorting gains |",
        "|---|--:|--:|--:|--:|--:|--:|",
        *rows,
        "",
    ]


if __name__ == "__main__":
    main()
