"""The experiment on classification from trained language models: Table 13.

study.py    data sets, rows, and the small scale's settings
plan.py     what is run, saved whole beside what came out
run.py      pre-training, fine-tuning and testing, with what is there already
render.py   the paper's accuracies and ours
kind.py     these as a kind of experiment
"""
