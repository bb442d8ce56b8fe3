"""Router maps (the paper's Figures 9 to 11): tokens by experts, the logits as colour, the chosen pairs marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from usmoe.report.whole import whole_picture
from usmoe.types import RouterOutput


def router_maps(
    path: Path,
    said: Mapping[str, Mapping[str, RouterOutput]],
    words: Sequence[str],
) -> None:
    """Write a picture (.png, .svg or .pdf), whole or not at all: a row of panels a router, a panel a layer.

    said   {title: {layer name: RouterOutput}}; the first sequence of each is drawn
    words  the tokens of that sequence as text; as many are drawn as there are words
    """
    from matplotlib.figure import Figure

    titles, layers = list(said), list(next(iter(said.values())))
    experts = next(iter(said[titles[0]].values())).logits.shape[-1]
    figure = Figure(
        figsize=(1.2 + max(1.6, 0.13 * experts) * len(layers), 0.8 + len(titles) * (0.4 + 0.15 * len(words))),
        layout="constrained",
    )
    axes = figure.subplots(len(titles), len(layers), squeeze=False, sharey=True)
    for row, title in enumerate(titles):
        for column, layer in enumerate(layers):
            panel, one = axes[row][column], said[title][layer]
            shown = min(len(words), one.logits.shape[1])
            panel.imshow(one.logits[0, :shown].float().cpu().numpy(), aspect="auto", cmap="Greys", interpolation="none")
            token, expert = one.routing.token.cpu(), one.routing.expert.cpu()
            drawn = token < shown
            panel.scatter(expert[drawn].numpy(), token[drawn].numpy(), s=16, c="#d1495b", marker="s", linewidths=0)
            panel.set_xticks([0, experts - 1])
            panel.set_yticks(range(shown), [_plain(word) for word in words[:shown]], fontsize=6)
            panel.tick_params(length=0)
            if row == 0:
                panel.set_title(layer, fontsize=7)
            if column == 0:
                panel.set_ylabel(title, fontsize=8)
            if row == len(titles) - 1:
                panel.set_xlabel("expert", fontsize=7)
    figure.suptitle("Who goes where: grey = router logit, red = chosen (token, expert) pair", fontsize=9)
    whole_picture(figure, path)


def _plain(word: str) -> str:
    """A token's text on one line, with nothing that matplotlib would read as mathematics."""
    return word.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t").replace("$", r"\$") or "''"
