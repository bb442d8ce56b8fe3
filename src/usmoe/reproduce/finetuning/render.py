"""The fine-tuning experiment as a table of words: the paper's accuracies beside ours, and what can be told apart."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from usmoe.reproduce.experiment import EXPERIMENTS
from usmoe.reproduce.figures import paper_figures
from usmoe.reproduce.finetuning.plan import Plan
from usmoe.reproduce.finetuning.run import Answered, Result
from usmoe.reproduce.finetuning.study import TASKS
from usmoe.reproduce.paired import TOGETHER, Sample, ranked
from usmoe.reproduce.training.plan import about
from usmoe.reproduce.view import FOR_THEIR_ORDER, View

Rows = Mapping[str, Sequence[Answered]]
"""Classifiers of a data set by row, one a seed."""

BLOCKS = 250
"""Of test rows, at most: what is drawn with replacement for a band."""


def views(result: Result) -> list[View]:
    """Two tables for each text that the models were pre-trained on, a row a method: accuracies beside the paper's, and
    what the routers cost."""
    return [view for corpus in result.plan.corpora for view in (_accuracies(result, corpus), _costs(result, corpus))]


def _accuracies(result: Result, corpus: str) -> View:
    plan = result.plan
    tasks = {task: _of(result, corpus, task) for task in plan.tasks}
    best = {task: _ranked(rows) for task, rows in tasks.items() if rows}
    printed = {
        str(row.dataset): row.values for row in paper_figures("table13").rows if row.dataset in map(TASKS.get, tasks)
    }
    lines, bold = [], []
    for at, row in enumerate(plan.rows):
        words = [row.label]
        for column, (task, rows) in enumerate(tasks.items()):
            first, rivals = best[task]
            words.append(_word(rows[row.name]) + ("~" if rivals and row.name in (first, *rivals) else ""))
            if (row.name, ()) == best[task] and len(rows) > 1:
                bold.append((at, 1 + column))
        words += [f"{values[str(row.paper)]:.1f}" if row.paper in values else "-" for values in printed.values()]
        lines.append(tuple(words))
    return View(
        title=f"{plan.experiment}, {plan.scale} scale, from {corpus}: {EXPERIMENTS[plan.experiment].title}",
        head=("method", *(TASKS[task] for task in tasks), *(f"paper, {name}" for name in printed)),
        labels=1,
        rows=tuple(lines),
        bold=tuple(bold),
        says=(_legend(plan), *_ranking(plan, best)),
    )


def _costs(result: Result, corpus: str) -> View:
    """Means over data sets and seeds."""
    plan = result.plan
    lines = []
    for row in plan.rows:
        every = [one for task in plan.tasks for one in _of(result, corpus, task)[row.name]]
        flops = f"{statistics.fmean(one.scored.flops for one in every) / 1e6:.2f}"
        lines.append((row.label, flops, _mean(every, "experts", 1, ".2f"), _mean(every, "dropped", 100, ".1f")))
    return View(
        title=f"{plan.experiment}, {plan.scale} scale, from {corpus}: what the routers cost",
        head=("method", "MFLOPs a token", "experts a token", "dropped, %"),
        labels=1,
        rows=tuple(lines),
        bold=(),
        says=(
            "In the test, means over data sets. FLOPs are of the body for a token, by counted pairs, two for a "
            "multiply-add; the paper's are of its own count. Dropped: tokens without an expert.",
        ),
        about=about(plan.rows),
        differs=_differs(result),
        notes=paper_figures("table13").notes,
    )


def _of(result: Result, corpus: str, task: str) -> Rows:
    found: dict[str, list[Answered]] = {row.name: [] for row in result.plan.rows}
    for one in result.rows:
        if (one.corpus, one.task) == (corpus, task):
            found[one.row].append(one)
    return {name: ones for name, ones in found.items() if ones}


def _ranked(rows: Rows) -> tuple[str, tuple[str, ...]]:
    """By the share of test rows that are wrong, over the same rows; of many, neighbours make a block."""
    samples = {}
    number = len(next(iter(rows.values()))[0].right)
    starts = range(0, number, -(-number // BLOCKS))
    ends = [*starts[1:], number]
    for name, ones in rows.items():
        wrong = [[one.right.count("0", start, end) for start, end in zip(starts, ends, strict=True)] for one in ones]
        samples[name] = Sample(
            values=tuple(sum(blocks) / number for blocks in wrong),
            sums=tuple(map(statistics.fmean, zip(*wrong, strict=True))),
        )
    return ranked(samples, [end - start for start, end in zip(starts, ends, strict=True)])


def _word(ones: Sequence[Answered]) -> str:
    """81.5 (0.4): per cent, mean and deviation over seeds."""
    values = [100 * one.scored.accuracy for one in ones]
    words = f"{statistics.fmean(values):.1f}"
    return words + (f" ({statistics.stdev(values):.1f})" if len(values) > 1 else "")


def _mean(ones: Sequence[Answered], what: str, factor: float, form: str) -> str:
    values = [getattr(one.scored, what) for one in ones]
    return "-" if None in values else f"{factor * statistics.fmean(values):{form}}"


def _legend(plan: Plan) -> str:
    words = "Per cent of the test rows whose class was said"
    words += ": the mean over seeds, in brackets the deviation." if len(plan.seeds) > 1 else "."
    return f"{words} {FOR_THEIR_ORDER}" if plan.scale == "small" else words


def _ranking(plan: Plan, best: Mapping[str, tuple[str, tuple[str, ...]]]) -> tuple[str, ...]:
    if len(plan.rows) < 2:
        return ()
    labels = {row.name: row.label for row in plan.rows}
    words = []
    for task, (first, rivals) in best.items():
        if rivals:
            words.append(
                f"On {TASKS[task]} no ranking can be read among {labels[first]} (highest) and "
                f"{', '.join(labels[one] for one in rivals)} (marked ~)."
            )
        else:
            words.append(f"On {TASKS[task]} {labels[first]} is highest, clear of the others.")
    seeds = "a part for seeds" if len(plan.seeds) > 1 else "no part for seeds, since there is one"
    words.append(
        f"Bands are of the difference to the highest, {TOGETHER}: the same test rows paired and drawn with "
        f"replacement, and {seeds}."
    )
    return tuple(words)


def _differs(result: Result) -> tuple[str, ...]:
    plan = result.plan
    said = []
    if plan.scale == "small":
        model, config = plan.runs[0].pretrained.config.model, plan.runs[0].config
        steps = plan.runs[0].pretrained.config.steps
        said.append(
            f"Models: {model.layers} layers, d_model {model.d_model}, {steps:,} steps on {', '.join(plan.corpora)}, "
            "those of Table 14 at small scale; the paper does not say which of its models it fine-tunes."
        )
        said.append(
            f"Fine-tuning: {config.epochs} epochs of the rows below, {config.length} bytes of a text, batch "
            f"{config.batch}, learning rate {config.lr:g}, a head on the {config.pooling} of a text's states; the "
            "paper: 15 epochs of all rows, 512 tokens, batch 16 (IMDB 4), 1e-4; its code: a head on the last state."
        )
    for task in plan.tasks:
        rows = next(one.scored.rows for one in result.rows if one.task == task)
        parts = (f"selected on {rows['validation']}", f"tested on {rows['test']}")
        said.append(f"{TASKS[task]}: trained on {rows['train']}; {'; '.join(parts)}.")
    said += [f"Without {', '.join(TASKS[task] for task in plan.left_out)}."] if plan.left_out else []
    said.append(f"Seeds: {', '.join(map(str, plan.seeds))}, of both trainings; the paper names none.")
    return tuple(said)
