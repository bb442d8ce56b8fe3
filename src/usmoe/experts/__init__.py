"""Expert computation over expert-sorted pairs: a plain loop as the oracle, and the fast path tested against it."""

from usmoe.experts.compute import Activation, combine, experts_by_loop, experts_by_pairs
from usmoe.experts.grouped import grouped_linear

__all__ = ["Activation", "combine", "experts_by_loop", "experts_by_pairs", "grouped_linear"]
