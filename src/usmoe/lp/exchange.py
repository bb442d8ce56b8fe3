"""Exchanges: from the best pairs at given prices to the best pairs within the bounds, one shortest path at a time.

Where prices leave an expert with more pairs than it should have and another with fewer, a chain of exchanges carries
the surplus over: a token leaves expert a for b, another leaves b for c, ...; or one drops a pair and another takes one
up. The chain that costs least keeps the selection optimal for what has been settled so far (successive shortest
paths, Ahuja, Magnanti and Orlin 1993, section 9.7), so that the last one ends at an optimum, whatever the prices were:
good prices only make the chains few. Tokens are contracted: the graph has a node an expert, and two more.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

Costs = NDArray[np.float64]
Counts = NDArray[np.int64]


class Exchange:
    """One program in the course of its repair. Nodes: experts 0 to E-1, then PARKED, then OUTSIDE.

    From a to b, a token leaves expert a for b. From a to PARKED a token drops a; from PARKED to b another takes b up.
    OUTSIDE stands for the slack between an expert's floor and its cap.
    """

    def __init__(
        self,
        scores: Costs,
        mask: NDArray[np.bool_],
        prices: Costs,
        tokens: tuple[Counts, Counts],
        experts: tuple[Counts, Counts],
        budget: int | None,
    ) -> None:
        """scores (S, E) and prices (E) are whole numbers (as floats), so that sums of them are exact; -inf for a pair
        that cannot be taken. mask (S, E) holds the best pairs at the prices within the bounds of the tokens."""
        self.scores, self.mask = scores, mask.copy()
        self.tokens, self.experts, self.budget = tokens, experts, budget
        self.count = self.mask.sum(1)
        size = scores.shape[1]
        self.parked, self.outside = size, size + 1
        load = self.mask.sum(0)
        low, high = experts
        self.wanted = np.where(prices > 0, high, np.where(prices < 0, low, load.clip(low, high)))
        total = load.sum() if budget is None else budget
        self.surplus = np.concatenate([load - self.wanted, [0, self.wanted.sum() - total]])
        self.cost = np.full((size + 2, size + 2), np.inf)
        self.by = np.full((size + 2, size + 2), -1)
        """The token whose exchange each cost is."""
        for expert in range(size):
            self._look_from(expert)
        self._look_at_parked(np.arange(size))
        self._look_outside()

    def run(self) -> NDArray[np.bool_]:
        """The mask of an optimum.

        Each chain takes one pair from a surplus to a shortage, and no other surplus changes: so there are as many
        chains as there are pairs in surplus, S*E + budget at most, each found by E + 2 rounds over the (E + 2)^2 costs.
        """
        for _ in range(self.left()):
            before = self.left()
            self._carry(self._cheapest_chain())
            if self.left() != before - 1:
                raise RuntimeError("A chain of exchanges has not settled one pair: a fault of usmoe.lp.")
        return self.mask

    def left(self) -> int:
        """Pairs in surplus."""
        return int(self.surplus.clip(min=0).sum())

    def potentials(self) -> tuple[Costs, float]:
        """Prices of the experts, and the level of the budget (0 without one), at which the optimum, once it is found,
        is the best selection: exact dual values. A pair that a token may drop scores the level or more, net of its
        expert's price, and one that it may take up scores the level or less."""
        distance = np.full(len(self.surplus), np.inf)
        distance[self.outside] = 0.0
        distance = _shortest(distance, self.cost)
        apart = np.isinf(distance)
        if (
            apart.any()
        ):  # nothing leads there from outside: any potentials will do that are high enough for what follows
            among = _shortest(np.zeros(apart.sum()), self.cost[np.ix_(apart, apart)])
            lift = (distance[~apart] - self.cost[np.ix_(apart, ~apart)] - among[:, None]).max(initial=-np.inf)
            distance[apart] = among + (lift if lift > -np.inf else 0.0)
        return -distance[: self.parked], float(distance[self.parked])

    def _cheapest_chain(self) -> list[int]:
        """Nodes from one with a surplus to one with a shortage (Bellman and Ford, all nodes at once)."""
        distance = np.where(self.surplus > 0, 0.0, np.inf)
        before = np.full(len(distance), -1)
        for _ in distance:
            through = distance[:, None] + self.cost
            best = through.argmin(0)
            reached = through[best, np.arange(len(best))]
            shorter = reached < distance
            if not shorter.any():
                break
            distance = np.where(shorter, reached, distance)
            before = np.where(shorter, best, before)
        ends = np.where(self.surplus < 0, distance, np.inf)
        node = int(ends.argmin())
        if ends[node] == np.inf:
            raise RuntimeError("No chain of exchanges is left, though the bounds can be met: a fault of usmoe.lp.")
        chain = [node]
        while before[node] >= 0:
            node = int(before[node])
            if node in chain:
                raise RuntimeError(
                    "Exchanges in a circle would pay, though the selection is the best: a fault of usmoe.lp."
                )
            chain.append(node)
        return chain[::-1]

    def _carry(self, chain: list[int]) -> None:
        """Do the exchanges of a chain, and look again where they have changed what can be exchanged."""
        moves = [(a, b, int(self.by[a, b])) for a, b in itertools.pairwise(chain)]
        self.surplus[chain[0]] -= 1
        self.surplus[chain[-1]] += 1
        changed = set()
        for a, b, token in moves:
            if self.outside in (a, b):
                if a < self.parked:
                    self.wanted[a] += 1
                elif b < self.parked:
                    self.wanted[b] -= 1
                continue
            changed.add(token)
            if a != self.parked:
                self.mask[token, a] = False
                self.count[token] -= 1
            if b != self.parked:
                self.mask[token, b] = True
                self.count[token] += 1
        tokens = np.array(sorted(changed), dtype=np.int64)
        if len(tokens):
            experts = self.parked
            stale = np.isin(self.by[:experts, :experts], tokens).any(1)
            for expert in np.flatnonzero(stale):
                self._look_from(int(expert))
            for token in tokens:
                self._offer(int(token))
            # through PARKED, counts of tokens have changed, and with them all that these may drop or take up
            seen = range(experts) if self.parked in chain else [node for node in chain if node < experts]
            self._look_at_parked(np.array(seen))
        self._look_outside()

    def _look_from(self, expert: int) -> None:
        """The cheapest exchanges of this expert for each other one."""
        holders = np.flatnonzero(self.mask[:, expert])
        experts = self.parked
        if not len(holders):
            self.cost[expert, :experts], self.by[expert, :experts] = np.inf, -1
            return
        gained = np.where(self.mask[holders], -np.inf, self.scores[holders])
        lost = self.scores[holders, expert][:, None] - gained
        best = lost.argmin(0)
        self.cost[expert, :experts] = lost[best, np.arange(experts)]
        self.by[expert, :experts] = holders[best]

    def _offer(self, token: int) -> None:
        """Whatever this token can exchange more cheaply than what is known."""
        held = np.flatnonzero(self.mask[token])
        free = np.flatnonzero(~self.mask[token])
        where = np.ix_(held, free)
        cost = self.scores[token, held][:, None] - self.scores[token, free]
        better = cost < self.cost[where]
        self.cost[where] = np.where(better, cost, self.cost[where])
        self.by[where] = np.where(better, token, self.by[where])

    def _look_at_parked(self, experts: Counts) -> None:
        """The cheapest pairs of these experts to drop and to take up."""
        low, high = self.tokens
        mask, scores = self.mask[:, experts], self.scores[:, experts]
        for table, can, lost in (
            ((experts, self.parked), mask & (self.count > low)[:, None], scores),
            ((self.parked, experts), ~mask & (self.count < high)[:, None], -scores),
        ):
            cost = np.where(can, lost, np.inf)
            best = cost.argmin(0)
            self.cost[table] = cost[best, np.arange(len(experts))]
            self.by[table] = best

    def _look_outside(self) -> None:
        """Who may have more or fewer pairs; without a budget, so may the whole."""
        low, high = self.experts
        self.cost[: self.parked, self.outside] = np.where(self.wanted < high, 0.0, np.inf)
        self.cost[self.outside, : self.parked] = np.where(self.wanted > low, 0.0, np.inf)
        if self.budget is None:
            self.cost[self.outside, self.parked] = 0.0
            self.cost[self.parked, self.outside] = 0.0


def _shortest(distance: Costs, cost: Costs) -> Costs:
    """The shortest distances, none longer than those given (Bellman and Ford, all nodes at once)."""
    for _ in distance:
        shorter = (distance[:, None] + cost).min(0)
        if not (shorter < distance).any():
            break
        distance = np.minimum(distance, shorter)
    return distance
