"""A training experiment as tables of words: the paper's figures beside ours, what differs, what can be told apart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from usmoe.reproduce.experiment import EXPERIMENTS
from usmoe.reproduce.figures import paper_figures
from usmoe.reproduce.paired import Sample, ranked
from usmoe.reproduce.training.compare import Cell, Value, cell, honest, teacher_forced
from usmoe.reproduce.training.measure import Measured
from usmoe.reproduce.training.plan import Plan, about
from usmoe.reproduce.training.run import Result
from usmoe.reproduce.training.study import PAPER_CORPORA, Text
from usmoe.reproduce.view import View

Rows = Mapping[str, Sequence[Measured]]
"""Models of a corpus and a text by row, one a seed."""

_SETTINGS = {"clean": "Original", "corrupt": "Corrupt"}
_TEXTS = {"clean": "", "corrupt": ", corrupted"}


def views(result: Result) -> list[View]:
    """For each text a table of likelihoods with the paper's figures, then one of what the routers do and cost."""
    found, plan = [], result.plan
    for text in plan.texts:
        for corpus in plan.corpora:
            found.append(_likelihoods(result, corpus, text))
    for corpus in plan.corpora:
        found.append(_routing(result, corpus))
    last = found.pop()
    notes = () if plan.study.figures is None else paper_figures(plan.study.figures).notes
    says = (*last.says, *plan.study.says)
    return [*found, dataclasses.replace(last, says=says, about=about(plan.rows), differs=differs(result), notes=notes)]


def of(result: Result, corpus: str, text: Text) -> Rows:
    """The models of a corpus and a text by row, in the plan's order."""
    found: dict[str, list[Measured]] = {row.name: [] for row in result.plan.rows}
    for one in result.rows:
        if (one.corpus, one.text) == (corpus, text):
            found[one.row].append(one)
    return {name: ones for name, ones in found.items() if ones}


def _likelihoods(result: Result, corpus: str, text: Text) -> View:
    plan, rows = result.plan, of(result, corpus, text)
    columns: dict[str, Value] = {
        "teacher-forced": lambda one: one.figures.forced.nats,
        "honest": lambda one: one.figures.honest.nats,
    }
    for how in dict.fromkeys(how for ones in rows.values() for one in ones for how in one.figures.served):
        columns[how] = _served(how)
    others: dict[str, Value] = {
        "with k=2": lambda one: None if one.at_two is None else one.at_two.forced.nats,
        "memory reset": lambda one: None if one.figures.reset is None else one.figures.reset.nats,
        "batch of 1": lambda one: None if one.figures.alone is None else one.figures.alone.nats,
    }
    every = [one for ones in rows.values() for one in ones]
    columns |= {name: value for name, value in others.items() if any(value(one) is not None for one in every)}
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
            words.append(_word(_in_units(rows[row.name], value), rows[row.name], name) + ("~" if tied else ""))
            if len(rows) > len(groups) and (row.name, ()) in groups:
                bold.append((at, 1 + column))
        lines.append((*words, *(_number(values.get(row.name)) for values in printed.values())))
    one = next(iter(rows.values()))[0]
    return View(
        title=_title(plan, corpus, text),
        head=("method", *columns, *(f"paper, {name}" for name in printed)),
        labels=1,
        rows=tuple(lines),
        bold=tuple(bold),
        says=tuple(word for word in (_legend(plan, one, printed), _ranking(best, rows, plan)) if word),
    )


def _groups(plan: Plan, rows: Rows) -> list[Rows]:
    """Rows that are compared with one another: those of one k, where the table is over k."""
    ks = dict.fromkeys(row.k for row in plan.rows if row.name in rows)
    return [{row.name: rows[row.name] for row in plan.rows if row.name in rows and row.k == k} for k in ks]


def _ranked(group: Rows, sample: Callable[[Sequence[Measured]], Sample]) -> tuple[str, tuple[str, ...]]:
    counts = next(iter(group.values()))[0].figures.forced.counts
    return ranked({name: sample(ones) for name, ones in group.items()}, counts)


def _served(how: str) -> Value:
    return lambda one: one.figures.served[how].nats if how in one.figures.served else None


def _title(plan: Plan, corpus: str, text: Text) -> str:
    return f"{plan.experiment}, {plan.scale} scale, {corpus}{_TEXTS[text]}: {EXPERIMENTS[plan.experiment].title}"


def _in_units(ones: Sequence[Measured], value: Value) -> Cell | None:
    """The figure in bits or perplexity, mean and deviation over seeds."""

    def in_units(one: Measured) -> float | None:
        nats = value(one)
        return None if nats is None else one.figures.stated(nats)

    return cell(ones, in_units)


