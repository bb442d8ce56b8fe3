"""A training experiment as tables of words: the paper's figures beside ours, what differs, what can be told apart."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from usmoe.reproduce.experiment import EXPERIMENTS
from usmoe.reproduce.figures import paper_figures
from usmoe.reproduce.paired import TOGETHER, Sample, ranked
from usmoe.reproduce.training.compare import Rows, Value, honest, of, stated, teacher_forced
from usmoe.reproduce.training.details import TEXTS, curves, in_training, read_otherwise, routing
from usmoe.reproduce.training.measure import Measured
from usmoe.reproduce.training.plan import Plan, about
from usmoe.reproduce.training.run import Result
from usmoe.reproduce.training.study import PAPER_CORPORA, Text
from usmoe.reproduce.view import FOR_THEIR_ORDER, View

_SETTINGS = {"clean": "Original", "corrupt": "Corrupt"}
_IN_BITS = ("Enwik8", "Text8")
"""Of the paper's data sets; figures of the others are perplexities."""


def views(result: Result) -> list[View]:
    """For each text a table of likelihoods with the paper's figures, and one of other readings; then what the routers
    do and cost."""
    found, plan = [], result.plan
    for text in plan.texts:
        for corpus in plan.corpora:
            found += [_likelihoods(result, corpus, text), read_otherwise(result, corpus, text)]
    found += [in_training(result, corpus) for corpus in plan.corpora if plan.study.curves]
    found += [routing(result, corpus) for corpus in plan.corpora]
    last = found.pop()
    notes = () if plan.study.figures is None else paper_figures(plan.study.figures).notes
    says = (*last.says, *plan.study.says)
    return [*found, dataclasses.replace(last, says=says, about=about(plan.rows), differs=differs(result), notes=notes)]


def _likelihoods(result: Result, corpus: str, text: Text) -> View:
    plan = result.plan
    rows = of(result.rows, (row.name for row in plan.rows), corpus, text)
    columns: dict[str, Value] = {
        "teacher-forced": lambda one: one.figures.forced.nats,
        "honest": lambda one: one.figures.honest.nats,
    }
    best = {
        name: [_ranked(group, sample) for group in _groups(plan, rows)]
        for name, sample in (("teacher-forced", teacher_forced), ("honest", honest))
    }
    printed = _printed(plan, corpus, text)
    lines, bold = [], []
    for at, row in enumerate(row for row in plan.rows if row.name in rows):
        words = [row.label]
        for column, (name, value) in enumerate(columns.items()):
            groups = best.get(name, [])
            tied = any(row.name in (first, *rivals) for first, rivals in groups if rivals)
            half = _half(rows[row.name]) if name == "honest" else ""
            words.append(stated(rows[row.name], value, half) + ("~" if tied else ""))
            if len(rows) > len(groups) and (row.name, ()) in groups:
                bold.append((at, 1 + column))
        lines.append((*words, *(_number(values.get(row.name)) for values in printed.values())))
    one = next(iter(rows.values()))[0]
    return View(
        title=_title(plan, corpus, text),
        head=("method", *columns, *(_paper_head(name, plan) for name in printed)),
        labels=1,
        rows=tuple(lines),
        bold=tuple(bold),
        says=tuple(word for word in (_legend(plan, one, printed), _ranking(best, rows, plan)) if word),
    )


def _half(ones: Sequence[Measured]) -> str:
    """Of the honest figure: ±, the half of the interval of its sample; nothing where there was none."""
    halves = [(high - low) / 2 for low, high in (one.figures.honest_interval for one in ones)]
    digits = 3 if ones[0].figures.bits else 2
    return f" ±{statistics.fmean(halves):.{digits}f}" if any(halves) else ""


def _paper_head(name: str, plan: Plan) -> str:
    """At small scale with the unit, which may be another than ours."""
    unit = "bits" if name in _IN_BITS else "perplexity"
    return f"paper, {name}\n{unit}" if plan.scale == "small" else f"paper, {name}"


def _groups(plan: Plan, rows: Rows) -> list[Rows]:
    """Rows that are compared with one another: those of one k, where the table is over k."""
    ks = dict.fromkeys(row.k for row in plan.rows if row.name in rows)
    return [{row.name: rows[row.name] for row in plan.rows if row.name in rows and row.k == k} for k in ks]


def _ranked(group: Rows, sample: Callable[[Sequence[Measured]], Sample]) -> tuple[str, tuple[str, ...]]:
    counts = next(iter(group.values()))[0].figures.forced.counts
    return ranked({name: sample(ones) for name, ones in group.items()}, counts)


