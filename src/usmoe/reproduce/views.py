"""What `usmoe eval` prints: a table a task and setting, with the paper's figures under ours where it has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from usmoe.reproduce.embeddings.compare import AVERAGE, Cell, Line, details, mean, paper_name
from usmoe.reproduce.embeddings.render import figure, ranking
from usmoe.reproduce.embeddings.study import CHECKPOINTS, Prompt
from usmoe.reproduce.view import PAPER, View

if TYPE_CHECKING:
    from usmoe.evaluate.language import TaskScore
    from usmoe.evaluate.run import Score
    from usmoe.evaluate.setting import Setting

_COLUMNS = 6
"""Settings beside each other, at most."""

_PRINTED = {"own": {"hidden": "TC", "router": "Router", "moee": "MoEE"}, "expert_choice": {"hidden": "EC"}}
_UNIFIED = "usmoe(alpha=0.5)"


def embedding_views(scores: Sequence[Score], model: str) -> list[View]:
    """Tables of at most six settings: a row a task, the mean of each type, and that of the types. The best figure of a
    row, of all settings, is bold where it stands clear of the others."""
    settings = list(dict.fromkeys(score.setting for score in scores))
    found = _lines(scores, settings, model)
    parts = [settings[at : at + _COLUMNS] for at in range(0, len(settings), _COLUMNS)]
    return [_view(found, part, model, _says(scores, found) if part is parts[-1] else ()) for part in parts]


def _view(lines: Sequence[Line], settings: Sequence[Setting], model: str, says: tuple[str, ...]) -> View:
    labels = [one.label for one in settings]
    shown = [line for line in lines if line.cells.keys() & set(labels)]
    clear = [(at, line.best) for at, line in enumerate(shown) if line.ranked and not line.rivals]
    return View(
        title=f"{paper_name(model)}: embeddings without training",
        head=("task", *("\n".join(one.words) for one in settings)),
        labels=1,
        rows=tuple(
            (PAPER if line.printed else line.row, *(figure(line, label, True) for label in labels)) for line in shown
        ),
        bold=tuple((at, 1 + labels.index(best)) for at, best in clear if best in labels),
        says=says,
    )


def _says(scores: Sequence[Score], lines: Sequence[Line]) -> tuple[str, ...]:
    says = [
        "Per cent of mteb's main score of each task; ±: the longer side of the 95 % bootstrap band; in brackets: "
        "deviation over mteb's own runs, where there are several."
    ]
    if any(line.row == AVERAGE for line in lines):
        says.append("The average is over types of tasks.")
    if any(line.printed for line in lines):
        says.append("The paper's figures (Tables 7 to 9) stand under ours; it prints no bands.")
    newer = {score.task: score.newer for score in scores if score.newer}
    if newer:
        says.append(f"mteb has newer versions of some: {', '.join(newer.values())}.")
    return tuple(word for word in (*says, ranking(lines)) if word)


def _lines(scores: Sequence[Score], settings: Sequence[Setting], model: str) -> list[Line]:
    tasks: dict[str, dict[str, Cell]] = {}
    kinds: dict[str, dict[str, list[Cell]]] = {}
    found = []
    for score in scores:
        cell = Cell(
            value=100 * score.score,
            deviation=None if score.deviation is None else 100 * score.deviation,
            low=None if score.low is None else 100 * score.low,
            high=None if score.high is None else 100 * score.high,
        )
        tasks.setdefault(score.task, {})[score.setting.label] = cell
        kinds.setdefault(score.type, {}).setdefault(score.setting.label, []).append(cell)
    for task, cells in tasks.items():
        found.append(_line(task, cells, model))
        found += _printed(task, settings, model)
    means = {kind: {label: mean(cells) for label, cells in by.items()} for kind, by in kinds.items()}
    found += [_line(f"{kind} (mean)", cells, model) for kind, cells in means.items() if _several(kinds[kind])]
    if len(means) > 1:
        labels = next(iter(means.values()))
        found.append(_line(AVERAGE, {one: mean([cells[one] for cells in means.values()]) for one in labels}, model))
    return found


def _several(cells: Mapping[str, Sequence[Cell]]) -> bool:
    return any(len(ones) > 1 for ones in cells.values())


def _line(row: str, cells: Mapping[str, Cell], model: str, printed: bool = False) -> Line:
    return Line(row=row, prompt="None", whose=model, printed=printed, cells=cells)


def _printed(task: str, settings: Sequence[Setting], model: str) -> list[Line]:
    """The paper's figures of one of its models in a task, for the settings that its columns stand for."""
    known = CHECKPOINTS.get(model)
    if known is None:
        return []
    cells = {}
    for one in settings:
        prompt = _prompt(one)
        printed = "USMoE" if one.router == _UNIFIED else _PRINTED.get(one.router, {}).get(one.embedding)
        value = details("", known.paper, prompt).get(task, {}).get(printed or "") if prompt else None
        if value is not None and one.pooling == "last" and one.moee == "concat":
            cells[one.label] = Cell(value=value)
    return [_line(task, cells, known.paper, printed=True)] if cells else []


def _prompt(setting: Setting) -> Prompt | None:
    """The paper's row of a prompt."""
    if setting.prompt in ("none", "quoted"):
        return "None"
    return "Prompt" if setting.prompt == "prompteol" else None


def language_view(scores: Mapping[str, Sequence[TaskScore]], model: str) -> View:
    """A row a task and metric, a column a router: value ± standard error."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    first = next((one for ones in scores.values() for one in ones), None)
    for router, ones in scores.items():
        for one in ones:
            error = "" if one.stderr is None else f" ±{one.stderr:.4f}"
            metric = one.metric if one.filter == "none" else f"{one.metric}, {one.filter}"
            rows.setdefault((one.alias.strip(" -"), metric), {})[router] = f"{one.value:.4f}{error}"
    says = ["±: one standard error, as lm-eval finds it."]
    if first is not None:
        what = "each token from those before it alone" if first.scoring == "honest" else "all tokens in one forward"
        says.append(f"Scoring: {first.scoring}, {what}; {first.num_fewshot} solved examples.")
        says += [f"The first {first.limit} samples of each task."] if first.limit else []
    return View(
        title=f"{paper_name(model)}: language tasks",
        head=("task", "metric", *scores),
        rows=tuple((task, metric, *(cells.get(one, "-") for one in scores)) for (task, metric), cells in rows.items()),
        labels=2,
        bold=(),
        says=tuple(says),
    )
