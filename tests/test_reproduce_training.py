"""Experiments on training: planned, trained, measured, killed and gone on with."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import usmoe.train.loop
from planned_training import planned
from tiny_scale import shrink, write_texts
from usmoe.reproduce import Asked, find, kind_of, load, paper_figures, save
from usmoe.reproduce.training import SMALL, digest, small_run
from usmoe.reproduce.training.measure import servings
from usmoe.reproduce.training.plan import Plan, announce, plan
from usmoe.reproduce.training.render import views
from usmoe.reproduce.training.run import Result, run
from usmoe.reproduce.training.study import PAPER_CORPORA
from usmoe.routing import parse_router
from usmoe.train.config import TrainConfig
from usmoe.train.methods import METHODS, method
from usmoe.train.presets import PRESETS

ROOT = Path(__file__).parent


@pytest.fixture
def tiny(monkeypatch, tmp_path) -> Path:
    """The tiny scale, and its folder of texts."""
    shrink(monkeypatch)
    return write_texts(tmp_path / "data")


# --- methods, presets, and names of runs


@pytest.mark.parametrize("name", METHODS)
def test_a_method_makes_a_configuration_of_any_other(name):
    config = METHODS[name].apply(SMALL)
    assert parse_router(config.model.router)
    for other in ("smoe_dropout", "stablemoe", "remoe", "usmoe_threshold"):
        assert METHODS[name].apply(METHODS[other].apply(SMALL)) == config
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_method_takes_another_k_unless_it_grows_its_own():
    assert METHODS["usmoe"].apply(SMALL, 4).model.router == "usmoe(k=4, alpha=0.5)"
    assert METHODS["token_choice"].apply(SMALL, 1).balance == 0.01
    with pytest.raises(ValueError, match="SMoE-DR grows its k from step to step, and takes no k=4"):
        METHODS["smoe_dropout"].apply(SMALL, 4)
    with pytest.raises(ValueError, match=r"no method 'usmo'\. Did you mean usmoe"):
        method("usmo")


def test_presets_are_the_papers_table_15():
    ours = {"enwik8": "enwik8", "text8": "text8", "WikiText-103": "wikitext103", "One Billion Word": "lm1b"}
    for row in paper_figures("table15").rows:
        config = PRESETS[ours[str(row.dataset)]]
        printed = (row.values["Input length"], row.values["Batch size"], row.values["Lr"], row.values["Iterations"])
        assert (config.segment, config.batch, config.lr, config.steps) == printed
    assert PRESETS["lm1b-large"].model.layers == 12
    assert set(PAPER_CORPORA) < set(PRESETS)


def test_a_digest_is_of_what_differs_from_the_defaults():
    """A field that is added later, at its default, leaves the folder of a run where it was."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Later(TrainConfig):
        added: int = 7

    fields = {field.name: getattr(SMALL, field.name) for field in dataclasses.fields(SMALL)}
    assert digest(Later(**fields)) == digest(SMALL)
    assert digest(Later(**fields, added=8)) != digest(SMALL)
    assert digest(SMALL.replace(log_every=1, checkpoint_every=7)) == digest(SMALL)
    assert digest(SMALL.replace(model__d_ff=1)) != digest(SMALL)
    assert digest(SMALL.replace(evaluation__tokens=None)) != digest(SMALL)


def test_tables_share_their_models():
    assert small_run("novels", "usmoe", 1).name in {one.name for one in planned("table14", steps=None).runs}
    two, fourteen, twelve = ({one.name for one in planned(name).runs} for name in ("table2", "table14", "table12"))
    assert two < fourteen
    assert not twelve & fourteen
    assert {one.config.steps for one in planned("table12", steps=None).runs} == {1000}


# --- plans


