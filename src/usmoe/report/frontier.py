"""The frontier: what a model loses for each floating-point operation that it saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from usmoe.report.whole import whole_picture


def frontier_plot(path: Path, ways: Mapping[str, Sequence[tuple[float, float]]], title: str) -> None:
    """Write a picture (.png, .svg or .pdf), whole or not at all: a line a way.

    ways  {label: [(share of the model's own MoE operations, bits a byte above its own choice), ...]}
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for (label, points), colour, marker in zip(ways.items(), ("#777777", "#2e6f95", "#d1495b"), "s^o", strict=False):
        shares, losses = zip(*sorted(points), strict=True)
        axes.plot(shares, losses, color=colour, marker=marker, markersize=5, linewidth=1.2, label=label)
    axes.set_xlabel("MoE operations a token, share of the model's own")
    axes.set_ylabel("bits a byte above own choice, honest")
    axes.axhline(0, color="#cccccc", linewidth=0.8)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(title, fontsize=9)
    whole_picture(figure, path)
