"""The linear program of routing: the best (token, expert) pairs under a budget, floors and caps."""

from usmoe.lp.compare import Quota, compare
from usmoe.lp.solve import Solution, solve

__all__ = ["Quota", "Solution", "compare", "solve"]
