"""95 % bootstrap bands of mteb's main scores, from the predictions that mteb keeps.

A band says how far the score would move with other texts of the kind. Everything else is held: the model, the ten
training samples of a classification, the clusters that k-means found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import mteb
import numpy as np
from jaxtyping import Float
from mteb._evaluators.retrieval_metrics import calculate_retrieval_scores
from mteb.abstasks import (
    AbsTaskClassification,
    AbsTaskClusteringLegacy,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
    AbsTaskSummarization,
)
from numpy import ndarray as Array

from usmoe.evaluate import resample

MANY_SETS = 10
"""From as many sets of a clustering on, the sets are resampled; below it, the texts in each."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """Where 95 % of the resampled scores lie, on mteb's scale of 0 to 1."""

    low: float
    """The 2.5 % quantile."""
    high: float
    """The 97.5 % quantile."""
    resamples: int
    """How many there were; those in which the score is undefined (a correlation of equal values) are left out."""
    unit: str
    """What was drawn with replacement: texts, pairs, queries, documents, sets."""
    score: float
    """The main score as computed here from all predictions: mteb's own, or the predictions are of another run."""


@dataclass(frozen=True, kw_only=True)
class _Resampled:
    score: float
    values: Float[Array, "R"]
    unit: str


def band(task: mteb.AbsTask, predictions: Mapping[str, Any], *, seed: int, resamples: int = 1000) -> Band | None:
    """The band of a task's main score; None where its predictions do not suffice.

    task         with its data loaded, as they were when it was evaluated: they hold the labels
    predictions  what mteb.evaluate(..., prediction_folder=DIR) wrote to DIR/<task>_predictions.json
    seed         of the resampling

    Units are drawn with replacement, as many as there are, and mteb's formula is computed anew on each resample:

    Classification      texts, the same in all ten experiments      accuracy, f1, f1_weighted, ap
    Clustering          sets, from ten on; else the texts of each   v_measure
    PairClassification  pairs                                       ap, f1 and accuracy, of a similarity or max_
    STS                 pairs                                       Spearman and Pearson
    Retrieval, Reranking  queries                                   ndcg, map, mrr, recall, precision, hit_rate
    Summarization       documents                                   whatever mteb averages over documents

    A task of several splits or subsets is resampled in each, and averaged as mteb does. Texts drawn twice make clusters
    look purer, so where texts of clusterings are drawn, the band is moved to have its mean on the score.

    None for all other types and scores, for classification by cross-validation, and for clustering tasks of mteb's
    newer kind (TwentyNewsgroupsClustering.v2), whose predictions do not say which texts they are of.
    """
    kind = next((kind for kind in _KINDS if isinstance(task, kind)), None)
    if kind is None:
        return None
    rng = np.random.default_rng(seed)
    parts: list[_Resampled] = []
    for split in task.eval_splits:
        for subset in task.hf_subsets:
            said = predictions.get(subset, {}).get(split)
            part = None if said is None else _KINDS[kind](task, _data(task, subset, split), said, rng, resamples)
            if part is None:
                return None
            parts.append(part)
    values = np.mean([part.values for part in parts], axis=0)
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    score = float(np.mean([part.score for part in parts]))
    return Band(low=float(low), high=float(high), resamples=len(values), unit=parts[0].unit, score=score)


def _data(task: Any, subset: str, split: str) -> Any:
    if not task.data_loaded:
        raise ValueError(
            f"The data of {task.metadata.name} are not loaded, and hold its labels. Call task.load_data()."
        )
    if isinstance(task, AbsTaskRetrieval):
        task.convert_v1_dataset_format_to_v2(num_proc=None)
    return task.dataset.get(subset, task.dataset)[split]


Scores = Callable[[Any], Float[Array, "R"]]
"""From counts (R, N) of the units to the score of each resample."""


