"""A result beside the paper's figures, as a table of words: for a terminal, for Markdown, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from usmoe.reproduce.embeddings.compare import AVERAGE, SPREAD, Cell, Line, lines, paper_name
from usmoe.reproduce.embeddings.plan import SHIPPED, Plan
from usmoe.reproduce.embeddings.run import Result
from usmoe.reproduce.embeddings.study import CHECKPOINTS, STANDARDIZED_BY, STUDIES, TASKS, one_run
from usmoe.reproduce.experiment import EXPERIMENTS
from usmoe.reproduce.figures import paper_figures, recorded
from usmoe.reproduce.view import PAPER, View

SHORT = {task: task if task == "SummEval" else name for task, (_, name) in TASKS.items()}
"""Tasks in the paper's words, but for its second Medrxiv."""

_PROMPTS = {"None": "no prompt", "Prompt": "PromptEOL"}


def view(result: Result, deviations: bool = True) -> View:
    """Ours and the paper's, line under line, with what differs and where no ranking can be read.

    deviations  False: those over runs only where the experiment is about them, for a narrow page
    """
    plan, found = result.plan, lines(result)
    deviations = deviations or plan.study.spread
    labels = tuple(method.label for method in plan.study.methods)
    several = len(plan.study.prompts) > 1
    rows, bold = [], []
    for at, line in enumerate(found):
        name = SHORT.get(line.row, line.row) + (f", {_PROMPTS[line.prompt]}" if several else "")
        cells = (figure(line, label, deviations) for label in labels)
        rows.append((PAPER if line.printed else name, paper_name(line.whose), *cells))
        if line.ranked and not line.rivals:
            bold.append((at, 2 + labels.index(line.best)))
    experiment = EXPERIMENTS[plan.experiment]
    return View(
        title=f"{experiment.name}, {plan.scale} scale: {experiment.title}",
        head=("task", "model", *labels),
        labels=2,
        rows=tuple(rows),
        bold=tuple(bold),
        differs=differs(plan),
        says=tuple(
            word for word in (*legend(plan, found, deviations), ranking(found), _shared(plan), *plan.study.says) if word
        ),
        notes=paper_figures(experiment.name).notes if experiment.name in recorded() else (),
    )


def figure(line: Line, label: str, deviations: bool) -> str:
    """45.1 ±1.2 (0.4)~: figure, longer side of its band, deviation over runs, and ~ where it cannot be told from the
    best."""
    cell = line.cells.get(label)
    if cell is None:
        return "-"
    words = [f"{cell.value:.1f}"]
    words += [] if cell.half is None else [f"±{cell.half:.1f}"]
    words += [] if cell.deviation is None or not deviations else [f"({cell.deviation:.1f})"]
    tied = line.ranked and line.rivals and label in (line.best, *line.rivals)
    return " ".join(words) + ("~" if tied else "")


def ranking(found: Sequence[Line]) -> str:
    """The sentence on what can be ranked: decided row by row, from the band of the best and those of the others."""
    ours = [line for line in found if line.ranked]
    tied = [line for line in ours if line.rivals]
    if not tied:
        return "In every row the band of the best figure is clear of all others." if ours else ""
    first = f"From {len(tied)} of our {len(ours)} rows no" if len(tied) < len(ours) else "No"
    return (
        f"{first} ranking can be read by bands of each figure by itself: there the band of the best overlaps those of "
        "others (marked ~), or one has no band. The columns share their texts, so that bands of paired differences, "
        "which are not taken here, tell more of them apart."
    )


def legend(plan: Plan, found: Sequence[Line], deviations: bool) -> tuple[str, ...]:
    """How a figure is written."""
    cells = [cell for line in found if not line.printed for cell in line.cells.values()]
    words = ["Per cent of mteb's main score of each task."]
    if any(cell.half is not None for cell in cells):
        words.append(f"±: the longer side of the 95 % bootstrap band (seed {plan.seed}).")
    if deviations and any(cell.deviation is not None for cell in cells):
        words.append("In brackets: deviation over mteb's own runs.")
    if plan.study.rows == "type":
        words.append("Rows are means of tasks, the average is one of types; bands and deviations add up in squares.")
    if any(line.printed for line in found):
        words.append("The paper prints neither bands nor deviations for these.")
        if plan.left_out and plan.study.rows == "type":
            words.append("The paper's means are of the same tasks as ours, from Tables 7 to 9.")
    return (" ".join(words),)


