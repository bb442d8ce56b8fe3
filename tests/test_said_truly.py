"""What is printed is true: of routers that make no promises, of rounding, of results that come with usmoe, of pages."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import torch

import usmoe
from tiny import tiny
from usmoe.cli import main
from usmoe.cli.table import print_rows, rounding
from usmoe.hf.compare import Contender, compare
from usmoe.reproduce import saved
from usmoe.reproduce.embeddings.study import one_run
from usmoe.types import Promises, is_causal, makes_promises

ROOT = Path(__file__).parent.parent
CAUSAL = Promises(causal=True, batch_independent=True, padding_independent=True, streamable=True, budget="none")


def above_average(logits, valid=None, **_):
    """Causal, and does not say so."""
    p = logits.softmax(-1)
    mask = p > 1 / p.shape[-1]
    if valid is not None:
        mask &= valid[..., None]
    return usmoe.Routing.from_dense(p, mask)


def promising(logits, valid=None, **_):
    return above_average(logits, valid)


promising.promises = CAUSAL
AHEAD, UNSAID, SAID = usmoe.USMoE(k=1.5), above_average, promising


@pytest.fixture
def typed(monkeypatch, capsys, tmp_path):
    """typed("info") -> (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["usmoe", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), *capsys.readouterr()

    return run


# ------------------------------------------------------------------------------------------------- promises


def test_a_router_that_makes_no_promise_is_not_one_that_looks_ahead():
    assert [makes_promises(one) for one in (AHEAD, UNSAID, SAID)] == [True, False, True]
    assert [is_causal(one) for one in (AHEAD, UNSAID, SAID)] == [False, False, True]


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe"])
def test_rows_mark_each_of_the_three(family, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    entries = [
        Contender(label=name, router=one) for name, one in (("ahead", AHEAD), ("unsaid", UNSAID), ("said", SAID))
    ]
    rows = compare(tiny(family), torch.arange(2, 34).view(2, 16), entries, bytes_per_token=4.0)
    assert [(row.causal, row.unpromised) for row in rows] == [(False, False), (False, True), (True, False)]
    print_rows("", rows, "float32")
    out = " ".join(capsys.readouterr().out.split())
    marked = [f"{row.label} {row.perplexity:.2f}{mark} " for row, mark in zip(rows, "*? ", strict=True)]
    assert all(words.strip() in out for words in marked)
    assert (
        "? this router does not promise that it is causal. If it does keep to that, say so: fn.promises = usmoe." in out
    )
    print_rows("", [rows[0], rows[2]], "float32")
    assert "promise" not in capsys.readouterr().out


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe"])
def test_generate_warns_of_each_of_the_three_in_its_own_words(family):
    model, ids = tiny(family), torch.arange(2, 10)[None]
    for router, words in (
        (AHEAD, "looks at tokens that are not generated yet"),
        (UNSAID, "does not promise that it is"),
    ):
        with usmoe.patched(model, router), pytest.warns(UserWarning, match=words) as told:
            model.generate(ids, max_new_tokens=2, do_sample=False)
        assert len(told) == 1
        assert ("above_average" in str(told[0].message)) == (router is UNSAID)
        assert " at 0x" not in str(told[0].message)
    with usmoe.patched(model, SAID), warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(ids, max_new_tokens=2, do_sample=False)


def test_readme_shows_how_a_router_promises(monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = [part.partition("```")[0] for part in text.split("```python\n")[1:]]
    (block,) = [one for one in blocks if ".promises = usmoe.Promises(" in one]
    names = {"usmoe": usmoe, "model": tiny("olmoe")}
    exec(block, names)
    assert is_causal(names["every_expert_above_average"])
    assert usmoe.unpatch(names["model"]) is not None


# ------------------------------------------------------------------------------------------------- rounding


def test_rounding_is_named_with_its_size_where_there_is_some(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    entries = [Contender(label="own", router=usmoe.OwnChoice()), Contender(label="ahead", router=AHEAD)]
    rows = compare(tiny("olmoe").bfloat16(), torch.arange(2, 66).view(2, 32), entries, bytes_per_token=4.0, positions=9)
    rows = [
        dataclasses.replace(row, honest_perplexity=row.perplexity + gap)
        for row, gap in zip(rows, (0.25, 9), strict=True)
    ]
    assert rounding(rows, "bfloat16") == pytest.approx(0.25)  # that of the router that does not look ahead
    assert rounding(rows, "float32") is None
    assert rounding(rows[1:], "bfloat16") is None
    print_rows("", rows, "bfloat16")
    assert "bfloat16 rounds, which alone moves honest figures, by up to 0.25 here." in capsys.readouterr().out
    print_rows("", rows, "float32")
    assert "rounds" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- results


def test_a_wheel_holds_the_results_where_they_are_looked_for():
    """The path in the wheel is the one that `committed` tries first."""
    said = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    place = Path(saved.__file__).parent / "results"
    assert said["wheel"]["force-include"] == {"results": place.relative_to(ROOT / "src").as_posix()}
    assert "results" in said["sdist"]["include"]
    assert saved.committed() == ROOT / "results"


def test_without_a_checkout_they_are_found_in_the_package(typed, monkeypatch, tmp_path):
    """As in a wheel: the module lies elsewhere, with its results beside it, and no project around it."""
    place = tmp_path / "lib" / "a" / "usmoe" / "reproduce"
    (place / "results").mkdir(parents=True)
    (place / "results" / "table15-small.json").write_text("{}")
    monkeypatch.setattr(saved, "__file__", str(place / "saved.py"))
    assert saved.committed() == place / "results"
    status, out, _ = typed("reproduce", "--list")
    assert status == 0
    assert next(line for line in out.splitlines() if line.startswith("table15 ")).split()[1:3] == ["run:", "small"]
    assert next(line for line in out.splitlines() if line.startswith("table5 ")).split()[1:4] == ["not", "run", "yet"]


@pytest.mark.parametrize(("name", "words"), [("table2", "SMoE"), ("table5", "PromptEOL"), ("table13", "SST-2")])
def test_show_prints_what_comes_with_usmoe_and_runs_nothing(typed, name, words, tmp_path):
    status, out, err = typed("reproduce", name, "--show", "--markdown", "page.md")
    assert status == 0, err
    assert words in out
    assert f"Shown from {ROOT / 'results' / f'{name}-small.json'}." in "".join(out.split("\n"))
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == saved.markdown(
        saved.load(ROOT / "results" / f"{name}-small.json")
    )
    assert not (tmp_path / "usmoe-results").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("table2",), "--show for what was run before."),
        (("table5",), "--show prints what was run before."),
        (("table2", "--show", "--scale", "paper"), "table2 has not been run at paper scale"),
        (("table3", "--show"), "table3 is not built yet"),
    ],
)
def test_without_data_it_says_that_there_is_something_to_show(typed, words, sentence):
    status, out, err = typed("reproduce", *words)
    assert (status, out) == (1, "")
    assert sentence in err


def test_tables_that_are_one_run_say_so(typed):
    assert one_run("table8") == ("table7", "table8", "table9")
    assert one_run("table5") == ("table5",)  # and not table6, which has other prompts
    _, out, _ = typed("reproduce", "--list")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert lines["table9"].endswith("(small: the run of table7)")
    assert "run of" not in lines["table7"]
    _, out, _ = typed("reproduce", "table8", "--show")
    assert "table7, table8 and table9 are one run here" in " ".join(out.split())
    page = (ROOT / "docs/embedding-results.md").read_text(encoding="utf-8")
    assert "## table8, small scale: the run of table7" in page
    ours = next(line for line in page.splitlines() if line.startswith("| Emotion, PromptEOL | novelist |"))
    assert page.count(ours) == 1


# ------------------------------------------------------------------------------------------------- pages


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "page"), [("render_embeddings", "embedding-results"), ("render_results", "results")])
def test_a_page_is_what_its_script_writes(name, page):
    assert script(name).page() == (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")


def test_the_page_of_training_is_what_its_script_writes(tmp_path):
    found = script("render_training").page(ROOT / "results", tmp_path)
    assert found == (ROOT / "docs/training-results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "page", ["README.md", "LOG.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
)
def test_a_link_between_pages_leads_somewhere(page):
    import re

    for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        assert ((ROOT / page).parent / link).exists(), link
