"""Bars by type of task, a panel a model, and the distribution of figures over tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from usmoe.report.whole import whole_picture

_COLOURS = ("#777777", "#2e6f95", "#d1495b", "#edae49", "#66a182", "#8d6a9f")
Numbers = Mapping[str, Mapping[str, tuple[float, float | None]]]


def bars_plot(
    path: Path,
    panels: Mapping[str, Mapping[str, Numbers]],
    spread: Mapping[str, Mapping[str, Sequence[float]]],
    title: str,
) -> None:
    """Write a picture (.png, .svg or .pdf), whole or not at all: a panel of bars for each model and prompt, and under
    each, where `spread` has it, a panel with a box a method over all tasks.

    panels  {panel: {"bars": {group: {method: (per cent, half-length of the error bar or None)}}, "marks": the same for
            the paper's figures, drawn as short lines across the bars}}
    spread  {panel: {method: per cent, one a task}}
    """
    from matplotlib.figure import Figure

    tall = 2 if spread else 1
    figure = Figure(figsize=(max(6.0, 4.2 * len(panels)), 3.4 * tall), layout="constrained")
    axes = figure.subplots(tall, len(panels), squeeze=False, sharey="row")
    for at, (name, panel) in enumerate(panels.items()):
        _bars(axes[0][at], panel["bars"], panel["marks"])
        axes[0][at].set_title(name, fontsize=9)
        if spread:
            _boxes(axes[1][at], spread[name])
    for row in axes:
        row[0].set_ylabel("mteb's main score, %", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9)
    whole_picture(figure, path)


def _bars(axes: Any, bars: Numbers, marks: Numbers) -> None:
    methods = list(dict.fromkeys(method for group in bars.values() for method in group))
    width = 0.8 / max(1, len(methods))
    for at, (method, colour) in enumerate(zip(methods, _cycle(len(methods)), strict=True)):
        places = [group + (at - (len(methods) - 1) / 2) * width for group in range(len(bars))]
        there = [(place, group[method]) for place, group in zip(places, bars.values(), strict=True) if method in group]
        axes.bar([x for x, _ in there], [y for _, (y, _) in there], width, color=colour, label=method)
        for x, (y, error) in there:
            if error is not None:
                axes.errorbar(x, y, yerr=error, color="#222222", linewidth=0.8, capsize=1.5)
        printed = [marks.get(group, {}).get(method) for group in bars]
        for x, mark in zip(places, printed, strict=True):
            if mark is not None:
                axes.hlines(mark[0], x - width / 2, x + width / 2, color="#000000", linewidth=1.4)
    axes.set_xticks(range(len(bars)), list(bars), fontsize=7, rotation=20)


def _boxes(axes: Any, methods: Mapping[str, Sequence[float]]) -> None:
    drawn = axes.boxplot(list(methods.values()), patch_artist=True, widths=0.6, medianprops={"color": "#222222"})
    for box, colour in zip(drawn["boxes"], _cycle(len(methods)), strict=True):
        box.set_facecolor(colour)
    axes.set_xticks(range(1, len(methods) + 1), list(methods), fontsize=7, rotation=20)
    axes.set_xlabel("over tasks", fontsize=8)


def _cycle(number: int) -> list[str]:
    return [_COLOURS[at % len(_COLOURS)] for at in range(number)]