def _by_units(units: int, scores: Scores, unit: str, rng: np.random.Generator, resamples: int) -> _Resampled:
    """The score with each unit once, and its resamples."""
    values = np.concatenate([scores(counts) for counts in resample.draws(units, resamples, rng)])
    return _Resampled(score=float(scores(np.ones((1, units), dtype=int))[0]), values=values, unit=unit)


def _mean(each: Float[Array, "N"], unit: str, rng: np.random.Generator, resamples: int) -> _Resampled:
    """For scores that are a mean over the units."""
    return _by_units(len(each), lambda counts: counts @ each / counts.sum(axis=1), unit, rng, resamples)


def _classification(task: Any, data: Any, said: list[list[Any]], rng: Any, resamples: int) -> _Resampled | None:
    labels = np.asarray(list(data[task.label_column_name]))
    if task.is_cross_validation or any(len(one) != len(labels) for one in said):
        return None
    if task.metadata.main_score == "accuracy":
        return _mean((np.asarray(said) == labels).mean(axis=0), "texts", rng, resamples)
    classes, codes = np.unique(np.concatenate([labels, *map(np.asarray, said)]), return_inverse=True)
    codes = codes.reshape(len(said) + 1, len(labels))
    formulas: dict[str, Callable[[Any], Any]] = {
        "f1": lambda table: resample.f1(table, weighted=False),
        "f1_weighted": lambda table: resample.f1(table, weighted=True),
    }
    if classes.tolist() == [0, 1]:
        formulas["ap"] = resample.hard_ap
    formula = formulas.get(task.metadata.main_score)
    if formula is None:
        return None

    def scores(counts: Any) -> Any:
        tables = (resample.confusion(counts, codes[0], one, len(classes)) for one in codes[1:])
        return np.mean([formula(table) for table in tables], axis=0)

    return _by_units(len(labels), scores, "texts", rng, resamples)


def _clustering(task: Any, data: Any, said: list[list[int]], rng: Any, resamples: int) -> _Resampled | None:
    if task.metadata.main_score != "v_measure":
        return None
    tables, assignments = [], iter(said)
    for labels in data[task.label_column_name]:
        _, codes = np.unique(labels, return_inverse=True)
        if codes.max() == 0:
            tables.append(np.ones((1, 1)))  # mteb clusters no set with a single label, and scores it 1
            continue
        clusters = np.asarray(next(assignments))
        table = np.zeros((codes.max() + 1, clusters.max() + 1))
        np.add.at(table, (codes, clusters), 1)
        tables.append(table)
    each = np.array([resample.v_measure(table[None])[0] for table in tables])
    if len(tables) >= MANY_SETS:
        return _mean(each, "sets", rng, resamples)
    drawn = np.mean([_tables(table, rng, resamples) for table in tables], axis=0)
    score = float(each.mean())
    return _Resampled(score=score, values=drawn - drawn.mean() + score, unit="texts")


def _tables(table: Float[Array, "L C"], rng: np.random.Generator, resamples: int) -> Float[Array, "R"]:
    """V-measures with the texts of a set resampled: its table of labels by clusters is then multinomial."""
    share, total = table.reshape(-1) / table.sum(), int(table.sum())
    return resample.v_measure(rng.multinomial(total, share, size=resamples).reshape(resamples, *table.shape))


_SIMILARITIES = {
    "similarity": ("similarity_scores", 1),
    "cosine": ("cosine_scores", 1),
    "manhattan": ("manhattan_distances", -1),
    "euclidean": ("euclidean_distances", -1),
    "dot": ("dot_scores", 1),
}
"""mteb's names of the similarities of two texts: where their predictions stand, and -1 for a distance."""


