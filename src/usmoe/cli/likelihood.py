"""`usmoe eval RUN`: how well a model that `usmoe train` made predicts a text, every way it is read side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from usmoe.cli import options
from usmoe.reproduce.view import View

if TYPE_CHECKING:
    from usmoe.train.figures import Figures, Measured


def figures_of_run(
    folder: Path,
    *,
    text: Path | None,
    split: str,
    positions: int,
    k: float | None,
    tokens: int | None,
    data: Path | None,
    seed: int,
    device: str,
    offline: bool,
) -> Figures:
    """The figures of a run's best model on a split of its corpus, or on another text.

    k       experts a token to serve by a threshold at, beside the model's own; found on the validation split
    tokens  of the split, from its beginning; None: all

    Raises ValueError where the text is missing or cannot be read by the model's vocabulary.
    """
    import dataclasses

    from usmoe.data.prepare import prepare
    from usmoe.train.evaluation import evaluate_model
    from usmoe.train.figures import Serving
    from usmoe.train.folder import load_run

    trained = load_run(folder, device=device)
    cache = folder.parent / ".corpora"
    own = trained.config.corpus
    wanted = {split} if text is None else set()
    served = [Serving(how="threshold"), Serving(how="prefix")]
    if k is not None:
        served.append(Serving(how="threshold", k=k, calibrated=True))
        wanted.add("validation")
    given = None
    if wanted:
        given = prepare(own, cache, data=data, offline=offline, vocabulary=trained.vocabulary, splits=sorted(wanted))
    if text is not None:
        read = trained.vocabulary.encode(options.read_text(str(text)))
    else:
        assert given is not None
        read = given.tokens[split]
    return evaluate_model(
        trained,
        read,
        dataclasses.replace(trained.config.evaluation, tokens=tokens),
        positions=positions,
        served=served,
        calibration=None if k is None or given is None else given.validation[: trained.config.evaluation.tokens],
        seed=seed,
        progress=True,
    )


def view_of(figures: Figures, folder: Path) -> View:
    """A table: one row a way to read the text."""
    unit = {"character": "bits a character", "byte": "bits a byte", "word": "perplexity a word"}[figures.unit]
    low, high = figures.honest_interval
    within = f" ± {(high - low) / 2:.4f}" if figures.honest.positions else ""
    rows = [_row("teacher-forced", figures, figures.forced)]
    rows.append(("honest", f"{figures.stated(figures.honest.nats):.4f}{within}", "", "", "", "", ""))
    for name, one in (("memory reset", figures.reset), ("batch of one", figures.alone)):
        if one is not None:
            rows.append(_row(name, figures, one))
    rows += [_row(f"served by {name}", figures, one) for name, one in figures.served.items()]
    says = [f"{figures.tokens:,} tokens; {', '.join(figures.routers) or 'dense'}; step {figures.step} of {folder}."]
    if figures.honest.positions:
        says.append(f"Honest: each token from those before it alone, {figures.honest.positions} positions.")
    elif figures.routers:
        says.append("The router looks neither ahead nor across the batch: teacher-forced is honest.")
    says += [f"Not served by {name}: {why}" for name, why in figures.unserved.items()]
    head = ("", unit, "experts\na token", "dropped", "load CV", "MFLOPs\na token", "of two\nexperts")
    return View(title=f"{folder}", head=head, labels=1, rows=tuple(rows), bold=(), says=tuple(says))


def _row(name: str, figures: Figures, one: Measured) -> tuple[str, ...]:
    routed = (one.experts, one.dropped, one.load_cv)
    words = ["" if value is None else f"{value:.3f}" for value in routed]
    share = "" if one.relative is None else f"{one.relative:.3f}"
    return (name, f"{figures.stated(one.nats):.4f}", *words, f"{one.flops / 1e6:.3f}", share)
