"""Bands of mteb's scores: the score itself is found again from the predictions, and each resample as if computed
afresh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

mteb = pytest.importorskip("mteb", reason="the extra usmoe[embed]")

from scipy.stats import pearsonr, spearmanr  # noqa: E402
from sklearn.metrics import average_precision_score, f1_score, v_measure_score  # noqa: E402

import hash_encoder as make  # noqa: E402
from usmoe.evaluate import resample  # noqa: E402
from usmoe.evaluate.bands import band  # noqa: E402
from usmoe.evaluate.tasks import find_tasks  # noqa: E402

pytestmark = [
    # sentence-transformers and torchmetrics, which mteb imports when it first evaluates, still script a function
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    # mteb would have its newer tasks used; the paper's are these
    pytest.mark.filterwarnings("ignore:The task '.*' is superseded:UserWarning"),
    # SummEval's evaluator averages p-values too, which mteb keeps for comparability
    pytest.mark.filterwarnings("ignore:The used Evaluator is deprecated:DeprecationWarning"),
]


def classified(classes: int) -> dict[str, Any]:
    return {"train": make.classification(60, 0, classes), "test": make.classification(40, 1, classes)}


RANKED = make.retrieval(15, 6)
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("Classification", classified(3), "accuracy", "texts"),
    ("Classification", classified(3), "f1", "texts"),
    ("Classification", classified(3), "f1_weighted", "texts"),
    ("Classification", classified(2), "ap", "texts"),
    ("Clustering", {"test": make.clustering(3, 2)}, "v_measure", "texts"),
    ("Clustering", {"test": make.clustering(10, 2)}, "v_measure", "sets"),
    ("PairClassification", {"test": make.pairs(40, 3)}, "max_ap", "pairs"),
    ("PairClassification", {"test": make.pairs(40, 3)}, "max_f1", "pairs"),
    ("PairClassification", {"test": make.pairs(40, 3)}, "max_accuracy", "pairs"),
    ("PairClassification", {"test": make.pairs(40, 3)}, "manhattan_ap", "pairs"),
    ("STS", {"test": make.pairs(40, 4)}, "cosine_spearman", "pairs"),
    ("STS", {"test": make.pairs(40, 4)}, "spearman", "pairs"),
    ("STS", {"test": make.pairs(40, 4)}, "manhattan_pearson", "pairs"),
    ("Summarization", {"test": make.summaries(12, 5)}, "cosine_spearman", "documents"),
    ("Retrieval", RANKED, "ndcg_at_10", "queries"),
    ("Retrieval", RANKED, "recall_at_5", "queries"),
    ("Retrieval", RANKED, "mrr_at_10", "queries"),
    ("Retrieval", RANKED, "precision_at_3", "queries"),
    ("Reranking", RANKED, "map_at_1000", "queries"),
    ("Reranking", RANKED, "hit_rate_at_1", "queries"),
]


@pytest.mark.parametrize(("kind", "files", "metric", "unit"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_the_score_is_found_again_and_lies_in_its_band(
    tmp_path: Path, kind: str, files: dict[str, Any], metric: str, unit: str
):
    files = {part: columns for part, columns in files.items() if kind != "Retrieval" or part != "top_ranked"}
    name = make.own(tmp_path / "mine", kind, files, main_score=metric)
    (task,) = find_tasks([name], data=tmp_path)
    assert task.metadata.main_score == metric
    task.load_data()
    score, predictions = make.evaluated(task, tmp_path / "kept")
    found = band(task, predictions, seed=0)
    assert found is not None
    rounding = 6e-6 if unit == "queries" else 1e-9  # mteb rounds these to five digits
    assert found.score == pytest.approx(score, abs=rounding)
    assert found.low < score < found.high
    assert (found.unit, found.resamples) == (unit, 1000)
    assert band(task, predictions, seed=0) == found


@pytest.mark.parametrize("metric", ["ndcg_at_3", "mrr_at_3"])
def test_a_query_that_is_itself_a_document_does_not_find_itself(tmp_path: Path, metric: str):
    parts = make.retrieval(15, 6)
    parts["queries"] = {name: parts["corpus"][name][:15] for name in ("_id", "text")}
    parts["qrels"]["query-id"] = [f"d{query[1:]}" for query in parts["qrels"]["query-id"]]
    del parts["top_ranked"]
    (task,) = find_tasks([make.own(tmp_path / "mine", "Retrieval", parts, main_score=metric)], data=tmp_path)
    task.load_data()
    with_itself, _ = make.evaluated(task, tmp_path / "kept")
    task.ignore_identical_ids = True
    score, predictions = make.evaluated(task, tmp_path / "kept")
    found = band(task, predictions, seed=0)
    assert found is not None
    assert found.score == pytest.approx(score, abs=6e-6) != with_itself


@pytest.mark.parametrize("name", ["SummEval", "TwentyNewsgroupsClustering"])
def test_the_papers_own_tasks_too(tmp_path: Path, name: str):
    """SummEval's score has mteb's old fault in it; a set with one label is clustered by nobody, and counts as 1."""
    sets = make.clustering(3, 0)
    sets["labels"][1] = [2] * len(sets["labels"][1])
    make.write(tmp_path / "summeval" / "test.parquet", make.summaries(12, 5))
    make.write(tmp_path / "twentynewsgroups" / "test.parquet", sets)
    (task,) = find_tasks([name], data=tmp_path)
    task.load_data()
    score, predictions = make.evaluated(task, tmp_path / "kept")
    found = band(task, predictions, seed=0)
    assert found is not None
    assert found.score == pytest.approx(score)
    assert found.low < score < found.high


def test_what_has_no_band(tmp_path: Path):
    files = {"test": {"sentences": [make.clustering(1, 0)["sentences"][0]], "labels": [[0] * 15 + [1] * 15]}}
    make.write(tmp_path / "twentynewsgroups-clustering" / "test.parquet", files["test"])
    (newer,) = find_tasks(["TwentyNewsgroupsClustering.v2"], data=tmp_path)
    newer.load_data()
    assert band(newer, {"default": {"test": {}}}, seed=0) is None
    (sts,) = find_tasks([make.own(tmp_path / "mine", "STS", {"test": make.pairs(20, 0)})], data=tmp_path)
    with pytest.raises(ValueError, match=r"data of MySTS are not loaded"):
        band(sts, {"default": {"test": {"cosine_scores": [0.0] * 20}}}, seed=0)
    sts.load_data()
    assert band(sts, {}, seed=0) is None


COUNTS = np.random.default_rng(0).multinomial(30, [1 / 30] * 30, size=25)


def repeated(counts: np.ndarray, *columns: np.ndarray) -> list[np.ndarray]:
    return [np.repeat(column, counts) for column in columns]


def test_correlations_of_resamples_are_those_of_the_repeated_pairs():
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 8, 30) / 2, rng.normal(size=30)
    spearman, pearson = resample.spearman(COUNTS, x, y), resample.pearson(COUNTS, x, y)
    for n, counts in enumerate(COUNTS):
        assert spearman[n] == pytest.approx(spearmanr(*repeated(counts, x, y)).statistic)
        assert pearson[n] == pytest.approx(pearsonr(*repeated(counts, x, y)).statistic)


def test_thresholds_of_resamples_are_those_of_the_repeated_pairs():
    """Scores with ties, and pairs that were not drawn at either end."""
    rng = np.random.default_rng(2)
    scores, labels = rng.integers(0, 12, 30) / 4, rng.integers(0, 2, 30)
    found = resample.Thresholds(COUNTS, scores, labels)
    task = mteb.get_task("TwitterURLCorpus")
    ap, f1, accuracy = found.ap(), found.f1(), found.accuracy()
    for n, counts in enumerate(COUNTS):
        s, y = repeated(counts, scores, labels)
        theirs = task._compute_metrics_values(s.tolist(), y, True)
        assert ap[n] == pytest.approx(average_precision_score(y, s))
        assert (ap[n], f1[n], accuracy[n]) == pytest.approx((theirs["ap"], theirs["f1"], theirs["accuracy"]))


def test_tables_of_resamples_are_those_of_the_repeated_texts():
    """Class 4 is never there, and class 5 is that of one text, which a third of the resamples do not have."""
    rng = np.random.default_rng(3)
    labels, said = rng.integers(0, 4, 30), rng.integers(0, 4, 30)
    labels[0] = said[0] = 5
    tables = resample.confusion(COUNTS, labels, said, 6)
    macro, weighted = (resample.f1(tables, weighted=which) for which in (False, True))
    v, binary = resample.v_measure(tables), resample.confusion(COUNTS, labels % 2, said % 2, 2)
    ap = resample.hard_ap(binary)
    for n, counts in enumerate(COUNTS):
        y, s = repeated(counts, labels, said)
        assert macro[n] == pytest.approx(f1_score(y, s, average="macro"))
        assert weighted[n] == pytest.approx(f1_score(y, s, average="weighted"))
        assert v[n] == pytest.approx(v_measure_score(y, s))
        assert ap[n] == pytest.approx(average_precision_score(y % 2, s % 2))


def test_draws_come_in_blocks_and_have_as_many_units_as_there_are(monkeypatch: pytest.MonkeyPatch):
    whole = np.concatenate(list(resample.draws(30, 7, np.random.default_rng(0))))
    assert whole.shape == (7, 30)
    assert (whole.sum(axis=1) == 30).all()
    monkeypatch.setattr(resample, "CELLS", 90)
    blocks = list(resample.draws(30, 7, np.random.default_rng(0)))
    assert [len(block) for block in blocks] == [3, 3, 1]
    assert np.array_equal(np.concatenate(blocks), whole)


def test_a_band_is_as_wide_as_the_mean_of_so_many_texts_is_uncertain(tmp_path: Path):
    name = make.own(
        tmp_path / "mine", "Classification", {"train": classified(3)["train"], "test": make.classification(400, 1)}
    )
    (task,) = find_tasks([name], data=tmp_path)
    task.load_data()
    _, predictions = make.evaluated(task, tmp_path / "kept")
    found = band(task, predictions, seed=0)
    assert found is not None
    assert found != band(task, predictions, seed=1)
    right = np.mean(
        [np.equal(one, list(task.dataset["test"]["label"])) for one in predictions["default"]["test"]], axis=0
    )
    assert found.high - found.low == pytest.approx(2 * 1.96 * right.std() / 20, rel=0.1)