def _title(plan: Plan, corpus: str, text: Text) -> str:
    return f"{plan.experiment}, {plan.scale} scale, {corpus}{TEXTS[text]}: {EXPERIMENTS[plan.experiment].title}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _printed(plan: Plan, corpus: str, text: Text) -> dict[str, dict[str, float]]:
    """{the paper's data set: {row: figure}}: of the same text at paper scale, of all at small scale."""
    if plan.study.figures is None:
        return {}
    found: dict[str, dict[str, float]] = {}
    for printed in paper_figures(plan.study.figures).rows:
        if plan.scale == "paper" and printed.dataset != PAPER_CORPORA[corpus]:
            continue
        for row in plan.rows:
            setting = f"k={row.k:g}" if row.k is not None else _SETTINGS[text]
            same = printed.setting == setting or (printed.setting is None and text == "clean")
            if same and row.paper is not None and row.paper in printed.values:
                found.setdefault(str(printed.dataset), {})[row.name] = printed.values[row.paper]
    return found


def _legend(plan: Plan, one: Measured, printed: Mapping[str, object]) -> str:
    unit = f"Bits a {one.figures.unit}" if one.figures.bits else "Perplexity a word"
    seeds = f"the mean over {len(plan.seeds)} seeds, in brackets the deviation" if plan.seeds[1:] else "one seed"
    words = [f"{unit}, lower is better: {seeds}."]
    words.append(
        f"Of {one.figures.tokens:,} tokens of the test split. Honest: {plan.measurement.positions:,} positions, each "
        "predicted from the tokens before it alone, ± the half of the 95 % interval of that sample (none where the "
        "teacher-forced figure is honest)."
    )
    if one.text == "corrupt":
        words.append(
            f"{100 * plan.measurement.corrupt_rate:g} % of the words of the test split are AAA: {one.corrupted:,}."
        )
    if printed and plan.scale == "small":
        words.append(FOR_THEIR_ORDER)
    return " ".join(words)


def _ranking(best: Mapping[str, Sequence[tuple[str, tuple[str, ...]]]], rows: Rows, plan: Plan) -> str:
    if all(len(rows) == len(groups) for groups in best.values()):
        return ""
    words = ["Rows of one k are compared."] if any(len(groups) > 1 for groups in best.values()) else []
    labels = {row.name: row.label for row in plan.rows}
    for column, groups in best.items():
        for first, rivals in groups:
            if rivals:
                words.append(
                    f"By the {column} figure no ranking can be read among {labels[first]} (lowest) and "
                    f"{', '.join(labels[one] for one in rivals)} (marked ~)."
                )
            else:
                words.append(f"By the {column} figure {labels[first]} is lowest, clear of the others.")
    seeds = (
        "a part for seeds (Student's t, deviation pooled over rows)"
        if len(plan.seeds) > 1
        else "no part for seeds, since there is one: other seeds may well reverse it"
    )
    words.append(
        f"Bands are of the difference to the lowest row, {TOGETHER}: the same tokens paired, blocks of the text drawn "
        f"with replacement, and {seeds}."
    )
    return " ".join(words)


def differs(result: Result) -> tuple[str, ...]:
    """What is not as in the paper, a sentence each."""
    plan = result.plan
    config = plan.runs[0].config
    model, tokens = config.model, config.steps * config.batch * config.segment
    said = []
    if plan.scale == "small":
        said.append(
            f"Text: {', '.join(plan.corpora)}, byte by byte, each trained and tested on its own splits, in place of "
            f"{', '.join(PAPER_CORPORA[name] for name in plan.study.paper_corpora)}."
        )
        said.append(
            f"Model: {model.layers} layers, d_model {model.d_model}, {model.num_experts} experts of {model.d_ff}, in "
            f"place of {'12 layers, 420 M' if plan.study.large else '4 layers, 20 M'} parameters."
        )
    if plan.scale == "small" or config.steps != 100_000:
        said.append(
            f"Steps: {config.steps:,} of {config.batch} x {config.segment} tokens ({tokens / 1e6:.2f} M), the same for "
            f"every row, in place of 100,000; learning rate {config.lr:g}, warm-up {config.warmup}."
        )
    said += [f"Without {', '.join(plan.left_out)}."] if plan.left_out else []
    measured = plan.measurement.evaluation
    said.append(
        f"Measured in {measured.batch} streams of {measured.segment} tokens with {measured.memory} of memory; the "
        "model with the best validation figure."
    )
    if "corrupt" in plan.texts:
        said.append(
            f"Corruption: {100 * plan.measurement.corrupt_rate:g} % of the words of the test split replaced by AAA; "
            "the paper states neither rate nor split. The same number of tokens covers a little more of the text."
        )
    said.append(f"Seeds: {', '.join(map(str, plan.seeds))}; the paper names none, and prints no deviations.")
    return tuple(said)


def plot(result: Result, path: Path) -> None:
    """Write the curves as a picture (.png, .svg or .pdf): a panel for each corpus and figure, a line a row."""
    from usmoe.report.curves import curves_plot

    plan = result.plan
    labels = {row.name: row.label for row in plan.rows}
    panels = {
        (corpus, what): {labels[row]: line for row, line in lines.items()}
        for corpus in plan.corpora
        for what, lines in curves(result, corpus).items()
    }
    seeds = f"means over {len(plan.seeds)} seeds" if plan.seeds[1:] else "one seed"
    curves_plot(path, panels, f"{plan.experiment}, {plan.scale} scale: in training, {seeds}")
