"""The paper's tables and figures as named experiments: its figures as data, ours as saved results, both side by side.

experiment.py        every table and figure by name, built or not
paper/, figures.py   what the paper prints, with what does not add up in it
kind.py              what every kind of experiment can do: embeddings/, training/ ...
saved.py             results on disk, and the command that gives each
given.py             what a configuration says beside its defaults, and digests
paired.py            which rows can be told apart
view.py, views.py    tables in words; those of `usmoe eval`
"""

from usmoe.reproduce.experiment import EXPERIMENTS, Experiment, find
from usmoe.reproduce.figures import PaperFigures, paper_figures
from usmoe.reproduce.kind import Asked, kind_of
from usmoe.reproduce.saved import load, markdown, save

__all__ = [
    "EXPERIMENTS",
    "Asked",
    "Experiment",
    "PaperFigures",
    "find",
    "kind_of",
    "load",
    "markdown",
    "paper_figures",
    "save",
]
