"""Curves of a training run: a figure step by step, a line a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from usmoe.report.whole import whole_picture

_COLOURS = ("#2e6f95", "#d1495b", "#777777", "#edae49", "#66a182", "#8d6a9f")
_NAMES = {
    "bits": "bits a character",
    "perplexity": "perplexity",
    "dropped": "tokens without an expert, %",
}


def curves_plot(
    path: Path,
    panels: Mapping[tuple[str, str], Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    title: str,
) -> None:
    """Write a picture (.png, .svg or .pdf), whole or not at all: a row of panels a text, a panel a figure.

    panels  {(text, bits | perplexity | dropped): {label: (steps, values)}}
    """
    from matplotlib.figure import Figure

    texts, figures = (list(dict.fromkeys(one[at] for one in panels)) for at in (0, 1))
    figure = Figure(figsize=(4.6 * len(figures), 0.8 + 2.8 * len(texts)), layout="constrained")
    axes = figure.subplots(len(texts), len(figures), squeeze=False)
    for (text, what), lines in panels.items():
        panel = axes[texts.index(text)][figures.index(what)]
        for at, (label, (steps, values)) in enumerate(lines.items()):
            shown = [100 * one for one in values] if what == "dropped" else values
            panel.plot(steps, shown, color=_COLOURS[at % len(_COLOURS)], linewidth=1.2, label=label)
        panel.set_title(text, fontsize=9)
        panel.set_xlabel("optimizer steps", fontsize=8)
        panel.set_ylabel(_NAMES[what], fontsize=8)
        if what == "bits":  # the first steps would hide the rest
            last = [values[len(values) // 10 :] for _, values in lines.values()]
            panel.set_ylim(min(map(min, last)) - 0.05, max(map(max, last)) + 0.05)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9)
    whole_picture(figure, path)
