"""Experiments on training: what can be told apart, and ours beside the paper's figures."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from planned_training import planned
from tiny_scale import TINY
from usmoe.cli.views import print_view
from usmoe.data.units import Unit
from usmoe.report.estimate import Honest
from usmoe.reproduce import find, markdown, paper_figures, save
from usmoe.reproduce.paired import Sample, difference, over_seeds, ranked, student
from usmoe.reproduce.training import CORPORA, SMALL
from usmoe.reproduce.training.measure import Measured
from usmoe.reproduce.training.plan import Plan
from usmoe.reproduce.training.render import views
from usmoe.reproduce.training.run import Result
from usmoe.reproduce.training.study import STUDIES
from usmoe.train.figures import Figures, Serving
from usmoe.train.figures import Measured as Reading

ROOT = Path(__file__).parent


# --- what can be told apart, by hand


def test_a_difference_is_clear_of_its_text_and_of_its_seeds():
    best = Sample(values=(1.0, 1.0), sums=(1.0, 1.0, 1.0, 1.0))
    above = Sample(values=(1.1, 1.1), sums=(1.1, 1.1, 1.1, 1.1))
    counts = [1, 1, 1, 1]
    assert difference(above, best, counts, 0.0, 2).clear
    gap = difference(above, best, counts, 0.02, 2)  # 4.303 * 0.02 * sqrt(1/2 + 1/2)
    assert gap.half == pytest.approx(4.303 * 0.02, rel=1e-3)
    assert gap.clear
    assert not difference(above, best, counts, 0.024, 2).clear
    uneven = Sample(values=(1.1, 1.1), sums=(0.8, 1.4, 0.8, 1.4))
    assert not difference(uneven, best, counts, 0.0, 2).clear
    guessed = Sample(values=(1.1, 1.1), sums=above.sums, halves=(0.2, 0.2))
    assert difference(guessed, best, counts, 0.0, 2).half == pytest.approx(0.2)  # one sample, shared by seeds
    assert not difference(Sample(values=(1.1,), sums=(4.4,)), Sample(values=(1.0,), sums=(4.0,)), [4], 0, 0).clear


def test_deviations_over_seeds_are_pooled_over_rows():
    rows = {
        "a": Sample(values=(1.0, 1.2), sums=()),  # variance 0.02
        "b": Sample(values=(2.0, 2.0), sums=()),
        "c": Sample(values=(3.0,), sums=()),
    }
    deviation, freedom = over_seeds(rows)
    assert (deviation, freedom) == (pytest.approx(0.1), 2)
    assert over_seeds({"c": rows["c"]}) == (0.0, 0)


@pytest.mark.parametrize(
    ("freedom", "tail", "printed"),
    [
        *((1, 0.025, 12.706), (2, 0.025, 4.303), (3, 0.025, 3.182), (11, 0.025, 2.201), (1000, 0.025, 1.962)),
        *((10, 0.005, 3.169), (4, 0.0025, 5.598), (1, 0.0005, 636.619)),
    ],
)
def test_students_t_is_as_printed_in_tables(freedom, tail, printed):
    assert student(freedom, tail) == pytest.approx(printed, abs=6e-4)


def test_the_lowest_and_those_that_cannot_be_told_from_it():
    def flat(value: float) -> Sample:
        return Sample(values=(value,), sums=(value, value))

    rows = {"a": flat(2.0), "b": flat(1.0), "c": Sample(values=(1.01,), sums=(0.9, 1.12))}
    assert ranked(rows, [1, 1]) == ("b", ("c",))


def test_comparisons_with_the_lowest_are_right_together():
    """Of three rows the band is that of 1 - 0.025/2: t of 3 degrees is 4.177 in place of 3.182."""

    def row(value: float) -> Sample:
        return Sample(values=(value - 0.01, value + 0.01), sums=(value, value))

    rows = {"a": row(1.0), "b": row(1.05), "c": row(2.0)}  # deviation 0.01414: 0.0450 alone, 0.0591 together
    deviation, freedom = over_seeds(rows)
    assert difference(rows["b"], rows["a"], [1, 1], deviation, freedom).clear
    assert difference(rows["b"], rows["a"], [1, 1], deviation, freedom, 2).half == pytest.approx(0.05907, abs=1e-4)
    assert ranked(rows, [1, 1]) == ("a", ("b",))
    guessed = {name: dataclasses.replace(one, halves=(0.1, 0.1)) for name, one in rows.items()}
    wide = difference(guessed["b"], guessed["a"], [1, 1], 0, 0, 2).half  # 2.2414 / 1.9600 of the 95 % intervals
    assert wide == pytest.approx(2**0.5 * 0.1 * 2.2414 / 1.96, rel=1e-4)


# --- side by side, of made-up figures


def made_up(plan: Plan, nats, unit: Unit = "character") -> Result:
    """nats(row, seed, text) -> of the teacher-forced figure."""
    rows = []
    for one in plan.runs:
        for text in plan.texts:
            value = nats(one.row, one.config.seed, text)
            reading = Reading(
                nats=value,
                experts=2.0,
                dropped=0.03,
                load_cv=0.5,
                flops=1e6,
                relative=1.0,
                seconds=1.0,
                sums=(10 * value, 10 * value),
                counts=(10, 10),
            )
            served = dataclasses.replace(reading, nats=value + 0.009, experts=1.9)
            figures = Figures(
                routers=(one.config.model.router,),
                step=90,
                setting=plan.measurement.evaluation,
                positions=200,
                seed=0,
                tokens=20,
                unit=unit,
                tokens_per_unit=1.0,
                forced=reading,
                honest=Honest(nats=value + 0.01, interval=0.001, positions=200),
                reset=reading,
                alone=None,
                served={"threshold": served} if one.row == "usmoe" else {},
            )
            rows.append(
                Measured(
                    corpus=one.corpus,
                    row=one.row,
                    seed=one.config.seed,
                    text=text,
                    figures=figures,
                    at_two=None,
                    corrupted=3 if text == "corrupt" else 0,
                    steps=100,
                    training_seconds=60.0,
                )
            )
    return Result(plan=plan, rows=tuple(rows))


ORDER = {"usmoe": 0.70, "usmoe-1.5": 0.72, "token_choice": 0.74, "expert_choice_sigmoid": 0.7001}


def test_ours_stands_beside_the_papers_with_what_can_be_told_apart():
    result = made_up(planned("table2", corpora=("novels",)), lambda row, seed, text: ORDER[row] + seed * 0.001)
    clean, otherwise, corrupt, _, routing = views(result)
    assert clean.head[:3] == ("method", "teacher-forced", "honest")
    assert clean.head[3:] == (
        *("paper, Enwik8\nbits", "paper, Text8\nbits"),
        *("paper, WikiText-103\nperplexity", "paper, lm1b\nperplexity"),
    )
    first = clean.rows[0]
    assert first[1:3] == ("1.011 (0.001)~", "1.025 ±0.001 (0.001)~")
    assert first[3:] == ("1.18", "1.20", "29.20", "56.90")
    assert otherwise.head == ("method", "threshold", "memory reset")
    assert otherwise.rows[0][1:] == ("1.024 (0.001) @1.90", "1.011 (0.001)")
    assert otherwise.rows[1][1:] == ("-", "1.039 (0.001)")
    assert "Threshold: every pair" in otherwise.says[0]
    assert clean.rows[1][1] == "1.039 (0.001)"
    assert corrupt.rows[0][-4:] == ("1.75", "1.83", "38.45", "68.43")
    said = " ".join(clean.says)
    assert "By the teacher-forced figure no ranking can be read among USMoE k=2 (lowest) and EC sigmoid" in said
    assert "No difference between the two means anything" in said
    assert "Student's t" in said
    assert "Bands are of the difference to the lowest row, 95 % for all rows together (Bonferroni)" in said
    assert "4 % of the words of the test split are AAA: 3." in " ".join(corrupt.says)
    assert routing.rows[0][1:] == ("2.00", "3.0", "0.50", "1.00", "100.0", "100", "90", "1.0")
    assert any(line.startswith("Text: novels, byte by byte") for line in routing.differs)
    assert any("learning rate 0.002" in line for line in routing.differs)
    assert any(line.startswith("SMoE: The k best logits") for line in routing.about)
    assert len(routing.notes) == len(paper_figures("table2").notes)


def test_a_clear_lowest_is_bold_and_one_seed_says_what_it_lacks():
    alone = planned("table2", corpora=("novels",), rows=("usmoe", "token_choice"), seeds=1)
    view = views(made_up(alone, lambda row, seed, text: ORDER[row]))[0]
    assert view.bold == ((0, 1), (0, 2))
    assert "~" not in " ".join(" ".join(row) for row in view.rows)
    assert "no part for seeds, since there is one" in " ".join(view.says)
    assert "USMoE k=2 is lowest, clear of the others" in " ".join(view.says)
    assert "(" not in view.rows[0][1]


def test_table_12_compares_rows_of_one_k():
    def nats(row: str, seed: int, text: str) -> float:
        return 0.7 + 0.1 * row.startswith("usmoe") - 0.05 * float(row.rpartition("k")[2])

    view = views(made_up(planned("table12"), nats))[0]
    assert [row[0] for row in view.rows[:3]] == ["SMoE, k=1", "EC sigmoid, k=1", "USMoE, k=1"]
    assert view.rows[2][-2:] == ("25.48", "56.90")
    tied = [row[0] for row in view.rows if "~" in row[1]]
    assert tied == [f"{name}, k={k}" for k in (1, 2, 4, 8) for name in ("SMoE", "EC sigmoid")]
    assert "Rows of one k are compared" in view.says[-1]


def test_words_are_stated_by_their_perplexity_beside_the_same_data_of_the_paper():
    made = planned("table2", scale="paper", corpora=("wikitext103",), rows=("usmoe", "token_choice"), seeds=1)
    clean, _, corrupt, _, last = views(made_up(made, lambda row, seed, text: 3.4 + ORDER[row] / 10, "word"))
    assert clean.head[-1] == "paper, WikiText-103"
    assert clean.rows[0][1] == "32.14"
    assert (clean.rows[0][-1], corrupt.rows[0][-1]) == ("29.20", "38.45")
    assert "Perplexity a word" in clean.says[0]
    assert not any(line.startswith(("Text:", "Model:", "Steps:")) for line in last.differs)


def test_markdown_has_a_section_for_each_table():
    result = made_up(planned("table2", corpora=("novels",)), lambda row, seed, text: ORDER[row])
    text = markdown(result)
    assert text.count("## table2, small scale, novels") == 5
    assert text.count("`usmoe reproduce table2 --scale small --corpus novels`") == 1
    assert "| paper, Enwik8, bits |" in text
    assert "\n\nThe methods:\n\n- SMoE: " in text


def test_at_eighty_columns_heads_break_at_spaces_and_figures_do_not(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    result = made_up(planned("table2", corpora=("novels",)), lambda row, seed, text: ORDER[row])
    for view in views(result):
        print_view(view)
        said = capsys.readouterr().out
        table = said.partition("\n")[2].split("\n\n")[0]
        assert max(map(len, said.splitlines())) <= 80
        words = set(table.split())
        assert all(set(word.split()) <= words for row in (view.head, *view.rows) for word in row), table


def test_every_row_of_the_paper_has_ours():
    for name in ("table2", "table12", "table14"):
        printed = {column for row in paper_figures(name).rows for column in row.values}
        assert {row.paper for row in STUDIES[name].rows} - {None} == printed
    assert CORPORA["novels"].source == "novels"
    assert TINY.model.num_experts == SMALL.model.num_experts
    assert Serving(how="prefix").name == "prefix"


def test_the_page_of_results_has_every_table_and_draws_figures(tmp_path):
    sys.path.insert(0, str(ROOT.parent / "scripts"))
    try:
        from render_training import page  # pyright: ignore[reportMissingImports]
    finally:
        sys.path.pop(0)
    for name, part in (("table2", None), ("figure12", "b")):
        made = planned(f"{name} --part {part}" if part else name, corpora=("novels",), seeds=1)
        result = made_up(made, lambda row, seed, text: 0.7)
        if part:
            curve = {"step": (2, 4), "dropped": (0.1, 0.2)}
            result = dataclasses.replace(result, curves={one.name: curve for one in made.runs})
        save(result, find(name, part).path(tmp_path, "small"))
    trial = made_up(planned("table2", corpora=("novels",), seeds=1, steps=7), lambda row, seed, text: 0.7)
    save(trial, tmp_path / "table2-small-0123abcd.json")
    text = page(tmp_path, tmp_path)
    assert text.index("## table2, small scale") < text.index("## figure12 --part b, small scale")
    assert text.index("--corpus novels --seeds 1`") < text.index("--corpus novels --seeds 1 --steps 7`")
    assert "![dropped tokens in pre-training](figure12-b-small.png)" in text
    assert (tmp_path / "figure12-b-small.png").read_bytes().startswith(b"\x89PNG")
    assert "| dropped, 100 % of steps |" in text
