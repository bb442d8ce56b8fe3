"""Data sets, for training and evaluation alike: where they are, and text as tokens and batches."""
