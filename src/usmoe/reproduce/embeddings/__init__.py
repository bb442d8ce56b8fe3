"""The experiments on sentence embeddings: Tables 5 to 11, Figures 3, 4, 7 and 8.

study.py     each experiment's columns and rows, and what is to be said of them
plan.py      what is run, saved whole beside what came out
run.py       scoring, with what is there already
compare.py   the paper's figure and ours, line under line
render.py    the same as words and as a picture
kind.py      these as a kind of experiment
"""