def test_rows_texts_seeds_and_routers_of_ones_own():
    made = planned(
        "table14",
        rows=("remoe", "usmoe"),
        corpora=("novels",),
        routers=("usmoe(k=2, alpha=0.3)",),
        seed=3,
        seeds=1,
        steps=50,
    )
    assert [row.name for row in made.rows[:2]] == ["usmoe", "remoe"]
    assert re.fullmatch(r"usmoe-k-2-alpha-0\.3-[0-9a-f]{8}", made.rows[2].name)
    own = made.runs[2]
    assert (own.config.model.router, own.config.balance) == ("usmoe(k=2, alpha=0.3)", 0)
    assert {(one.corpus, one.config.seed, one.config.steps, one.config.warmup) for one in made.runs} == {
        ("novels", 3, 50, 5)
    }
    assert made.left_out == {"wiki2016": "not asked for"}
    assert Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert announce(made).startswith("3 models (3 rows, 1 text, 1 seed), 50 steps each (0.05 M tokens of novels)")


def test_the_paper_scale_is_the_presets():
    made = planned("table12", scale="paper", dtype="bfloat16")
    assert made.corpora == ("wikitext103", "lm1b")
    (one,) = (one for one in made.runs if (one.corpus, one.row) == ("lm1b", "usmoe-k2"))
    assert one.config == PRESETS["lm1b-large"].replace(precision="bfloat16")
    assert made.measurement.evaluation.tokens is None


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(ValueError, match=r"table2 has no row 'usmo'\. Did you mean usmoe\?"):
        planned("table2", rows=("usmo",))
    with pytest.raises(ValueError, match=r"table12 has no corpus 'wiki2016'"):
        planned("table12", corpora=("wiki2016",))
    with pytest.raises(ValueError, match="--tasks means nothing to table2: pre-training"):
        planned("table2", tasks=("sst2",))
    with pytest.raises(ValueError, match="--dtype float16 is no precision of training"):
        planned("table2", dtype="float16")


def test_routers_of_ones_own_are_checked_before_anything_is_trained():
    with pytest.raises(ValueError, match=r"'no_such.module:mine' cannot be imported"):
        planned("table2", routers=("no_such.module:mine",))
    with pytest.raises(ValueError, match=r"--router usmoe\(k=17\): A budget of k=17 .* impossible with 16 experts"):
        planned("table2", routers=("usmoe(k=17)",))
    with pytest.raises(ValueError, match=r"--router usmoe: The number of experts per token is not given"):
        planned("table2", routers=("usmoe",))
    with pytest.raises(ValueError, match=r"--router usmoe\(alpha=0.3,k=2\) is the router of the row .*Give it once"):
        planned("table2", routers=("usmoe(k=2, alpha=0.3)", "usmoe(alpha=0.3,k=2)"))


def test_routers_of_one_slug_are_rows_of_their_own():
    routers = ("usmoe(pool=threshold, threshold=0.05)", "usmoe(pool=threshold, threshold=-0.05)")
    made = planned("table2", rows=("usmoe",), routers=routers, corpora=("novels",), seeds=1)
    assert len({row.name for row in made.rows}) == len({one.row for one in made.runs}) == 3


def test_a_router_whose_source_changed_is_another_row(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "edited_router.py").write_text("def mine(logits, valid=None, **given): ...\n")
    first, again = (planned("table2", routers=("edited_router:mine",)) for _ in range(2))
    assert first.runs == again.runs
    (tmp_path / "edited_router.py").write_text("def mine(logits, valid=None, **given): return None\n")
    changed = planned("table2", routers=("edited_router:mine",))
    assert changed.basis() != first.basis()
    same, other = ({one.name for one in made.runs if one.row == made.rows[-1].name} for made in (first, changed))
    assert not same & other


