"""The experiments on training from scratch: Tables 2, 12 and 14, Figures 6 and 12b.

runs.py      a model to be trained, as a value; the small scale
study.py     each experiment's rows, and what is to be said of them
plan.py      what is run, saved whole beside what came out
measure.py   the figures of a trained model, kept beside it
run.py       training and measuring, with what is there already
compare.py   means over seeds, and samples that can be compared
render.py    the paper's figure and ours, as words and as a picture
details.py   other readings, what routers do and cost, curves
kind.py      these as a kind of experiment
"""

from usmoe.reproduce.training.runs import CORPORA, SEEDS, SMALL, SWEEP_STEPS, Run, digest, small_run

__all__ = ["CORPORA", "SEEDS", "SMALL", "SWEEP_STEPS", "Run", "digest", "small_run"]