def _word(found: Cell | None, ones: Sequence[Measured], column: str) -> str:
    """1.234 (0.005): mean, and deviation over seeds; of the honest figure also the half of its interval."""
    if found is None:
        return "-"
    digits = 3 if ones[0].figures.bits else 2
    words = f"{found.value:.{digits}f}"
    if column == "honest" and any(one.figures.honest.interval for one in ones):
        halves = [(high - low) / 2 for low, high in (one.figures.honest_interval for one in ones)]
        words += f" ±{math.hypot(*halves) / len(ones):.{digits}f}"
    return words + ("" if found.deviation is None else f" ({found.deviation:.{digits}f})")


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
    words = [f"{unit}, lower is better: the mean over {len(plan.seeds)} seed{'s' * (len(plan.seeds) > 1)}"]
    words[0] += ", in brackets the deviation." if len(plan.seeds) > 1 else "."
    words.append(
        f"Of {one.figures.tokens:,} tokens of the test split. Honest: {plan.measurement.positions} positions, each "
        "predicted from the tokens before it alone, ± the half of the 95 % interval of that sample (none where the "
        "teacher-forced figure is honest)."
    )
    if one.text == "corrupt":
        words.append(
            f"{100 * plan.measurement.corrupt_rate:g} % of the words of the test split are AAA: {one.corrupted:,}."
        )
    if printed and plan.scale == "small":
        words.append(
            "The paper's figures stand beside ours for their order alone: other text, another size, other steps. No "
            "difference between the two means anything."
        )
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
        "Bands are of the difference to the lowest row, 95 %: the same tokens paired, blocks of the "
        f"text drawn with replacement, and {seeds}."
    )
    return " ".join(words)


def _routing(result: Result, corpus: str) -> View:
    plan, rows = result.plan, of(result, corpus, "clean")
    columns: dict[str, tuple[Value, str]] = {
        "experts a token": (lambda one: one.figures.forced.experts, ".2f"),
        "dropped, %": (lambda one: _percent(one.figures.forced.dropped), ".1f"),
        "load CV": (lambda one: one.figures.forced.load_cv, ".2f"),
        "MFLOPs a token": (lambda one: one.figures.forced.flops / 1e6, ".2f"),
        "of those at k=2, %": (lambda one: _percent(one.figures.forced.relative), ".1f"),
        "steps": (lambda one: one.steps, ",.0f"),
        "best at": (lambda one: one.figures.step, ",.0f"),
        "minutes": (lambda one: one.training_seconds / 60, ".1f"),
    }
    curved = _curve_columns(result, corpus)
    lines = []
    for row in plan.rows:
        if row.name in rows:
            found = [(cell(rows[row.name], value), form) for value, form in columns.values()]
            words = ["-" if one is None else f"{one.value:{form}}" for one, form in found]
            lines.append((row.label, *words, *(curve.get(row.name, "-") for curve in curved.values())))
    return View(
        title=f"{plan.experiment}, {plan.scale} scale, {corpus}: what the routers do, and what they cost",
        head=("method", *columns, *curved),
        labels=1,
        rows=tuple(lines),
        bold=(),
        says=(
            "On the clean test split, means over seeds. Dropped: tokens without an expert. FLOPs are of a forward, by "
            "counted pairs, without the output layer. Minutes: wall time of training on what it was trained on, beside "
            "other work.",
        ),
    )


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _curve_columns(result: Result, corpus: str) -> dict[str, dict[str, str]]:
    """{column: {row: word}}: the curves at a tenth, at half and at the end of the steps, means over seeds."""
    found: dict[str, dict[str, str]] = {}
    for name, lines in curves(result, corpus).items():
        for share in (0.1, 0.5, 1.0):
            for row, (steps, values) in lines.items():
                at = min(range(len(steps)), key=lambda i: abs(steps[i] - share * steps[-1]))
                word = f"{100 * values[at]:.1f}" if name == "dropped" else f"{values[at]:.3f}"
                unit = "dropped" if name == "dropped" else name
                found.setdefault(f"{unit}, {100 * share:g} % of steps", {})[row] = word
    return found


def curves(result: Result, corpus: str) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """{bits or dropped: {row: (steps, means over seeds)}} in training."""
    found: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for row in result.plan.rows:
        names = [one.name for one in result.plan.runs if (one.corpus, one.row) == (corpus, row.name)]
        several = [result.curves[name] for name in names if name in result.curves]
        for what in dict.fromkeys(what for one in several for what in one if what != "step"):
            values = [sum(at) / len(at) for at in zip(*(one[what] for one in several), strict=True)]
            found.setdefault(what, {})[row.name] = (list(several[0]["step"]), values)
    return found


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
    """Write the curves as a PNG: a panel for each corpus and figure, a line a row."""
    from usmoe.report.curves import curves_plot

    plan = result.plan
    labels = {row.name: row.label for row in plan.rows}
    panels = {
        (corpus, what): {labels[row]: line for row, line in lines.items()}
        for corpus in plan.corpora
        for what, lines in curves(result, corpus).items()
    }
    curves_plot(path, panels, f"{plan.experiment}, {plan.scale} scale: in training, means over {len(plan.seeds)} seeds")
