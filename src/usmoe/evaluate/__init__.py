"""Evaluation: tasks, data, scores and their bands."""
