"""A tiny deterministic encoder for mteb, and data sets in the hub's columns for each type of task."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from mteb.models import ModelMeta

FILLERS = ["a", "of", "the", "in", "it", "was", "red", "old"]
TOPICS = ("ship sea sail harbour wave", "bread oven flour dough crust", "law court judge trial jury")


class HashEncoder:
    """Words hashed into 24 counts: texts that share words are near each other."""

    def __init__(self, model_name: str = "hash", revision: str | None = None, **kwargs: Any) -> None:
        self.mteb_model_meta = ModelMeta.create_empty({"name": f"test/{model_name}", "revision": "1"})

    def encode(self, inputs: Any, **kwargs: Any) -> np.ndarray:
        return np.stack([self.vector(text) for batch in inputs for text in batch["text"]])

    @staticmethod
    def vector(text: str) -> np.ndarray:
        vector = np.full(24, 0.1)
        for word in text.split():
            vector[zlib.crc32(word.encode()) % 24] += 1
        return vector

    def similarity(self, one: Any, other: Any) -> torch.Tensor:
        one, other = (torch.atleast_2d(torch.as_tensor(x)) for x in (one, other))
        return torch.nn.functional.normalize(one, dim=-1) @ torch.nn.functional.normalize(other, dim=-1).T

    def similarity_pairwise(self, one: Any, other: Any) -> torch.Tensor:
        return torch.nn.functional.cosine_similarity(torch.as_tensor(one), torch.as_tensor(other))


def text(topic: int, rng: np.random.Generator) -> str:
    """Five words, two of them of a topic: easy enough to be learnt, and not perfectly."""
    words = TOPICS[topic].split()
    return " ".join([*rng.choice(words, 2), *rng.choice(FILLERS, 3)])


def texts(number: int, seed: int, classes: int = 3) -> tuple[list[str], list[int]]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=number).tolist()
    return [text(label, rng) for label in labels], labels


def classification(number: int, seed: int, classes: int = 3) -> dict[str, Any]:
    return dict(zip(("text", "label"), texts(number, seed, classes), strict=True))


def clustering(sets: int, seed: int) -> dict[str, Any]:
    drawn = [texts(30, seed + n) for n in range(sets)]
    return {"sentences": [one for one, _ in drawn], "labels": [labels for _, labels in drawn]}


def pairs(number: int, seed: int) -> dict[str, Any]:
    """sentence1, sentence2, whether they are of one topic, and how much so from 0 to 5."""
    (one, first), (other, second) = texts(number, seed), texts(number, seed + 1)
    same = [int(a == b) for a, b in zip(first, second, strict=True)]
    rng = np.random.default_rng(seed)
    scores = [min(5.0, 3 * value + float(rng.integers(0, 5)) / 2) for value in same]
    return {"sentence1": one, "sentence2": other, "labels": same, "score": scores}


def summaries(documents: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    topics = rng.integers(3, size=documents).tolist()
    return {
        "text": [text(topic, rng) for topic in topics],
        "human_summaries": [[text(topic, rng) for _ in range(3)] for topic in topics],
        "machine_summaries": [[text(m % 3, rng) for m in range(6)] for _ in topics],
        "relevance": [[float(4 * (m % 3 == topic) + rng.random()) for m in range(6)] for topic in topics],
    }


def retrieval(queries: int, seed: int) -> dict[str, dict[str, Any]]:
    """Twenty documents and a few queries; the documents of a query's topic are relevant, and ten are to be reranked."""
    (documents, topics), (asked, about) = texts(20, seed), texts(queries, seed + 1)
    judged = [(q, d) for q in range(queries) for d in range(20) if topics[d] == about[q]]
    rng = np.random.default_rng(seed)
    return {
        "corpus": {"_id": [f"d{d}" for d in range(20)], "title": [""] * 20, "text": documents},
        "queries": {"_id": [f"q{q}" for q in range(queries)], "text": asked},
        "qrels": {
            "query-id": [f"q{q}" for q, _ in judged],
            "corpus-id": [f"d{d}" for _, d in judged],
            "score": [1] * len(judged),
        },
        "top_ranked": {
            "query-id": [f"q{q}" for q in range(queries)],
            "corpus-ids": [[f"d{d}" for d in rng.permutation(20)[:10]] for _ in range(queries)],
        },
    }


def old_reranking(queries: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    topics = rng.integers(3, size=queries).tolist()
    return {
        "query": [text(topic, rng) for topic in topics],
        "positive": [[text(topic, rng) for _ in range(2)] for topic in topics],
        "negative": [[text((topic + 1) % 3, rng) for _ in range(4)] for topic in topics],
    }


def write(path: Path, columns: dict[str, Any]) -> Path:
    """Columns to a file of the kind that its ending names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = Dataset.from_dict(columns)
    if path.suffix == ".parquet":
        pq.write_table(rows.data.table, path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows)))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        sep = "\t" if path.suffix == ".tsv" else ","
        lines = [rows.column_names, *zip(*columns.values(), strict=True)]
        path.write_text("\n".join(sep.join(map(str, line)) for line in lines))
    return path


def own(folder: Path, kind: str, files: dict[str, dict[str, Any]], **block: Any) -> str:
    """A folder with a task of its own; the task's name."""
    for split, columns in files.items():
        write(folder / f"{split}.parquet", columns)
    name = f"My{kind}"
    (folder / "manifest.json").write_text(json.dumps({"mteb": {"name": name, "type": kind} | block}))
    return name


def evaluated(task: Any, folder: Path) -> tuple[float, dict[str, Any]]:
    """mteb's main score, and the predictions it kept."""
    result = mteb.evaluate(
        HashEncoder(), task, cache=None, prediction_folder=folder, co2_tracker=False, show_progress_bar=False
    )
    kept = json.loads((folder / task.prediction_file_name).read_text())
    return result.task_results[0].get_score(), kept