def test_a_class_of_ones_own_is_told_by_its_source_too(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    lines = ("from usmoe import USMoE", "class Mine(USMoE): ...", "mine = Mine(k=2)", "")
    (tmp_path / "own_class.py").write_text("\n".join(lines))
    first = planned("table2", routers=("own_class:mine",))
    (tmp_path / "own_class.py").write_text("\n".join((*lines, "CHANGED = True", "")))
    assert planned("table2", routers=("own_class:mine",)).basis() != first.basis()


def test_without_texts_nothing_is_planned(tmp_path):
    with pytest.raises(ValueError, match=r"There is no text to train on.*give --data DIR"):
        plan(find("table12"), Asked())
    made = plan(find("table2"), Asked(data=write_texts(tmp_path / "data")))
    assert (made.corpora, made.left_out) == (("novels",), {"wiki2016": "not in the folder of data"})
    with pytest.raises(ValueError, match="enwik8"):
        plan(find("table2"), Asked(data=tmp_path / "data", corpora=("novels", "wiki2016")))


def test_unified_methods_are_served_also_with_fewer_experts():
    named = {name: [one.name for one in servings(METHODS[name].apply(SMALL))] for name in METHODS}
    assert named["usmoe"] == ["threshold", "threshold k=1.5 calibrated", "prefix"]
    assert named["usmoe-1.5"] == ["threshold", "prefix"]
    assert named["expert_choice_sigmoid"] == ["threshold"]


# --- running


def test_a_table_is_trained_measured_saved_and_shared(tiny, tmp_path, monkeypatch):
    made = plan(find("table14"), Asked(data=tiny, rows=("usmoe", "smoe_dropout", "usmoe_time_step"), seeds=1))
    words: list[str] = []
    result = run(made, tmp_path / "results", done=words.append)
    assert len(words) == made.parts == 3 * 3
    assert [(one.row, one.text) for one in result.rows[:2]] == [("usmoe", "clean"), ("usmoe", "corrupt")]
    save(result, tmp_path / "results" / "table14-small.json")
    assert load(tmp_path / "results" / "table14-small.json") == result

    clean, corrupt = result.rows[:2]
    assert sum(clean.figures.forced.counts) == 599
    assert clean.figures.served["prefix"].sums == ()
    assert clean.figures.tokens == corrupt.figures.tokens == 599
    assert (clean.corrupted, corrupt.corrupted > 0) == (0, True)
    assert corrupt.figures.forced.nats != clean.figures.forced.nats
    assert set(clean.figures.served) == {"threshold", "threshold k=1.5 calibrated", "prefix"}
    assert (clean.figures.served["threshold k=1.5 calibrated"].experts or 2.0) < 1.9
    released, dropout = result.rows[2], result.rows[4]
    assert dropout.figures.forced.experts == 16
    assert dropout.at_two is not None
    assert dropout.at_two.forced.experts == 2
    assert released.figures.alone is not None
    assert released.figures.alone.nats != released.figures.forced.nats

    monkeypatch.setattr(usmoe.train.loop, "train", refuse)  # Table 2 has one of them
    other = run(plan(find("table2"), Asked(data=tiny, rows=("usmoe",), seeds=1)), tmp_path / "results")
    assert other.rows == result.rows[:2]


def refuse(*args, **given):
    raise AssertionError("It is there already.")


def test_a_router_of_ones_own_is_a_row_beside_the_others(tiny, tmp_path):
    made = plan(find("table2"), Asked(data=tiny, rows=("token_choice",), routers=("tiny_scale:first_two",), seeds=1))
    result = run(made, tmp_path)
    mine = result.rows[2]
    assert re.fullmatch(r"tiny_scale-first_two-[0-9a-f]{8}", mine.row)
    assert (mine.figures.forced.experts, mine.figures.forced.dropped) == (2, 0)
    assert mine.figures.served == {}
    assert mine.figures.honest.positions == 10  # it promises nothing, so it is taken to look ahead
    assert mine.figures.honest.nats == pytest.approx(mine.figures.forced.nats, abs=1e-5)
    assert views(result)[0].rows[1][0] == "tiny_scale:first_two"


def test_figures_that_are_kept_are_read_unless_asked_anew(tiny, tmp_path):
    made = plan(find("figure12", "b"), Asked(data=tiny, rows=("token_choice",), seeds=1))
    first = run(made, tmp_path)
    (kept,) = (tmp_path / "runs").glob("*/evaluation-clean-*.json")
    said = json.loads(kept.read_text())
    said["figures"]["forced"]["nats"] = 9.0
    kept.write_text(json.dumps(said))
    assert run(made, tmp_path).rows[0].figures.forced.nats == 9
    again = run(made, tmp_path, anew=True).rows[0].figures
    assert again.forced.nats == first.rows[0].figures.forced.nats
    assert json.loads(kept.read_text())["figures"]["forced"]["nats"] == again.forced.nats


def test_a_model_of_another_text_is_refused(tiny, tmp_path):
    made = plan(find("figure12", "b"), Asked(data=tiny, rows=("token_choice",), seeds=1))
    results = tmp_path / "results"
    first = run(made, results)
    moved = shutil.copytree(tiny, tmp_path / "moved")
    assert run(dataclasses.replace(made, data=str(moved)), results).rows == first.rows
    train = moved / "novels" / "train.txt"
    train.write_text(train.read_text() + "One more line.\n")
    words = r"learned from another text \(\w{12}\) than novels holds now in .*moved \(\w{12}\)\. Put that text back"
    with pytest.raises(ValueError, match=words):
        run(dataclasses.replace(made, data=str(moved)), results)

    (config,) = results.glob("runs/*/config.json")
    (prepared,) = (path.parent for path in results.glob("corpora/*/train.npy") if _digest(config) in str(path))
    said = config.read_text()
    config.write_text(said.replace(_digest(config), "0" * 12))  # the same text, prepared by another usmoe
    shutil.copytree(prepared, prepared.with_name("novels-" + "0" * 12))
    assert run(made, results).rows == first.rows
    config.write_text(json.dumps({name: one for name, one in json.loads(said).items() if name != "text"}))
    assert run(made, results).rows == first.rows


def _digest(config: Path) -> str:
    return json.loads(config.read_text())["text"]


def test_a_figure_has_its_curves_and_is_drawn(tiny, tmp_path):
    made = plan(find("figure6"), Asked(data=tiny, rows=("expert_choice_sigmoid",), seeds=2))
    result = run(made, tmp_path)
    assert set(result.curves) == {one.name for one in made.runs}
    curve = result.curves[made.runs[0].name]
    assert curve["step"] == (2, 4, 6)
    assert len(curve["bits"]) == len(curve["dropped"]) == 3
    assert 0 < curve["dropped"][-1] < 1
    assert load_again(result, tmp_path) == result
    kind = kind_of(find("figure6"))
    kind.plot(result, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    view = kind.views(result, wide=True)[2]
    assert view.head[-3:] == ("dropped, 10 % of steps", "dropped, 50 % of steps", "dropped, 100 % of steps")
    last = sum(result.curves[one.name]["dropped"][-1] for one in made.runs) / 2
    assert view.rows[0][-1] == f"{100 * last:.1f} %"
    with pytest.raises(ValueError, match=r"table14 is a table in the paper.*drawn are figure6"):
        kind.refuse_picture(find("table14"))


def load_again(result: Result, folder: Path) -> Result:
    save(result, folder / "again.json")
    return load(folder / "again.json")


@pytest.mark.slow
def test_a_reproduction_that_was_killed_goes_on_to_the_same_figures(tmp_path):
    data = write_texts(tmp_path / "data")
    words = ["table2", "--data", str(data), "--row", "usmoe", "--row", "token_choice", "--seeds", "1", "--steps", "60"]
    command = [sys.executable, str(ROOT / "tiny_scale.py"), *words, "--offline", "--json", "--results"]
    whole = subprocess.run([*command, str(tmp_path / "whole")], capture_output=True, text=True, check=True)
    killed = subprocess.Popen([*command, str(tmp_path / "r")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: any((tmp_path / "r" / "runs").glob("novels-usmoe-*/checkpoint.pt")), killed)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    assert not list((tmp_path / "r").glob("table2-small*.json"))
    again = subprocess.run([*command, str(tmp_path / "r")], capture_output=True, text=True, check=True)
    one, other = (json.loads(said.stdout)["rows"] for said in (whole, again))
    assert [likelihoods(row) for row in one] == [likelihoods(row) for row in other]
    shown = subprocess.run([*command, str(tmp_path / "r")], capture_output=True, text=True, check=True)
    assert shown.stdout == again.stdout
    assert "--force runs it again" in shown.stderr


def likelihoods(row: dict) -> tuple:
    figures = row["figures"]
    return row["row"], row["text"], figures["forced"]["nats"], figures["forced"]["sums"], figures["honest"]


def wait_for(there, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert process.poll() is None, "the command ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.02)
