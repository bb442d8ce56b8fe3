"""Tasks of mteb and of one's own, read from a folder in place of the hub."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

mteb = pytest.importorskip("mteb", reason="the extra usmoe[embed]")

import hash_encoder as make  # noqa: E402
from usmoe.data.local import at, find  # noqa: E402
from usmoe.data.rows import read  # noqa: E402
from usmoe.evaluate.tasks import PAPER, find_tasks  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared" / "data"

pytestmark = [
    # sentence-transformers and torchmetrics, which mteb imports when it first evaluates, still script a function
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    # mteb would have its newer tasks used; the paper's are these
    pytest.mark.filterwarnings("ignore:The task '.*' is superseded:UserWarning"),
]


def sts(folder: Path, hub: str | None = None, seed: int = 0, ending: str = "parquet") -> Path:
    make.write(folder / f"test.{ending}", make.pairs(20, seed))
    if hub is not None:
        (folder / "manifest.json").write_text(json.dumps({"hub": hub}))
    return folder


@pytest.mark.parametrize(
    ("said", "asked"),
    [
        ("mteb/emotion", "mteb/emotion"),
        ("mteb/emotion (= dair-ai/emotion)", "dair-ai/emotion"),
        ("mteb/twentynewsgroups-clustering; SetFit/20_newsgroups", "SetFit/20_newsgroups"),
        ("stanfordnlp/sst2, nyu-mll/glue:sst2", "nyu-mll/glue:sst2"),
        ("nyu-mll/glue", "nyu-mll/glue:sst2"),
        ("mteb/STS12-sts", "mteb/sts12-sts"),
    ],
)
def test_a_manifest_says_what_a_folder_stands_for(tmp_path: Path, said: str, asked: str):
    sts(tmp_path / "one", said)
    sts(tmp_path / "other", "mteb/other")
    assert find(tmp_path, asked).folder == tmp_path / "one"
    assert find(tmp_path / "one", asked).folder == tmp_path / "one"


@pytest.mark.parametrize("asked", ["mteb/emotions", "emotion", "teb/emotion", "mteb/emotion-v2", "nyu-mll/glue"])
def test_a_part_of_a_name_is_not_the_name(tmp_path: Path, asked: str):
    sts(tmp_path / "one", "mteb/emotion nyu-mll/glue:sst2")
    with pytest.raises(ValueError, match=rf"nothing that stands for {asked}\. It has: one\."):
        find(tmp_path, asked)


def test_without_a_manifest_a_folder_stands_for_the_set_of_its_name(tmp_path: Path):
    for name in ("stsbenchmark", "sickr-sts", "banking77"):
        sts(tmp_path / name)
    assert find(tmp_path, "mteb/stsbenchmark-sts").folder.name == "stsbenchmark"
    assert find(tmp_path, "mteb/sickr-sts").folder.name == "sickr-sts"
    assert find(tmp_path / "banking77", "mteb/banking77").folder.name == "banking77"
    with pytest.raises(ValueError, match="It has: banking77, sickr-sts, stsbenchmark"):
        find(tmp_path, "mteb/biosses-sts")


def test_what_a_manifest_says_outranks_a_folders_name(tmp_path: Path):
    sts(tmp_path / "biosses", "mteb/sts12-sts")
    sts(tmp_path / "mine", "mteb/biosses-sts")
    assert find(tmp_path, "mteb/biosses-sts").folder.name == "mine"


def test_stray_files_beside_the_folders_make_no_data_set(tmp_path: Path):
    sts(tmp_path / "one", "mteb/biosses-sts")
    make.write(tmp_path / "results.csv", {"score": [1]})
    assert find(tmp_path, "mteb/biosses-sts").folder == tmp_path / "one"


def test_two_folders_that_stand_for_one_set_are_refused(tmp_path: Path):
    sts(tmp_path / "a", "mteb/biosses-sts")
    sts(tmp_path / "b", "mteb/biosses-sts")
    with pytest.raises(ValueError, match=r"a and .*b both stand for mteb/biosses-sts"):
        find(tmp_path, "mteb/biosses-sts")
    with pytest.raises(ValueError, match=r"There is no folder .*nowhere"):
        find(tmp_path / "nowhere", "mteb/biosses-sts")


def test_the_files_of_the_splits(tmp_path: Path):
    columns = make.pairs(5, 0)
    for name in ("train_tokenised.parquet", "validation.jsonl", "data/test-00000-of-00001.parquet", "corpus/test.csv"):
        make.write(tmp_path / name, columns)
    (tmp_path / "README.md").write_text("no data")
    said = {"files": [{"file": "train_tokenised.parquet", "split": "train"}, {"file": "LICENSE", "split": "licence"}]}
    (tmp_path / "manifest.json").write_text(json.dumps(said))
    assert set(at(tmp_path).files) == {"train", "validation", "test", "corpus/test"}
    make.write(tmp_path / "test.csv", columns)
    with pytest.raises(ValueError, match=r"two files of the split 'test'"):
        at(tmp_path)


def test_one_folder_may_hold_the_files_of_two_sets(tmp_path: Path):
    """As shared/data/twentynewsgroups: clustering_test.parquet is the test split of ...-clustering, and its alone."""
    make.write(tmp_path / "test.parquet", make.classification(5, 0))
    make.write(tmp_path / "clustering_test.parquet", make.clustering(2, 0))
    (tmp_path / "manifest.json").write_text(json.dumps({"hub": "mteb/news-clustering; SetFit/news"}))
    assert {split: path.name for split, path in find(tmp_path, "mteb/news-clustering").files.items()} == {
        "test": "clustering_test.parquet"
    }
    assert find(tmp_path, "SetFit/news").files["test"].name == "test.parquet"


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "json", "csv", "tsv"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, ending: str):
    columns = {"query-id": ["007", "8"], "text": ["a b", "12"], "score": [1, -2], "share": [0.5, 1.0]}
    assert read(make.write(tmp_path / f"test.{ending}", columns)).to_dict() == columns


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "json", "csv"])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, ending: str):
    path = make.write(tmp_path / f"test.{ending}", make.pairs(20, 0))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2 + (ending == "csv")])
    with pytest.raises(ValueError, match=rf"test\.{ending} cannot be read as {ending}: .*put a whole copy there\.$"):
        read(path)


def test_the_revision_is_of_the_contents(tmp_path: Path):
    first = at(sts(tmp_path / "a")).revision
    assert first.startswith("local-")
    assert len(first) == len("local-") + 12
    assert at(sts(tmp_path / "b", "mteb/biosses-sts")).revision == first
    assert at(sts(tmp_path / "c", seed=1)).revision != first
    shutil.move(sts(tmp_path / "d") / "test.parquet", tmp_path / "d" / "train.parquet")
    assert at(tmp_path / "d").revision != first


def test_a_task_of_mteb_reads_the_folder(tmp_path: Path):
    sts(tmp_path / "biosses")
    (task,) = find_tasks(["BIOSSES"], data=tmp_path)
    score, _ = make.evaluated(task, tmp_path / "kept")
    name = make.own(tmp_path / "mine", "STS", {"test": make.pairs(20, 0)})
    mine, _ = make.evaluated(*find_tasks([name], data=tmp_path), tmp_path / "kept")
    assert score == pytest.approx(mine)
    assert type(task).__name__ == "BiossesSTS"
    assert not task.data_loaded
    assert task.metadata.dataset == {
        "path": str(tmp_path / "biosses"),
        "revision": at(tmp_path / "biosses").revision,
    }, "mteb's unload_data() forgets what an instance says of itself"
    assert mteb.get_task("BIOSSES").metadata.dataset["path"] == "mteb/biosses-sts"


def test_mtebs_own_transformation_follows_the_reading(tmp_path: Path):
    """TwitterURLCorpus is one row of lists on the hub, sent1 and sent2 by name, which mteb renames."""
    columns = make.pairs(20, 0)
    row = {"sent1": [columns["sentence1"]], "sent2": [columns["sentence2"]], "labels": [columns["labels"]]}
    make.write(tmp_path / "twitterurlcorpus" / "test.parquet", row)
    (task,) = find_tasks(["TwitterURLCorpus"], data=tmp_path)
    name = make.own(tmp_path / "mine", "PairClassification", {"test": columns})
    (mine,) = find_tasks([name], data=tmp_path)
    scores = [make.evaluated(one, tmp_path / "kept")[0] for one in (task, mine)]
    assert scores[0] == pytest.approx(scores[1])


def test_missing_splits_and_columns_are_named(tmp_path: Path):
    make.write(tmp_path / "emotion" / "test.parquet", make.classification(20, 0))
    with pytest.raises(ValueError, match=r"emotion has no file for 'train'\. It has test \(test\.parquet\)\."):
        find_tasks(["EmotionClassification"], data=tmp_path)
    make.write(tmp_path / "emotion" / "train.parquet", {"text": ["a"], "labels": [1]})
    (task,) = find_tasks(["EmotionClassification"], data=tmp_path)
    with pytest.raises(ValueError, match=r"train\.parquet lacks label: it has text, labels\."):
        task.load_data()
    make.write(tmp_path / "twitterurlcorpus" / "test.parquet", make.pairs(5, 0))
    (task,) = find_tasks(["TwitterURLCorpus"], data=tmp_path)
    with pytest.raises(ValueError, match=r"not in the form from which mteb makes TwitterURLCorpus .*sent1"):
        task.load_data()


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    """The layout of BEIR: corpus.jsonl, queries.jsonl, qrels/test.tsv."""
    parts = make.retrieval(15, 0)
    make.write(tmp_path / "nfcorpus" / "corpus.jsonl", parts["corpus"])
    make.write(tmp_path / "nfcorpus" / "queries.jsonl", parts["queries"])
    make.write(tmp_path / "nfcorpus" / "qrels" / "test.tsv", parts["qrels"])
    return tmp_path


def test_retrieval_as_on_the_hub_and_as_in_beir(beir: Path, tmp_path: Path):
    """The hub has a folder for each part: corpus/corpus..., default/test..., or corpus/test..., qrels/test..."""
    parts = make.retrieval(15, 0)
    for part, name in {"corpus": "corpus/corpus", "queries": "queries/queries", "qrels": "default/test"}.items():
        make.write(tmp_path / "hub" / "nfcorpus" / f"{name}-00000-of-00001.parquet", parts[part])
    scores = []
    for folder in (beir, tmp_path / "hub"):
        (task,) = find_tasks(["NFCorpus"], data=folder)
        scores.append(make.evaluated(task, folder / "kept")[0])
    assert scores[0] == scores[1]
    assert 0.4 < scores[0] < 0.9


def test_retrieval_data_that_do_not_fit_are_refused(beir: Path):
    (task,) = find_tasks(["NFCorpus"], data=beir)
    qrels = make.retrieval(15, 0)["qrels"]
    make.write(beir / "nfcorpus" / "qrels" / "test.tsv", qrels | {"query-id": [f"x{q}" for q in qrels["query-id"]]})
    with pytest.raises(ValueError, match=r"ids of .*nfcorpus do not meet"):
        task.load_data()
    (beir / "nfcorpus" / "corpus.jsonl").unlink()
    with pytest.raises(ValueError, match=r"nfcorpus has no file for 'corpus'\. It has .*queries"):
        find_tasks(["NFCorpus"], data=beir)[0].load_data()


def test_reranking_needs_what_is_to_be_reranked(tmp_path: Path):
    parts = make.retrieval(15, 0)
    top = parts.pop("top_ranked")
    name = make.own(tmp_path / "mine", "Reranking", parts)
    (task,) = find_tasks([name], data=tmp_path)
    with pytest.raises(ValueError, match=r"has no top_ranked, the documents to rerank for each query"):
        task.load_data()
    top["corpus-ids"][3][0] = "nothing"
    make.write(tmp_path / "mine" / "top_ranked.parquet", top)
    with pytest.raises(ValueError, match=r"ranks the document 'nothing', which the corpus does not have"):
        find_tasks([name], data=tmp_path)[0].load_data()


# the class is deprecated, and is the oracle here
@pytest.mark.filterwarnings("ignore:This class is deprecated:DeprecationWarning")
def test_the_old_columns_of_reranking_give_what_mteb_makes_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from mteb.abstasks.text import reranking

    columns = make.old_reranking(12, 0)
    columns["negative"][3] = []  # such a query is left out
    columns["negative"][5][0] = columns["positive"][5][1]  # and ties go against the relevant document
    make.write(tmp_path / "AskUbuntuDupQuestions" / "test.parquet", columns)
    (task,) = find_tasks(["AskUbuntuDupQuestions"], data=tmp_path)
    ours, _ = make.evaluated(task, tmp_path / "kept")

    class Old(reranking.AbsTaskReranking):
        metadata = task.metadata

    monkeypatch.setattr(reranking, "OLD_FORMAT_RERANKING_TASKS", ["AskUbuntuDupQuestions"])
    old = Old()
    old.transform_old_dataset_format({"test": read(tmp_path / "AskUbuntuDupQuestions" / "test.parquet")})
    theirs, _ = make.evaluated(old, tmp_path / "kept")
    assert ours == theirs
    assert 0.3 < ours < 1


def test_the_names_of_tasks(tmp_path: Path):
    tasks = find_tasks(["STS12", "paper", "STS12"])
    assert [task.metadata.name for task in tasks[:2]] == ["STS12", "EmotionClassification"]
    assert len(tasks) == 18 + 1 == sum(map(len, PAPER.values()))
    assert {task.metadata.name: task.metadata.type for task in tasks} == {
        n: kind for kind in PAPER for n in PAPER[kind]
    }
    with pytest.raises(ValueError, match=r"no task 'stsbenchmrk'\. Did you mean STSBenchmark"):
        find_tasks(["stsbenchmrk"])
    with pytest.raises(ValueError, match="CIFAR10 is a task on image"):
        find_tasks(["CIFAR10"])
    sts(tmp_path / "biosses")
    with pytest.raises(ValueError, match=r"CQADupstackRetrieval is made of other tasks.*CQADupstackAndroidRetrieval"):
        find_tasks(["CQADupstackRetrieval"], data=tmp_path)


def test_of_several_languages_english_is_kept():
    sts22, bitext, danish = find_tasks(["STS22", "BornholmBitextMining", "AngryTweetsClassification"])
    assert sts22.hf_subsets == ["en"]
    assert bitext.hf_subsets == danish.hf_subsets == ["default"]


def test_the_subset_of_a_language_is_a_folder_or_the_files_themselves(tmp_path: Path):
    make.write(tmp_path / "sts22-crosslingual-sts" / "test.parquet", make.pairs(20, 0))
    (task,) = find_tasks(["STS22"], data=tmp_path)
    plain, _ = make.evaluated(task, tmp_path / "kept")
    shutil.move(tmp_path / "sts22-crosslingual-sts", tmp_path / "en")
    (tmp_path / "sts22-crosslingual-sts").mkdir()
    shutil.move(tmp_path / "en", tmp_path / "sts22-crosslingual-sts" / "en")
    (tmp_path / "sts22-crosslingual-sts" / "manifest.json").write_text('{"hub": "mteb/sts22-crosslingual-sts"}')
    (task,) = find_tasks(["STS22"], data=tmp_path)
    assert make.evaluated(task, tmp_path / "kept")[0] == plain


def test_rows_of_one_text_each_are_one_set_to_be_clustered(tmp_path: Path):
    sets = make.clustering(1, 0)
    files = {"flat": {name: column[0] for name, column in sets.items()}, "listed": sets}
    for folder, columns in files.items():
        name = make.own(tmp_path / folder / "mine", "Clustering", {"test": columns})
    flat, listed = (make.evaluated(*find_tasks([name], data=tmp_path / one), tmp_path / one)[0] for one in files)
    assert flat == listed


@pytest.mark.parametrize(
    ("block", "match"),
    [
        ({}, "names no task"),
        ({"name": "A", "type": "Ranking"}, "unknown type 'Ranking'. Choose one of: Classification, Clustering"),
        ({"name": "A", "type": "STS", "metric": "spearman"}, "unknown field 'metric'"),
        ({"name": "../A", "type": "STS"}, "Use letters, digits"),
        ({"name": "STS12", "type": "STS"}, "one of mteb's"),
    ],
)
def test_a_block_that_cannot_be_is_refused(tmp_path: Path, block: dict, match: str):
    sts(tmp_path / "mine")
    (tmp_path / "mine" / "manifest.json").write_text(json.dumps({"mteb": block}))
    with pytest.raises(ValueError, match=match):
        find_tasks(["A"], data=tmp_path)


REAL = {
    "EmotionClassification": ("emotion", 2000),
    "ToxicConversationsClassification": ("toxic_conversations", 1000),
    "TweetSentimentExtractionClassification": ("tweet_sentiment_extraction", 3535),
    "TwentyNewsgroupsClustering": ("twentynewsgroups", 10),
    "TwitterURLCorpus": ("twitterurlcorpus", 1),
    "STS12": ("sts12", 3108),
    "STSBenchmark": ("stsbenchmark", 1379),
    "BIOSSES": ("biosses", 100),
    "SummEval": ("summeval", 100),
    "ImdbClassification": ("imdb", 25000),
}


@pytest.mark.parametrize("name", REAL)
def test_the_real_sets_beside_the_checkout(name: str):
    folder, rows = REAL[name]
    if not (SHARED / folder).is_dir():
        pytest.skip(f"there is no {SHARED / folder}")
    (task,) = find_tasks([name], data=SHARED)
    task.load_data()
    assert len(task.dataset["test"]) == rows
    assert task.metadata.revision.startswith("local-")


@pytest.mark.slow
def test_the_ranking_sets_made_of_real_text(tmp_path: Path):
    for folder in ("twentynewsgroups", "banking77"):
        if not (SHARED / folder).is_dir():
            pytest.skip(f"there is no {SHARED / folder}")
    script = Path(__file__).parents[1] / "scripts" / "make_ranking_sets.py"
    for out in ("one", "again"):
        subprocess.run([sys.executable, script, SHARED, tmp_path / out], check=True, capture_output=True)
    tasks, again = (
        find_tasks(["NewsgroupsSubjects", "BankingIntents"], data=tmp_path / out) for out in ("one", "again")
    )
    assert [task.metadata.revision for task in tasks] == [task.metadata.revision for task in again]
    for task, queries, documents in zip(tasks, (275, 300), (1, 20), strict=True):  # 25 subjects belong to threads
        task.load_data()
        data = task.dataset["default"]["test"]
        assert len(data["queries"]) == queries
        assert {len(judged) for judged in data["relevant_docs"].values()} == {documents}