def differs(plan: Plan) -> tuple[str, ...]:
    """What is not as in the paper, a sentence each: model, tasks, data, prompts, precision."""
    own = tuple(one.hub for one in plan.study.models)
    said = []
    if plan.models != own:
        names = ", ".join(one.paper for one in plan.study.models)
        small = " (ships with usmoe, trained on novels)" if SHIPPED in plan.models else ""
        said.append(f"Model: {', '.join(map(paper_name, plan.models))}{small} in place of {names}.")
    if plan.left_out:
        names = ", ".join(plan.left_out)
        said.append(f"Tasks: {len(plan.tasks)} of {len(plan.study.tasks)}; without {names}.")
    cut = {task: words for task, words in plan.cuts.items() if words.partition(" ")[0].rstrip(";,") != "none"}
    said += [f"Data of {task}: {words.rstrip('.')}." for task, words in cut.items()]
    if plan.scale == "paper":
        said.append(
            "Text: with the task's instruction, and in quotation marks without a prompt, as in the released code."
        )
    else:
        said.append("Text: as it is or in PromptEOL; the released code adds quotation marks and an instruction.")
    if any(column.setting.standardize for column in plan.columns):
        said.append(
            f"Router embeddings and MoEE are standardised by the sample {STANDARDIZED_BY!r}; the released code takes "
            "each mini-batch."
        )
    bits = f"experts in {plan.quantize}, the rest" if plan.quantize else "all"
    said.append(
        f"Precision: {bits} in {plan.dtype}; the paper has 4 bits. Batches of {plan.batch_size}; the paper, 128."
    )
    said.append("Seeds: mteb's own, as it has them; the paper names none.")
    return tuple(said)


def _shared(plan: Plan) -> str:
    """A sentence on the experiments that have this very run in common; empty where there are none."""
    names = one_run(plan.experiment)
    if len(names) == 1 or set(plan.models) & {one.hub for name in names for one in STUDIES[name].models}:
        return ""
    return (
        f"{', '.join(names[:-1])} and {names[-1]} are one run here: the model is the same in all of them, and only the "
        "paper's figures beside it are of another."
    )


def refuse_picture(experiment: str) -> None:
    """Raise ValueError for an experiment that there is nothing to draw of."""
    if not STUDIES[experiment].pictured:
        drawn = ", ".join(name for name, study in STUDIES.items() if study.pictured)
        raise ValueError(
            f"{experiment} is a table in the paper, without a picture. Leave --plot out; drawn are {drawn}."
        )


def plot(result: Result, path: Path) -> None:
    """Write the figure as .png, .svg or .pdf: bars by row, a panel a model and prompt, the paper's figures as marks on
    the bars; for figure8 also the distribution over tasks.

    Raises ValueError for an experiment that the paper prints as a table.
    """
    from usmoe.report.bars import bars_plot

    plan = result.plan
    refuse_picture(plan.experiment)
    found = [line for line in lines(result) if line.row not in (AVERAGE, SPREAD)]
    panels = {}
    for model in plan.models:
        for prompt in plan.study.prompts:
            wanted = [line for line in found if line.prompt == prompt]
            ours = {line.row: line.cells for line in wanted if line.whose == model and not line.printed}
            name = CHECKPOINTS[model].paper if model in CHECKPOINTS else None
            paper = {line.row: line.cells for line in wanted if line.printed and line.whose == name}
            panels[f"{paper_name(model)}, {_PROMPTS[prompt]}"] = {
                "bars": _numbers(ours, "half" if not plan.study.spread else "deviation"),
                "marks": _numbers(paper, None),
            }
    spread = _by_task(result) if plan.study.spread else {}
    whiskers = "deviation over runs" if plan.study.spread else "95 % band"
    marked = "; black lines: the paper" if any(panel["marks"] for panel in panels.values()) else ""
    title = f"{plan.experiment}, {plan.scale} scale. Whiskers: {whiskers}{marked}"
    bars_plot(path, panels, spread, title)


def _numbers(
    rows: Mapping[str, Mapping[str, Cell]], error: str | None
) -> dict[str, dict[str, tuple[float, float | None]]]:
    """{row: {label: (value, half-length of its error bar)}}."""
    return {
        row: {label: (cell.value, getattr(cell, error) if error else None) for label, cell in cells.items()}
        for row, cells in rows.items()
    }


def _by_task(result: Result) -> dict[str, dict[str, list[float]]]:
    """{panel: {label: the figures of all tasks}}."""
    found: dict[str, dict[str, list[float]]] = {}
    for column, scores in zip(result.plan.columns, result.scores, strict=True):
        panel = f"{paper_name(column.model)}, {_PROMPTS[column.prompt]}"
        found.setdefault(panel, {})[column.label] = [100 * score.score for score in scores if score.task in TASKS]
    return found
