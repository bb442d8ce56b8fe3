"""Labelled texts: whatever the file, the rows to learn from, to select by and to test on, and never one row for two."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

datasets = pytest.importorskip("datasets", reason="the extra usmoe[train]")

from usmoe.data.classification import PARTS, Classification, Labelled, classification  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared" / "data"


def rows(number: int, start: int = 0, classes: int = 2) -> list[dict[str, Any]]:
    return [{"text": f"text {start + i}", "label": (start + i) % classes} for i in range(number)]


def write(path: Path, said: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in said), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(said), encoding="utf-8")
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(said).to_parquet(path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(said[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(said)
    return path


def read(source: Path | str, **fields: Any) -> Classification:
    return classification(Labelled(source=str(source), **fields))


def texts(task: Classification) -> dict[str, set[str]]:
    return {part: set(getattr(task, part).texts) for part in PARTS}


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet", "jsonl", "json"])
def test_a_file_is_divided_by_class_and_every_row_is_used_once(tmp_path: Path, ending: str):
    said = [{"sentence": f"text {i}", "category": "rare" if i % 5 == 0 else "usual"} for i in range(100)]
    task = read(write(tmp_path / f"mine.{ending}", said))
    assert task.classes == ("rare", "usual")
    assert [len(getattr(task, part)) for part in PARTS] == [81, 9, 10]
    assert [int((getattr(task, part).labels == 0).sum()) for part in PARTS] == [16, 2, 2]
    found = texts(task)
    assert set.union(*found.values()) == {row["sentence"] for row in said}
    assert sum(map(len, found.values())) == 100
    of = {row["sentence"]: row["category"] for row in said}
    for part in PARTS:
        examples = getattr(task, part)
        assert [task.classes[label] for label in examples.labels] == [of[text] for text in examples.texts]


def test_what_is_set_aside_depends_on_the_split_seed_alone(tmp_path: Path):
    path = write(tmp_path / "mine.jsonl", rows(60))
    assert read(path).digest == read(path).digest
    assert texts(read(path))["test"] != texts(read(path, split_seed=1))["test"]
    assert len(read(path, held_out=0.25).test) == 15


def test_splits_of_a_folder_are_kept_whatever_they_are_called(tmp_path: Path):
    write(tmp_path / "train.csv", rows(20))
    write(tmp_path / "dev.csv", rows(4, 20))
    write(tmp_path / "test.jsonl", rows(6, 24))
    task = read(tmp_path)
    assert [len(getattr(task, part)) for part in PARTS] == [20, 4, 6]
    assert task.test.rows == "test.jsonl, 6 rows"


def test_a_missing_validation_split_is_set_aside_from_train(tmp_path: Path):
    write(tmp_path / "train.csv", rows(40))
    write(tmp_path / "test.csv", rows(6, 40))
    task = read(tmp_path)
    assert [len(getattr(task, part)) for part in PARTS] == [36, 4, 6]
    assert task.validation.rows == "4 rows set aside from train.csv, by class (split seed 0)"
    assert task.train.rows == "train.csv, 40 rows, without 4 set aside for selection"


@pytest.mark.parametrize("test_split", ["withheld", "absent"])
def test_validation_is_the_test_where_there_is_no_other_and_selects_nothing(tmp_path: Path, test_split: str):
    write(tmp_path / "train.csv", rows(40))
    write(tmp_path / "validation.csv", rows(8, 40))
    if test_split == "withheld":
        write(tmp_path / "test.csv", [{"text": "nobody knows", "label": -1}] * 3)
    task = read(tmp_path)
    why = "test.csv has no labels" if test_split == "withheld" else "there is no test split"
    assert task.test.rows == f"validation.csv, 8 rows; {why}"
    assert [len(getattr(task, part)) for part in PARTS] == [36, 4, 8]
    found = texts(task)
    assert not found["validation"] & found["test"]
    assert found["validation"] <= {row["text"] for row in rows(40)}


def test_what_is_set_aside_says_which_file_has_no_labels(tmp_path: Path):
    """All withheld, or not even a column of them."""
    write(tmp_path / "train.csv", rows(60))
    write(tmp_path / "TEST.CSV", [{"id": i, "text": f"nobody knows {i}"} for i in range(3)])
    task = read(tmp_path)
    said = "rows set aside from train.csv, by class (split seed 0)"
    assert task.test.rows == f"6 {said}; TEST.CSV has no labels"
    assert task.validation.rows == f"5 {said}"
    write(tmp_path / "validation.csv", [{"text": "nobody knows", "label": ""}] * 3)
    assert read(tmp_path).validation.rows == f"5 {said}; validation.csv has no labels"
    write(tmp_path / "train.csv", [{"text": f"t{i}", "y": i % 2} for i in range(60)])
    with pytest.raises(ValueError, match=r"Which column of train\.csv is the label"):
        read(tmp_path)


def test_splits_that_number_their_classes_otherwise_are_refused(tmp_path: Path):
    for split, names in {"train": ["neg", "pos"], "test": ["pos", "neg"]}.items():
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        datasets.Dataset.from_list(rows(40), features=features).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError, match=r"test\.parquet calls the label 0 'pos', and train\.parquet 'neg'\. Number"):
        read(tmp_path)


def test_a_class_without_training_rows_is_told_or_refused(tmp_path: Path):
    path = write(tmp_path / "mine.jsonl", [*rows(200), *({"text": f"rare {i}", "label": 2} for i in range(3))])
    few = read(path, train_rows=20)
    assert len(few.train) == 20
    assert few.train.rows.endswith("; no row of 1 of the 3 classes (2)")
    with pytest.raises(
        ValueError, match=r"train_rows=2 leaves some of the 3 classes .* Give 3 or more, or leave it out"
    ):
        read(path, train_rows=2)


def test_equal_texts_fall_on_one_side(tmp_path: Path):
    task = read(write(tmp_path / "mine.csv", rows(30) * 3))
    found = texts(task)
    assert not found["train"] & found["validation"]
    assert not found["train"] & found["test"]
    assert sum(len(getattr(task, part)) for part in PARTS) == 90


def test_classes_of_one_row_stay_in_training(tmp_path: Path):
    said = [*rows(40), *({"text": f"alone {label}", "label": label} for label in range(2, 12))]
    task = read(write(tmp_path / "mine.jsonl", said), held_out=0.45)
    assert task.classes == tuple(str(label) for label in range(12))
    assert {f"alone {label}" for label in range(2, 12)} <= set(task.train.texts)


def test_classes_are_numbers_in_their_order_and_bear_their_names(tmp_path: Path):
    said = [{"text": f"t{i}", "label": i % 11, "label_text": f"name {i % 11}"} for i in range(66)]
    assert read(write(tmp_path / "named.jsonl", said)).classes == tuple(f"name {i}" for i in range(11))
    bare = [{"text": one["text"], "label": one["label"]} for one in said]
    assert read(write(tmp_path / "bare.csv", bare)).classes == tuple(str(i) for i in range(11))
    said[0]["label_text"] = "name 1"  # two names for one class: they are no names
    assert read(write(tmp_path / "mixed.jsonl", said)).classes == tuple(str(i) for i in range(11))


def test_columns_can_be_said_and_a_number_is_the_text_that_it_is(tmp_path: Path):
    said = [{"text": "wrong", "body": f"b{i}", "label": 0, "kind": i % 2} for i in range(40)]
    path = write(tmp_path / "train.csv", said)
    write(tmp_path / "test.jsonl", [{"body": f"c{i}", "kind": str(i % 2)} for i in range(4)])
    task = classification(Labelled(source=str(path.parent), text_column="body", label_column="kind"))
    assert task.train.texts[0].startswith("b")
    assert task.test.labels.tolist() == [0, 1, 0, 1]


def test_fewer_rows_are_drawn_by_class(tmp_path: Path):
    write(tmp_path / "train.jsonl", rows(90, classes=3))
    write(tmp_path / "validation.jsonl", rows(30, 90, classes=3))
    write(tmp_path / "test.jsonl", rows(30, 120, classes=3))
    task = read(tmp_path, train_rows=30, validation_rows=6, test_rows=9)
    assert [np.bincount(getattr(task, part).labels).tolist() for part in PARTS] == [[10] * 3, [2] * 3, [3] * 3]
    assert task.train.rows == "30 rows drawn by class from: train.jsonl, 90 rows"


def test_test_texts_that_training_has_are_counted(tmp_path: Path):
    write(tmp_path / "train.csv", rows(20))
    write(tmp_path / "validation.csv", rows(4, 20))
    write(tmp_path / "test.csv", rows(10, 15))
    assert read(tmp_path).known == 5


def test_an_empty_text_is_a_row(tmp_path: Path):
    task = read(write(tmp_path / "mine.csv", [*rows(40), {"text": "", "label": 1}, {"text": "  ", "label": 0}]))
    assert task.empty == 2
    assert sum(len(getattr(task, part)) for part in PARTS) == 42


def test_other_rows_have_another_digest(tmp_path: Path):
    said = rows(40)
    one = read(write(tmp_path / "one.csv", said)).digest
    said[3] = {"text": "another", "label": said[3]["label"]}
    assert read(write(tmp_path / "other.csv", said)).digest != one


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no such file": (None, {}, r"no file, folder or data set '.*nothing\.csv'"),
    "columns": ([{"words": "a", "label": 0}] * 4, {}, r"Which column of train\.csv is the text\? It has words, label"),
    "label column": ([{"text": "a", "y": 0}] * 4, {}, r"is the label\? It has text, y\. Say it: --label-column"),
    "said column": (rows(4), {"text_column": "body"}, r"no column 'body': it has text, label"),
    "one class": ([{"text": "a", "label": 1}] * 9, {}, r"All rows of train\.csv have the label '1'"),
    "no label": ([*rows(8), {"text": "a", "label": ""}], {}, r"1 of 9 rows of train\.csv have no label.*row 9"),
    "no text": ([{"text": " ", "label": i % 2} for i in range(4)], {}, r"has no text in 'text' in any row"),
    "number": ([{"text": f"a{i}", "label": i + 0.5} for i in range(4)], {}, r"Row 1 of .* has '0\.5' in 'label'"),
    "text is a number": (
        [{"text": 17, "label": i % 2} for i in range(4)],
        {},
        r"Row 1 of .* has int '17', which is no",
    ),
    "too few": (rows(3), {}, r"3 rows, are too few to set a share of 0\.1 aside for test\. Give more rows, or a file"),
    "too few texts": (
        rows(3) * 20,
        {},
        r"60 rows \(3 distinct texts\), are too few to set .* Give more distinct texts, or a file of test",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_rows_are_refused_in_a_sentence(tmp_path: Path, case: str):
    said, fields, sentence = WRONG[case]
    path = tmp_path / "nothing.csv" if said is None else write(tmp_path / "train.csv", said)
    with pytest.raises(ValueError, match=sentence):
        read(path, **fields)


def test_a_label_that_training_never_has_is_refused(tmp_path: Path):
    write(tmp_path / "train.csv", rows(20))
    write(tmp_path / "validation.csv", rows(4))
    write(tmp_path / "test.csv", [*rows(2), {"text": "new", "label": 5}])
    with pytest.raises(ValueError, match=r"Row 3 of test\.csv has the label '5', which no row of train\.csv has"):
        read(tmp_path)


def test_a_null_text_and_a_list_of_labels_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"Row 2 of null\.jsonl has no text in 'text'"):
        read(write(tmp_path / "null.jsonl", [{"text": "a", "label": 0}, {"text": None, "label": 1}]))
    with pytest.raises(ValueError, match=r"Row 1 of many\.jsonl has '\[0, 1\]' in 'label', which is no class"):
        read(write(tmp_path / "many.jsonl", [{"text": "a", "label": [0, 1]}]))


def test_other_files_and_folders_are_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("a", encoding="utf-8")
    with pytest.raises(ValueError, match=r"notes\.txt is no file of rows\. Give one of \.parquet"):
        read(tmp_path / "notes.txt")
    write(tmp_path / "folder" / "one.csv", rows(4))
    write(tmp_path / "folder" / "two.csv", rows(4))
    with pytest.raises(ValueError, match=r"has no file called train\. It has one \(one\.csv\), two"):
        read(tmp_path / "folder")
    write(tmp_path / "tests" / "test.csv", rows(4))
    with pytest.raises(ValueError, match=r"has no labelled rows to train on, but test\.csv"):
        read(tmp_path / "tests")


@pytest.mark.parametrize("fields", [{"held_out": 0.5}, {"held_out": 0.0}, {"train_rows": 0}, {"source": ""}])
def test_an_impossible_configuration_is_refused(fields: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(fields)) if "source" not in fields else "no name"):
        Labelled(**{"source": "sst2", **fields})


def test_the_hub_withholds_labels_of_its_test_split(monkeypatch):
    """As stanfordnlp/sst2 has it: classes with names, and -1 in the test split."""
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
    )

    def made(number: int, label: int | None = None) -> Any:
        said = [{"sentence": f"{number} {i}", "label": i % 2 if label is None else label} for i in range(number)]
        return datasets.Dataset.from_list(said, features=features)

    asked = []
    hub = {"train": made(30), "validation": made(8), "test": made(5, -1), "unsupervised": made(3, -1)}
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: asked.append(names) or datasets.DatasetDict(hub))
    task = read("sst2")
    assert asked == [("stanfordnlp/sst2", None)]
    assert task.classes == ("negative", "positive")
    assert task.test.rows == "stanfordnlp/sst2 (validation), 8 rows; stanfordnlp/sst2 (test) has no labels"
    assert len(task.validation) == 3


def test_offline_and_failures_of_the_hub_are_one_sentence(monkeypatch):
    from datasets import config
    from huggingface_hub import constants

    seen = []

    def fail(*names: Any) -> None:
        seen.append((config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE))
        raise ConnectionError("no way there.\nmuch more")

    before = (config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r"imdb cannot be had from stanfordnlp/imdb: no way there\. Get a connection"):
        classification(Labelled(source="imdb"), offline=True)
    assert seen == [(True, True)]
    assert before == (config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE)


def test_a_local_copy_stands_for_the_hub(tmp_path: Path):
    write(tmp_path / "copy" / "train.jsonl", rows(20))
    write(tmp_path / "copy" / "test.jsonl", rows(4, 20))
    (tmp_path / "copy" / "manifest.json").write_text(json.dumps({"hub": "nyu-mll/glue:sst2"}), encoding="utf-8")
    task = classification(Labelled(source="sst2"), tmp_path)
    assert len(task.test) == 4
    assert classification(Labelled(source="copy"), tmp_path).digest == task.digest
    with pytest.raises(ValueError, match=r"nothing that stands for PolyAI/banking77\. It has: copy"):
        classification(Labelled(source="banking77"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes", "classes"),
    [
        ("sst2", (67349, 872, 1821), 2),
        ("sst5", (8544, 1101, 2210), 5),
        ("imdb", (22494, 2506, 25000), 2),
        ("banking77", (9003, 1000, 3080), 77),
    ],
)
def test_the_papers_sets(name: str, sizes: tuple[int, ...], classes: int):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{name} is not beside the checkout")
    task = classification(Labelled(source=name), SHARED)
    assert tuple(len(getattr(task, part)) for part in PARTS) == sizes
    assert len(task.classes) == classes
