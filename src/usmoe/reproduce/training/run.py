"""Training and measuring all models of a plan, with what is there already; and the result as one JSON file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usmoe.reproduce.training.measure import Measured, lean, measured
from usmoe.reproduce.training.plan import Plan
from usmoe.reproduce.training.runs import Run

if TYPE_CHECKING:
    from usmoe.data.corpus import Corpus
    from usmoe.data.prepare import Prepared

SCHEMA = 1
RUNS = "runs"
"""Folder in the folder of results: a folder for each trained model, which tables share."""
CORPORA = "corpora"
"""Folder in the folder of results: prepared texts."""
POINTS = 150
"""Points of a curve, at most: means over as many equal parts of the steps."""

Curve = Mapping[str, tuple[float, ...]]
"""step -> after which; bits or perplexity, dropped: means since the point before."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came out of a plan."""

    plan: Plan
    rows: tuple[Measured, ...]
    """Of each model of the plan, in its order, one a text."""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """Of each model by its name, where the experiment shows them."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "schema": SCHEMA,
            "plan": self.plan.to_dict(),
            "rows": [one.to_dict() for one in self.rows],
            "curves": {name: {what: list(one) for what, one in curve.items()} for name, curve in self.curves.items()},
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Result:
        """What `to_dict` made."""
        return Result(
            plan=Plan.from_dict(data["plan"]),
            rows=tuple(map(Measured.from_dict, data["rows"])),
            curves={name: {what: tuple(one) for what, one in curve.items()} for name, curve in data["curves"].items()},
        )


def run(
    plan: Plan,
    results: Path,
    *,
    offline: bool = False,
    anew: bool = False,
    done: Callable[[str], None] = lambda word: None,
    measure: Callable[..., Measured] = measured,
) -> Result:
    """Train every model of the plan and measure it.

    A model that is trained already is read, by this table or another; one that was stopped goes on. Figures are kept
    beside the model.

    anew     measure again what is measured already; a trained model stays: remove its folder to train it again
    done     called with a word when a model is trained, and when it is measured on a text
    measure  in place of `usmoe.reproduce.training.measure.measured`, with its arguments

    Ctrl-C raises KeyboardInterrupt with a checkpoint written. Raises ValueError for a model that learned from another
    text than there is now.
    """
    where: dict[str, Any] = {"data": None if plan.data is None else Path(plan.data), "offline": offline}
    where["device"] = plan.device
    rows, curves, texts = [], {}, {}
    for one in plan.runs:
        folder = results / RUNS / one.name
        trained(one, folder, results / CORPORA, texts=texts, **where)
        done(f"{one.name} trained")
        for text in plan.texts:
            found = measure(one, text, folder, results / CORPORA, plan.measurement, anew=anew, **where)
            rows.append(lean(found))
            done(f"{one.name} {text}")
        if plan.study.curves:
            curves[one.name] = curve(folder, plan.study.curves)
    return Result(plan=plan, rows=tuple(rows), curves=curves)


def trained(
    one: Run,
    folder: Path,
    cache: Path,
    *,
    data: Path | None,
    offline: bool,
    device: str,
    texts: dict[Corpus, Prepared] | None = None,
) -> None:
    """Train a model, or go on with it, unless its last step is there.

    texts  what is prepared already, which is added to: each text is looked at once a table

    Raises ValueError for a model that learned from another text than there is now.
    """
    from usmoe.train.loop import train

    if (folder / "last.safetensors").is_file():
        _refuse_other_text(one, folder, cache, {} if texts is None else texts, data=data, offline=offline)
        return
    try:
        train(one.config, folder, cache=cache, data=data, offline=offline, device=device, resume=True)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"{one.name}: {stop} The same command of usmoe reproduce goes on.") from None


def _refuse_other_text(
    one: Run, folder: Path, cache: Path, texts: dict[Corpus, Prepared], *, data: Path | None, offline: bool
) -> None:
    """A run of an early usmoe does not say what it learned from, and is believed."""
    from usmoe.data.prepare import prepare, prepared_before

    corpus = one.config.corpus
    learned = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("text")
    if learned is None:
        return
    if corpus not in texts:
        texts[corpus] = prepare(corpus, cache, data=data, offline=offline)
    now = texts[corpus]
    if learned == now.digest:
        return
    before = prepared_before(corpus, cache, learned)
    if before is not None and _files(before) == _files(now):  # prepared by another usmoe
        return
    raise ValueError(
        f"The model in {folder} learned from another text ({learned}) than {corpus.source} holds now in "
        f"{data or 'the hub'} ({now.digest}). Put that text back, or give another --results."
    )


def _files(prepared: Prepared) -> Any:
    """What says which text was prepared."""
    return json.loads((prepared.folder / "manifest.json").read_text(encoding="utf-8"))["text"]


def curve(folder: Path, wanted: tuple[str, ...]) -> Curve:
    """What the log of a run says of each, step by step: means over at most POINTS parts of the steps."""
    from usmoe.train.folder import RunFolder

    lines = [line for line in RunFolder(folder).rows() if "loss" in line]
    each = -(-len(lines) // POINTS) or 1
    parts = [lines[at : at + each] for at in range(0, len(lines), each)]
    found: dict[str, tuple[float, ...]] = {"step": tuple(part[-1]["step"] for part in parts)}
    for what in wanted:
        values = [[line[what] for line in part if line.get(what) is not None] for part in parts]
        found[what] = tuple(round(sum(one) / len(one), 5) for one in values if one)
    return found
