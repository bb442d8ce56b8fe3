"""The paper's tables and figures as named experiments: its figures as data, ours as saved results, both side by side.

experiment.py   every table and figure by name, built or not
paper/, figures.py   what the paper prints, with what does not add up in it
embeddings.py   the experiments on sentence embeddings as settings
plan.py, run.py   what is run, saved whole beside what came out
compare.py, render.py   the paper's figure and ours, and what differs
"""

from usmoe.reproduce.experiment import EXPERIMENTS, Experiment, find
from usmoe.reproduce.figures import PaperFigures, paper_figures
from usmoe.reproduce.plan import Plan, plan
from usmoe.reproduce.run import Result, load, run, save

__all__ = [
    "EXPERIMENTS",
    "Experiment",
    "PaperFigures",
    "Plan",
    "Result",
    "find",
    "load",
    "paper_figures",
    "plan",
    "run",
    "save",
]
