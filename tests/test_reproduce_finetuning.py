"""Table 13: classifiers from the models of Table 14; and Tables 15 and 16, which are settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tiny_scale import shrink, write_texts
from usmoe.reproduce import Asked, find, kind_of, load, markdown, paper_figures, save
from usmoe.reproduce.finetuning import study
from usmoe.reproduce.finetuning.plan import Plan, plan
from usmoe.reproduce.finetuning.render import views
from usmoe.reproduce.finetuning.run import Answered, Result, run
from usmoe.reproduce.finetuning.study import ROWS, TASKS
from usmoe.reproduce.training.plan import plan as plan_of_training
from usmoe.train.scored import Scored, Selected


@pytest.fixture
def tiny(monkeypatch, tmp_path) -> Path:
    """The tiny scale, its text, and SST-2 in three splits: a text is good or bad by its one adjective."""
    shrink(monkeypatch)
    smaller = {"LENGTH": 24, "ROWS": dict.fromkeys(TASKS, 32), "TEST_ROWS": 12, "SELECTION_ROWS": 8, "EPOCHS": 1}
    for name, value in smaller.items():
        monkeypatch.setattr(study, f"SMALL_{name}", value)
    folder = write_texts(tmp_path / "data")
    (folder / "sst2").mkdir()
    for split, number in (("train", 40), ("validation", 10), ("test", 16)):
        rows = [{"sentence": f"film {n} is {('bad', 'good')[n % 2]}", "label": n % 2} for n in range(number)]
        (folder / "sst2" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_the_models_are_those_of_table_14(tiny):
    made = plan(find("table13"), Asked(data=tiny))
    other = plan_of_training(find("table14"), Asked(data=tiny))
    assert {one.name for one in made.pretrained} < {one.name for one in other.runs}
    assert made.tasks == ("sst2",)
    assert made.left_out == dict.fromkeys(("sst5", "imdb", "banking77"), "not in the folder of data")
    assert made.parts == 14 + 14
    assert {row.paper for row in ROWS} == set(paper_figures("table13").columns)
    assert len({one.name for one in made.runs}) == 14
    assert Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_what_cannot_be_planned_is_refused(tiny):
    with pytest.raises(ValueError, match=r"table13 has no task 'sst3'"):
        plan(find("table13"), Asked(data=tiny, tasks=("sst3",)))
    with pytest.raises(ValueError, match="imdb"):
        plan(find("table13"), Asked(data=tiny, tasks=("IMDB",)))
    with pytest.raises(ValueError, match="--steps means nothing to table13"):
        plan(find("table13"), Asked(data=tiny, steps=4))
    with pytest.raises(ValueError, match="There is no data set"):
        plan(find("table13"), Asked(data=write_texts(tiny / "other")))


def test_classifiers_are_trained_tested_and_saved(tiny, tmp_path):
    made = plan(find("table13"), Asked(data=tiny, rows=("usmoe-1.5", "smoe_dropout"), seeds=1))
    words: list[str] = []
    result = run(made, tmp_path / "results", done=words.append)
    assert len(words) == made.parts == 4
    one, dropout = result.rows
    assert len(one.right) == 12
    assert one.scored.accuracy == one.right.count("1") / 12
    assert (one.scored.experts, dropout.scored.experts) == (pytest.approx(1.5, abs=0.1), 16)
    save(result, tmp_path / "r.json")
    assert load(tmp_path / "r.json") == result
    before = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*.safetensors"))]
    assert run(made, tmp_path / "results") == result
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*.safetensors"))] == before


def test_force_says_what_it_leaves_as_it_is(tiny):
    kind = kind_of(find("table13"))
    made = plan(find("table13"), Asked(data=tiny, rows=("usmoe",), seeds=1))
    assert kind.announce(made, True, False).startswith("1 model of Table 14, trained where they are not there; from")
    assert "1 classifier. " in kind.announce(made, True, False)
    assert "--force" not in kind.announce(made, True, False)
    assert "--force tests no classifier again" in kind.announce(made, True, True)


def made_up(plan: Plan, right) -> Result:
    """right(row, task, seed) -> which test rows are right, as a text of 0 and 1."""
    rows = []
    for one in plan.runs:
        answers = right(one.pretrained.row, one.task, one.config.seed)
        best = Selected(epoch=1.0, step=2, loss=0.5, accuracy=0.6, macro_f1=0.6)
        scored = Scored(
            accuracy=answers.count("1") / len(answers),
            accuracy_band=(0.5, 0.7),
            macro_f1=0.5,
            macro_f1_band=(0.4, 0.6),
            rows={"train": "train.parquet", "validation": "validation.parquet", "test": "test.parquet"},
            counts={"train": 32, "validation": 8, "test": len(answers)},
            classes=2,
            known=0,
            cut=0,
            tokens=20.0,
            history=(best,),
            best=best,
            router=one.pretrained.config.model.router,
            experts=1.5 if one.pretrained.row == "usmoe-1.5" else 2.0,
            dropped=0.01,
            load_cv=0.4,
            alone=True,
            flops=2e6,
            seconds=1.0,
            test_seconds=1.0,
            start={},
            config=one.config,
        )
        rows.append(
            Answered(
                corpus=one.pretrained.corpus,
                row=one.pretrained.row,
                task=one.task,
                seed=one.config.seed,
                scored=scored,
                right=answers,
            )
        )
    return Result(plan=plan, rows=tuple(rows))


def test_accuracies_stand_beside_the_papers():
    """a and b are right on the same rows but one; c is far below both."""
    asked = Asked(rows=("usmoe", "usmoe-1.5", "token_choice"), tasks=("SST-2", "banking77"))
    result = made_up(
        plan(find("table13"), asked),
        lambda row, task, seed: (
            {"usmoe": "1" * 150, "usmoe-1.5": "1" * 149 + "0", "token_choice": "10" * 75}[row] + "0" * 50
        ),
    )
    view, costs = views(result)
    assert view.head == ("method", "SST-2", "BANKING77", "paper, SST-2", "paper, BANKING77")
    assert view.rows[0] == ("USMoE k=2", "75.0 (0.0)~", "75.0 (0.0)~", "81.5", "87.8")
    assert costs.head == ("method", "MFLOPs a token", "experts a token", "dropped, %")
    assert costs.rows[1] == ("USMoE k=1.5", "2.00", "1.50", "1.0")
    assert view.rows[1][1] == "74.5 (0.0)~"
    assert view.rows[2][1:3] == ("37.5 (0.0)", "37.5 (0.0)")
    assert view.bold == ()
    said = " ".join(view.says)
    assert "On SST-2 no ranking can be read among USMoE k=2 (highest) and USMoE k=1.5 (marked ~)" in said
    assert "No difference between the two means anything." in said
    assert "95 % for all rows together (Bonferroni)" in said
    assert "Without SST-5, IMDB." in costs.differs
    assert any("selected on validation.parquet; tested on test.parquet" in line for line in costs.differs)
    assert "## table13, small scale, from novels" in markdown(result)


def test_seeds_that_disagree_leave_no_ranking():
    asked = Asked(rows=("usmoe", "token_choice"), tasks=("sst2",))
    rights = {"usmoe": 90, "token_choice": 60}
    fixed = made_up(plan(find("table13"), asked), lambda row, task, seed: "1" * rights[row] + "0" * (110 - rights[row]))
    assert views(fixed)[0].bold == ((0, 1),)
    uneven = {("usmoe", 0): 100, ("usmoe", 1): 80, ("token_choice", 0): 80, ("token_choice", 1): 40}
    mixed = made_up(
        plan(find("table13"), asked),
        lambda row, task, seed: "1" * uneven[row, seed] + "0" * (110 - uneven[row, seed]),
    )
    assert views(mixed)[0].bold == ()


# --- Tables 15 and 16


@pytest.mark.parametrize("name", ["table15", "table16"])
def test_settings_in_use_stand_above_the_papers(name, tmp_path):
    experiment = find(name)
    kind = kind_of(experiment)
    result = kind.run(
        kind.plan(experiment, Asked(scale="paper")), tmp_path, offline=True, anew=False, done=lambda word: None
    )
    (view,) = kind.views(result, wide=True)
    ours, paper = view.rows[::2], view.rows[1::2]
    assert [row[1:] for row in ours] == [row[1:] for row in paper]
    assert len(ours) == 4
    save(result, tmp_path / "x.json")
    assert load(tmp_path / "x.json") == result
    with pytest.raises(ValueError, match="is a table of settings, without a picture"):
        kind.refuse_picture(experiment)
    with pytest.raises(ValueError, match=f"--seeds means nothing to {name}"):
        kind.plan(experiment, Asked(seeds=3))


def test_settings_of_other_texts_stand_apart_from_the_papers(tmp_path):
    kind = kind_of(find("table15"))
    result = kind.run(kind.plan(find("table15"), Asked()), tmp_path, offline=True, anew=False, done=lambda word: None)
    (view,) = kind.views(result, wide=True)
    assert [row[0] for row in view.rows[:3]] == ["novels", "wiki2016", "paper, enwik8"]
    assert view.rows[2][1:] == ("512", "48", "0.00025", "100,000")


def test_settings_of_the_small_scale_say_that_they_are_others(tmp_path):
    kind = kind_of(find("table16"))
    result = kind.run(kind.plan(find("table16"), Asked()), tmp_path, offline=True, anew=False, done=lambda word: None)
    (view,) = kind.views(result, wide=True)
    assert view.rows[0] == ("sst2", "200", "16", "0.0005", "3")
    assert view.rows[1] == ("  paper", "512", "16", "0.0001", "15")
    assert result.plan.settings["imdb"]["data"]["train_rows"] == study.SMALL_ROWS["imdb"]
    assert dataclasses.replace(result.plan, settings={}).parts == 0
    assert set(result.plan.settings) == set(TASKS)
