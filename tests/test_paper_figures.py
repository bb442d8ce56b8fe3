"""The paper's figures as data: complete, and what does not add up in them is noted."""

import math
import statistics

import pytest

from usmoe.reproduce import paper_figures
from usmoe.reproduce.embeddings.compare import AVERAGE
from usmoe.reproduce.embeddings.study import CHECKPOINTS, TASKS
from usmoe.reproduce.figures import recorded

MODELS = [one.paper for one in CHECKPOINTS.values()]
KINDS = {kind: sum(one == kind for one, _ in TASKS.values()) for kind, _ in TASKS.values()}


def cell(
    table: str, model: str | None, setting: str, kind: str | None, column: str, dataset: str | None = None
) -> float:
    (row,) = (
        row
        for row in paper_figures(table).rows
        if (row.model, row.task, row.dataset, row.setting) == (model, kind, dataset, setting)
    )
    return row.values[column]


def test_every_table_has_all_of_its_cells():
    cells = {name: sum(len(row.values) for row in paper_figures(name).rows) for name in recorded()}
    assert cells == {
        **{"table1": 15, "table2": 32, "table3": 44, "table4": 72, "table5": 105, "table6": 105},
        **{"table7": 190, "table8": 190, "table9": 190, "table10": 12, "table11": 18, "table12": 24},
        **{"table13": 35, "table14": 28, "table15": 16, "table16": 16},
        **{"figure3": 0, "figure4": 36, "figure7": 36, "figure8": 0},
    }
    for name in recorded():
        said = paper_figures(name)
        assert all(set(row.values) <= set(said.columns) for row in said.rows), name
        assert all(math.isfinite(value) for row in said.rows for value in row.values.values())
        assert said.name == name


@pytest.mark.parametrize(("table", "setting"), [("table5", "Prompt"), ("table6", "None")])
def test_means_by_type_are_those_of_the_data_sets(table, setting):
    """To the rounding of both: 0.05 of the mean and 0.05 of what it is taken of."""
    for model, details in zip(MODELS, ("table7", "table8", "table9"), strict=True):
        for column in paper_figures(table).columns:
            printed = [cell(table, model, setting, kind, column) for kind in KINDS]
            for kind, figure in zip(KINDS, printed, strict=True):
                rows = [row for row in paper_figures(details).rows if (row.task, row.setting) == (kind, setting)]
                assert len(rows) == KINDS[kind]
                assert statistics.fmean(row.values[column] for row in rows) == pytest.approx(figure, abs=0.1)
            assert statistics.fmean(printed) == pytest.approx(cell(table, model, setting, AVERAGE, column), abs=0.051)


def test_figures_4_and_7_are_tables_6_and_5_but_for_one_cell_that_is_noted():
    for figure, table, setting in (("figure4", "table6", "None"), ("figure7", "table5", "Prompt")):
        notes = " ".join(paper_figures(figure).notes)
        for row in paper_figures(figure).rows:
            for column, value in row.values.items():
                other = cell(table, row.model, setting, row.task, column)
                assert value == other or f"{row.model}, {row.task}, {column}: {value} here, {other}" in notes
    assert "DeepSeekMoE-16B, Classification, TC: 56.5 here, 56.4 in Table 5" in " ".join(paper_figures("figure7").notes)


def test_averages_of_the_vision_tables_are_right_or_noted():
    for row in paper_figures("table4").rows:
        if row.dataset == "Avg.":
            others = [one for one in paper_figures("table4").rows if one.setting == row.setting and one is not row]
            for column, value in row.values.items():
                found = statistics.fmean(one.values[column] for one in others)
                if value != pytest.approx(found, abs=0.051):
                    assert (row.setting, column, value, round(found, 1)) == ("FGSM", "USMoE", 43.3, 39.1)
                    assert "43.3" in paper_figures("table4").notes[0]
                    assert "39.1" in paper_figures("table4").notes[0]
    *rows, last = paper_figures("table3").rows
    for column, value in last.values.items():
        assert statistics.fmean(row.values[column] for row in rows) == pytest.approx(value, abs=0.051)


def test_what_tables_repeat_agrees_or_is_noted():
    """Tables 9, 10 and 11; 2 and 14; and the cells of Table 8 that were copied from another row."""
    model = "DeepSeekMoE-16B"
    for dataset in ("Emotion", "Toxic", "Tweet"):
        where = (model, "None", "Classification")
        for column, other in (("TC", "0.0"), ("EC", "1.0"), ("USMoE-Sequence", "0.5")):
            assert cell("table10", *where, column, dataset) == cell("table11", *where, other, dataset)
        for column in ("TC", "EC"):
            assert cell("table9", *where, column, dataset) == cell("table10", *where, column, dataset)
        assert cell("table9", *where, "USMoE", dataset) > cell("table10", *where, "USMoE-Sequence", dataset) + 1
    assert "31.3" in " ".join(paper_figures("table9").notes)
    for one, other in (("Toxic", "Medrxiv"), ("Tweet", "20Groups")):
        for setting in ("None", "Prompt"):
            model = "Qwen1.5-MoE-A2.7B"
            copied = cell("table8", model, setting, "Classification", "EC", one)
            assert copied == cell("table8", model, setting, "Clustering", "EC", other)
            assert f"{copied}" in paper_figures("table8").notes[1]
    old = {row.dataset: row.values for row in paper_figures("table2").rows if row.setting == "Original"}
    for row in paper_figures("table14").rows:
        same = {"USMoE k=2": "USMoE k=2", "USMoE k=1.5": "USMoE k=1.5", "SMoE": "TC k=2", "EC": "EC k=2"}
        assert all(row.values[one] == old[row.dataset][other] for one, other in same.items())


def test_what_the_text_holds_no_figures_of_is_refused():
    with pytest.raises(ValueError, match="holds no figures of 'figure9'"):
        paper_figures("figure9")
    assert "none of its numbers" in paper_figures("figure3").notes[0]