def _pairs(task: Any, data: Any, said: Mapping[str, list[float]], rng: Any, resamples: int) -> _Resampled | None:
    which, _, metric = task.metadata.main_score.partition("_")
    if metric not in ("ap", "f1", "accuracy") or which not in {"max", *_SIMILARITIES}:
        return None
    column = data[task.label_column_name]
    labels = np.asarray(list(column[0] if isinstance(column[0], list) else column))  # the hub has one row of lists
    wanted = list(_SIMILARITIES) if which == "max" else [which]
    scored = [np.asarray(said[name]) * sign for name, sign in map(_SIMILARITIES.__getitem__, wanted)]

    def scores(counts: Any) -> Any:
        each = [getattr(resample.Thresholds(counts, one, labels), metric)() for one in scored]
        return np.max(each, axis=0)

    return _by_units(len(labels), scores, "pairs", rng, resamples)


def _sts(task: Any, data: Any, said: Mapping[str, list[float]], rng: Any, resamples: int) -> _Resampled | None:
    which, _, metric = task.metadata.main_score.rpartition("_")
    correlations = {"spearman": resample.spearman, "pearson": resample.pearson}
    name, _ = _SIMILARITIES.get(which or "similarity", ("", 1))  # distances are kept negative here
    if metric not in correlations or said.get(name) is None:
        return None
    truth, ours = np.asarray(list(data["score"]), dtype=float), np.asarray(said[name])
    correlation = correlations[metric]
    return _by_units(len(truth), lambda counts: correlation(counts, truth, ours), "pairs", rng, resamples)


_CUTS = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P", "hit_rate": "success"}
"""mteb's names of what is measured in the first k documents, and those of its trec evaluation."""


def _queries(task: Any, data: Any, said: Mapping[str, Any], rng: Any, resamples: int) -> _Resampled | None:
    found = re.fullmatch(
        r"(\w+)_at_(\d+)", "recall_at_1" if task.metadata.main_score == "accuracy" else task.metadata.main_score
    )
    if found is None or found[1] not in {"mrr", *_CUTS}:
        return None
    k = int(found[2])
    relevant = {query: judged for query, judged in data["relevant_docs"].items() if judged}
    results = {query: _others(query, ranked, task.ignore_identical_ids) for query, ranked in said.items()}
    if found[1] == "mrr":
        each = [_reciprocal(results[query], relevant[query], k, task.skip_first_result) for query in results]
    else:
        scored = calculate_retrieval_scores(results, relevant, [k], task.skip_first_result).all_scores
        each = [one[f"{_CUTS[found[1]]}_{k}"] for one in scored.values()]
    return _mean(np.asarray(each), "queries", rng, resamples)


def _others(query: str, ranked: Mapping[str, float], without_itself: bool) -> dict[str, float]:
    return {document: score for document, score in ranked.items() if not (without_itself and document == query)}


def _reciprocal(ranked: Mapping[str, float], judged: Mapping[str, int], k: int, skip_first: bool) -> float:
    """1 / the rank of the first relevant document among k; of equal scores the greater id comes first, as in mteb."""
    if skip_first:
        ranked = dict(sorted(ranked.items(), key=lambda one: one[1], reverse=True)[1:])
    order = sorted(ranked, key=lambda document: (ranked[document], document), reverse=True)[:k]
    return next((1 / (n + 1) for n, document in enumerate(order) if judged.get(document, 0) > 0), 0.0)


def _summaries(task: Any, data: Any, said: Mapping[str, list[Any]], rng: Any, resamples: int) -> _Resampled | None:
    """By mteb's own formula, a document at a time: SummEval's, kept for comparability, averages correlations and their
    p-values."""
    documents: Iterable[dict[str, Any]] = (
        {name: [scores[n]] for name, scores in said.items()} for n in range(len(said["human_scores"]))
    )
    each = [task.evaluator._calculate_metrics(None, one).get(task.metadata.main_score) for one in documents]
    return None if not each or None in each else _mean(np.asarray(each), "documents", rng, resamples)


_KINDS: Mapping[type[mteb.AbsTask], Callable[..., _Resampled | None]] = {
    AbsTaskClassification: _classification,
    AbsTaskClusteringLegacy: _clustering,
    AbsTaskPairClassification: _pairs,
    AbsTaskRetrieval: _queries,
    AbsTaskSTS: _sts,
    AbsTaskSummarization: _summaries,
}
