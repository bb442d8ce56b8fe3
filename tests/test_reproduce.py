"""The paper's tables as named experiments: planned, run, saved, and put beside the paper's figures."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import sys
from pathlib import Path

import pytest

from usmoe.evaluate.run import Score
from usmoe.evaluate.tasks import PAPER
from usmoe.reproduce import EXPERIMENTS, Asked, find, kind_of, load, markdown, paper_figures, save
from usmoe.reproduce.embeddings.compare import AVERAGE, SPREAD, Cell, Line, lines, mean
from usmoe.reproduce.embeddings.plan import downloads, local_tasks, plan
from usmoe.reproduce.embeddings.render import plot, view
from usmoe.reproduce.embeddings.run import run
from usmoe.reproduce.embeddings.study import CHECKPOINTS, STUDIES, TASKS, UNIFIED
from usmoe.routing import parse_router

ROOT = Path(__file__).parent.parent


class Fake:
    """In place of usmoe.evaluate.run.evaluate: a figure for each task and setting, always the same, and a band."""

    def __init__(self, half: float = 0.01):
        self.half = half
        self.calls: list[tuple] = []

    def __call__(self, model, tasks, settings, **options):
        self.calls.append((model, tuple(tasks), tuple(settings), options))
        scores = [self.score(task, setting) for task in tasks for setting in settings]
        for score in scores if options["done"] else ():
            options["done"](score)
        return scores

    def score(self, task, setting) -> Score:
        value = (
            0.3 + 0.02 * list(TASKS).index(task) + 0.03 * len(setting.router) / 10 + 0.1 * (setting.prompt == "none")
        )
        repeated = TASKS[task][0] in ("Classification", "Clustering")
        return Score(
            task=task,
            type=TASKS[task][0],
            metric="any",
            setting=setting,
            score=value,
            deviation=0.004 if repeated else None,
            runs=10 if repeated else 1,
            low=value - self.half,
            high=value + self.half,
            seconds=1.0,
        )


def small(name: str, tasks=("Emotion", "BIOSSES", "STS12"), **options):
    return plan(find(name), "small", tasks=tasks, **options)


def test_every_table_and_figure_is_listed_in_order():
    names = [f"table{n}" for n in range(1, 17)] + [f"figure{n}" for n in range(1, 12)]
    assert list(EXPERIMENTS) == [*names, "figure12 --part a", "figure12 --part b"]
    assert {name for name, one in EXPERIMENTS.items() if one.kind == "embeddings"} == set(STUDIES)
    assert all(one.waits_for for one in EXPERIMENTS.values() if not one.built)


def test_names_are_found_with_their_parts_or_with_the_nearest():
    assert find("figure12", "a").slug == "figure12-a"
    assert find(" Table5 ") is EXPERIMENTS["table5"]
    with pytest.raises(ValueError, match=r"figure12 has parts of its own\. Ask for figure12 --part a or"):
        find("figure12")
    with pytest.raises(ValueError, match="table5 has no parts that run alone"):
        find("table5", "a")
    with pytest.raises(ValueError, match=r"no experiment 'tabel5'\. Did you mean table5"):
        find("tabel5")
    with pytest.raises(ValueError, match="table3 is not built yet: it comes with training on images"):
        kind_of(find("table3"))


def test_what_means_nothing_to_an_experiment_is_refused_by_its_flag():
    found = find("table5")
    with pytest.raises(ValueError, match="--router means nothing to table5: MTEB with PromptEOL"):
        kind_of(found).plan(found, Asked(routers=("usmoe",), tasks=("STS12",)))


def test_tasks_are_those_that_evaluation_knows():
    assert {name: kind for name, (kind, _) in TASKS.items()} == {one: kind for kind in PAPER for one in PAPER[kind]}
    for table in ("table7", "table8", "table9"):
        assert {(row.task, row.dataset) for row in paper_figures(table).rows} == set(TASKS.values())


@pytest.mark.parametrize("name", STUDIES)
def test_columns_are_settings_whose_routers_can_be_read(name):
    for scale in ("small", "paper"):
        made = plan(find(name), scale, tasks=["Emotion"])
        assert len({(one.model, one.prompt, one.label) for one in made.columns}) == len(made.columns)
        for column in made.columns:
            assert column.setting.router == "own" or parse_router(column.setting.router)
            assert column.setting.instruction == (scale == "paper")
            wording = {"Prompt": "prompteol", "None": "quoted" if scale == "paper" else "none"}
            assert column.setting.prompt == wording[column.prompt]


def test_the_paper_scale_is_the_papers_and_says_what_it_fetches():
    made = plan(find("table5"), "paper")
    assert (made.models, made.quantize, made.batch_size) == (tuple(CHECKPOINTS), "nf4", 128)
    assert made.tasks == tuple(TASKS)
    said = downloads(made)
    assert re.findall(r"[\d.]+ GB", said) == ["13.8 GB", "28.6 GB", "32.8 GB", "75.2 GB"]
    features = {(one.model, one.label): one.setting.features for one in made.columns}
    assert features["deepseek-ai/deepseek-moe-16b-base", "Router"] == "probabilities"
    assert features["allenai/OLMoE-1B-7B-0924", "MoEE"] == "logits"
    two = {one.label: one.setting for one in made.columns if one.paper == "USMoE"}
    assert {label: (one.router, one.embedding) for label, one in two.items()} == {
        "USMoE hidden": (UNIFIED, "hidden"),
        "USMoE MoEE": (UNIFIED, "moee"),
    }
    assert downloads(small("table5", model="shipped")) == (
        "From the hub, where it is not on this machine yet: the data of 3 MTEB tasks."
    )


def test_tasks_are_chosen_by_either_name():
    assert small("table7", ["stsben", "EmotionClassification"]).tasks == ("EmotionClassification", "STSBenchmark")
    with pytest.raises(ValueError, match="table10 has no task 'BIOSSES'"):
        small("table10", ["BIOSSES"])
    with pytest.raises(ValueError, match=r"has no task 'Emotoin'\. Did you mean Emotion\?"):
        small("table5", ["Emotoin"])
    with pytest.raises(ValueError, match="Give --data DIR, or --tasks NAME"):
        small("table5", ())


def test_local_data_say_how_they_were_cut(tmp_path):
    for name, said in (("biosses", {"hub": "mteb/biosses-sts", "cut": "every tenth pair"}), ("sts12", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "score": 1.0}\n')
        (tmp_path / name / "manifest.json").write_text(json.dumps(said))
    cuts, absent = local_tasks(["BIOSSES", "STS12", "STS13"], tmp_path)
    assert cuts == {"BIOSSES": "every tenth pair", "STS12": "not said"}
    assert "nothing that stands for mteb/sts13-sts" in absent["STS13"]
    made = plan(find("table7"), "small", data=tmp_path)
    assert made.tasks == ("BIOSSES", "STS12")
    assert set(made.left_out) == set(TASKS) - {"BIOSSES", "STS12"}
    with pytest.raises(ValueError, match=r"lacks data.*sts13"):
        plan(find("table7"), "small", data=tmp_path, tasks=["STS13", "STS12"])
    said = view(run(made, tmp_path, evaluate=Fake())).differs
    assert "Data of BIOSSES: every tenth pair." in said
    assert any(line.startswith("Tasks: 2 of 19; without EmotionClassification") for line in said)


# --- results


def test_a_result_is_saved_whole_and_comes_back(tmp_path):
    fake = Fake()
    made = small("table8", seed=3, batch_size=8)
    seen: list[Score] = []
    result = run(made, tmp_path, evaluate=fake, done=seen.append)
    assert len(seen) == made.parts == 6 * 2 * 3
    (model, tasks, settings, options) = fake.calls[0]
    assert (model, tasks) == (None, made.tasks)
    assert set(settings) == {column.setting for column in made.columns}
    assert (options["seed"], options["batch_size"], options["quantize"]) == (3, 8, None)
    save(result, tmp_path / "new" / "table8-small.json")
    again = load(tmp_path / "new" / "table8-small.json")
    assert again == result
    assert markdown(again) == markdown(result)
    saved = json.loads((tmp_path / "new" / "table8-small.json").read_text())
    assert saved["plan"]["columns"][4]["setting"]["router"] == UNIFIED
    (tmp_path / "bad.json").write_text('{"schema": 9}')
    with pytest.raises(ValueError, match=r"bad.json is no result of usmoe reproduce: It has schema 9"):
        load(tmp_path / "bad.json")


def test_a_column_gets_the_scores_of_its_own_setting(tmp_path):
    made = small("table10", ["Emotion"])
    fake = Fake()
    result = run(made, tmp_path, evaluate=fake)
    for column, (score,) in zip(made.columns, result.scores, strict=True):
        assert score == fake.score("EmotionClassification", column.setting)


# --- side by side


def test_a_row_of_ours_stands_above_the_papers(tmp_path):
    seen = view(run(small("table7"), tmp_path, evaluate=Fake()))
    assert seen.head[2:] == ("Router", "TC", "EC", "MoEE", "USMoE hidden", "USMoE MoEE")
    ours, paper = seen.rows[2:4]
    assert ours[:2] == ("Emotion, PromptEOL", "novelist")
    assert ours[3] == "30.9 ±1.0 (0.4)"
    assert paper == ("  paper", "OLMoE-1B-7B", "27.6", "49.9", "49.0", "44.5", "54.8", "54.8")
    assert len(seen.rows) == 3 * 2 * 2
    text = markdown(run(small("table7"), tmp_path, evaluate=Fake()))
    assert "| paper | OLMoE-1B-7B | 27.6 | 49.9 |" in text
    assert "cannot come from the same" in text
    assert "Model: novelist (ships with usmoe, trained on novels) in place of OLMoE-1B-7B." in text


def test_the_papers_means_are_of_the_tasks_that_we_have(tmp_path):
    """With all of a type, as printed; with some, the mean of the same in Table 7; the average is one of types."""
    found = lines(run(small("table5", model="allenai/OLMoE-1B-7B-0924"), tmp_path, evaluate=Fake()))
    paper = {line.row: line.cells for line in found if line.printed}
    assert paper["Classification"]["TC"].value == pytest.approx(49.9)
    assert paper["STS"]["TC"].value == pytest.approx((61.8 + 53.8) / 2)
    assert paper[AVERAGE]["TC"].value == pytest.approx((49.9 + (61.8 + 53.8) / 2) / 2)
    whole = run(plan(find("table5"), "small", tasks=tuple(TASKS)), tmp_path, evaluate=Fake())
    paper = {(line.whose, line.row): line.cells for line in lines(whole) if line.printed}
    assert len(paper) == 3 * 7
    assert paper["Qwen1.5-MoE-A2.7B", "Classification"]["EC"].value == 35.2
    assert paper["Qwen1.5-MoE-A2.7B", AVERAGE]["EC"].value == 39.6
    assert "copied" not in " ".join(view(whole).notes)
    assert any("equal those of Medrxiv and 20Groups" in note for note in view(whole).notes)


def test_bands_of_a_mean_add_up_in_squares():
    one = mean([Cell(value=40, deviation=3, low=37, high=44), Cell(value=60, deviation=4, low=56, high=63)])
    assert (one.value, one.deviation, one.low, one.high) == (50, 2.5, 47.5, 52.5)
    assert mean([Cell(value=40, low=37, high=44), Cell(value=60)]).low is None


def test_no_ranking_is_read_where_bands_overlap():
    def line(**cells) -> Line:
        return Line(row="STS", prompt="None", whose="shipped", printed=False, cells=cells)

    best = Cell(value=50, low=48, high=52)
    assert line(a=best, b=Cell(value=47, low=45, high=48.1)).rivals == ("b",)
    assert line(a=Cell(value=47, low=45, high=47.9), b=best).rivals == ()
    assert line(a=best, b=Cell(value=10)).rivals == ("b",)
    assert line(a=Cell(value=50), b=Cell(value=47, low=45, high=47.9)).rivals == ("b",)


def test_the_sentence_on_ranking_follows_the_bands(tmp_path):
    wide, clear = (run(small("table11", ["Emotion"]), tmp_path, evaluate=Fake(half)) for half in (0.9, 1e-6))
    assert any(word.startswith("No ranking can be read") for word in view(wide).says)
    assert all("~" in word for word in view(wide).rows[0][2:])
    assert not view(wide).bold
    made = small("table10", ["Emotion"])
    seen = view(run(made, tmp_path, evaluate=Fake(1e-6)))
    assert any("In every row the band of the best figure is clear" in word for word in seen.says)
    assert seen.bold == ((0, 7),)
    assert "~" not in "".join(seen.rows[0])
    assert any("~" in word for word in view(clear).rows[0])


def test_figure_8_shows_the_spread_over_tasks(tmp_path):
    found = lines(run(small("figure8"), tmp_path, evaluate=Fake()))
    ours = {(line.row, line.prompt): line.cells for line in found if not line.printed}
    values = [100 * Fake().score(task, small("figure8").columns[1].setting).score for task in small("figure8").tasks]
    assert ours[SPREAD, "None"]["TC"].value == pytest.approx(statistics.stdev(values))
    paper = {line.whose: line.cells for line in found if line.printed and (line.row, line.prompt) == (SPREAD, "Prompt")}
    assert paper["OLMoE-1B-7B"]["TC"].value == pytest.approx(statistics.stdev([49.9, 61.8, 53.8]))


def test_pictures_are_drawn_of_figures_alone(tmp_path):
    for name in ("figure3", "figure8"):
        plot(run(small(name), tmp_path, evaluate=Fake()), tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="table5 is a table in the paper"):
        plot(run(small("table5"), tmp_path, evaluate=Fake()), tmp_path / "x.png")


# --- the command


@pytest.fixture
def command(monkeypatch, capsys):
    """command("table5", ...) -> (exit status, stdout, stderr), with a fake in place of evaluation."""
    import typer

    import usmoe.evaluate.run
    from usmoe.cli.reproduce import reproduce

    fake = Fake()
    monkeypatch.setattr(usmoe.evaluate.run, "evaluate", fake)
    monkeypatch.setenv("COLUMNS", "120")

    def said(*words: str) -> tuple[int, str, str]:
        app = typer.Typer()
        app.command()(reproduce)
        monkeypatch.setattr(sys, "argv", ["reproduce", *words])
        try:
            status = app(standalone_mode=False) or 0
        except (ValueError, typer.TyperException) as error:
            status, text = 1, str(error)
            sys.stderr.write(text)
        out, err = capsys.readouterr()
        return status, out, err

    said.fake = fake  # pyright: ignore[reportFunctionMemberAccess]
    return said


def test_list_begins_each_line_with_the_name_as_typed(command, tmp_path):
    status, out, _ = command("--list", "--results", str(tmp_path))
    printed = out.splitlines()
    assert status == 0
    assert len(printed) == len(EXPERIMENTS)
    for name, line in zip(EXPERIMENTS, printed, strict=True):
        assert line.startswith(f"{name}  ")
        assert ("not built yet" in line) != EXPERIMENTS[name].built
    (tmp_path / "table6-small.json").write_text("{}")
    status, out, _ = command("--list", "--results", str(tmp_path), "--json")
    assert {one["name"]: one["run"] for one in json.loads(out)}["table6"][-1:] == ["small"]


def test_a_run_is_saved_shown_again_and_another_stands_beside_it(command, tmp_path):
    """With options a digest stands behind the name, so that a trial never takes that of the table as it is."""
    folder = tmp_path / "r"
    words = ("table6", "--tasks", "Emotion", "--results", str(folder))
    status, out, err = command(*words, "--markdown", str(tmp_path / "t.md"))
    assert status == 0, err
    assert "From the hub, where it is not on this machine yet: the data of 1 MTEB tasks." in err
    assert "OLMoE-1B-7B" in out
    page = (tmp_path / "t.md").read_text()
    assert page.startswith("## table6, small scale")
    assert "`usmoe reproduce table6 --scale small --tasks EmotionClassification`" in page
    status, again, err = command(*words)
    assert (status, again) == (0, out)
    assert "--force runs it again" in err
    assert len(command.fake.calls) == 1
    (first,) = folder.glob("table6*.json")
    assert re.fullmatch(r"table6-small-[0-9a-f]{8}\.json", first.name)

    other = ("table6", "--tasks", "BIOSSES", "--results", str(folder), "--json")
    for calls, words in ((2, other), (2, other), (3, (*other, "--force"))):
        status, out, err = command(*words)
        assert status == 0, err
        assert json.loads(out)["plan"]["tasks"] == ["BIOSSES"]
        assert len(command.fake.calls) == calls
    assert len(list(folder.glob("table6-small-*.json"))) == 2
    _, out, _ = command("--list", "--results", str(folder))
    (line,) = (line for line in out.splitlines() if line.startswith("table6 "))
    assert line.endswith("by task type (2 with options)")
    assert "small" not in _status(line) or (ROOT / "results" / "table6-small.json").is_file()

    whole = ("table6", "--scale", "paper", "--results", str(folder), "--json")
    assert command(*whole)[0] == 0
    assert [path.name for path in folder.glob("table6-paper*.json")] == ["table6-paper.json"]
    (folder / "table6-paper.json").write_text("{", encoding="utf-8")
    status, _, err = command(*whole)
    assert status == 1
    assert "table6-paper.json is no result of usmoe reproduce" in err
    assert (folder / "table6-paper.json").read_text() == "{"
    assert command(*whole, "--force")[0] == 0
    assert load(folder / "table6-paper.json").plan.tasks == tuple(TASKS)


def _status(line: str) -> str:
    return line[19:36]


def test_a_result_at_the_plain_name_is_shown_where_its_settings_are_asked_for(command, tmp_path):
    """As results were written before options had a digest."""
    made = small("table6", ("Emotion",))
    save(run(made, tmp_path, evaluate=Fake()), tmp_path / "table6-small.json")
    status, _, err = command("table6", "--tasks", "Emotion", "--results", str(tmp_path))
    assert (status, len(command.fake.calls)) == (0, 0)
    assert "Shown from" in err
    assert [path.name for path in tmp_path.glob("*.json")] == ["table6-small.json"]


def test_a_file_that_is_there_is_refused_by_the_flag_that_names_it(command, tmp_path):
    (tmp_path / "f").write_text("mine")
    for name, flag in (("figure3", "--plot"), ("table5", "--markdown")):
        _, _, err = command(name, "--tasks", "Emotion", flag, str(tmp_path / "f"))
        assert f"Give --force to overwrite it, or another {flag}." in err


def test_what_cannot_be_run_is_refused_in_a_sentence(command, tmp_path):
    assert "figure12 --part a is not built yet" in command("figure12", "--part", "a")[2]
    assert "Did you mean table5" in command("tabel5")[2]
    assert "Give the name of a table or figure" in command()[2]
    assert "without a picture" in command("table5", "--tasks", "Emotion", "--plot", str(tmp_path / "x.png"))[2]


def test_plans_are_frozen_values():
    made = small("table5")
    assert made == type(made).from_dict(json.loads(json.dumps(made.to_dict())))
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.seed = 1  # pyright: ignore[reportAttributeAccessIssue]
