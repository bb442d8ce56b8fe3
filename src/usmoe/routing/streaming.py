"""Streaming: what a router remembers of a sequence, so that chunks of it are routed as the whole would be.

A sequence runs through segments (packed examples), one after the other; what is remembered is that of the running
segment alone, and a new segment begins anew.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from usmoe.routing.pools import Pools, pools


@dataclass(frozen=True, kw_only=True, eq=False)
class Stream:
    """The state of a streaming router between two chunks: `routing.state` of one is `state` of the next.

    The bucket needs three integers a sequence. The prefix pool is exact, so it needs all scores that its pairs had: at
    most t*E floats a sequence after t tokens. That grows, like the keys and values of attention, of which it is a small
    share (64 experts beside 2 x 2048 channels: 1/64), and it cannot be bounded without a sketch: however low a pair
    ranks today, budget that later tokens do not need makes it a yardstick tomorrow. Nothing in it has a gradient.
    """

    tokens: Int[Tensor, " B"]
    """Real tokens of the running segment so far."""
    used: Int[Tensor, " B"]
    """Pairs that they were given."""
    segment: Int[Tensor, " B"]
    """Id of the running segment; 0 where there were no segments."""
    experts: int
    """E."""
    scores: Float[Tensor, "B M"] | None = None
    """pool="prefix": the scores of all their pairs, ascending, -inf in front to equal length."""

    @staticmethod
    def begin(batch: int, experts: int, device: torch.device, dtype: torch.dtype | None = None) -> Stream:
        """The state before the first token; with a dtype, one that remembers scores."""
        nothing = torch.zeros(batch, dtype=torch.long, device=device)
        scores = None if dtype is None else torch.empty(batch, 0, dtype=dtype, device=device)
        return Stream(tokens=nothing, used=nothing, segment=nothing, experts=experts, scores=scores)

    def like(self, scores: Float[Tensor, "T E"]) -> Stream:
        """The same on the device and in the dtype of the scores."""
        kept = None if self.scores is None else self.scores.to(scores)
        counts = {name: getattr(self, name).to(scores.device) for name in ("tokens", "used", "segment")}
        return Stream(**counts, experts=self.experts, scores=kept)

    def select(self, index: Int[Tensor, " N"]) -> Stream:
        """The state of the sequences of that index, in that order: for beam search."""
        kept = {name: getattr(self, name) for name in ("tokens", "used", "segment", "scores")}
        chosen = {name: None if x is None else x.index_select(0, index.to(x.device)) for name, x in kept.items()}
        return dataclasses.replace(self, **chosen)


def check_state(state: Any, router: Any, batch: int, experts: int, remembers_scores: bool) -> None:
    """Raise TypeError or ValueError unless `state` is one of this kind of router, for as many sequences and experts."""
    if state is None:
        return
    if not isinstance(state, Stream):
        raise TypeError(
            f"The state of {router} is a {type(state).__name__}. Give routing.state of the previous chunk, or None for "
            "the first."
        )
    if len(state.tokens) != batch:
        raise ValueError(
            f"The state is that of {len(state.tokens)} sequences, and this chunk has {batch}. A chunk holds the next "
            "tokens of the same sequences, in the same order."
        )
    if (state.scores is not None) != remembers_scores or state.experts != experts:
        raise ValueError(f"The state comes from another router than {router}. Give routing.state of this one, or None.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Runs:
    """A chunk by (sequence, segment): G rows of tokens in order, each with what is remembered of its segment."""

    group: Pools
    sequence: Int[Tensor, " G"]
    """The sequence of each row."""
    before: Stream
    """What each row begins with: G entries."""

    @property
    def place(self) -> Int[Tensor, "G S"]:
        """t: how many real tokens of its segment there are up to each token, itself included, from 1."""
        return self.before.tokens[:, None] + self.group.present.cumsum(1)

    def after(self, old: Stream, used: Int[Tensor, " G"], scores: Float[Tensor, "G M"] | None) -> Stream:
        """The state after the chunk: that of each sequence's last row; the old one where it has no token here."""
        rows = self.group.present.any(1).nonzero().squeeze(1)  # ascending by sequence, then segment: the last one stays
        where = self.sequence[rows]
        tokens = self.place[rows, -1] if self.group.present.shape[1] else self.before.tokens[rows]
        return Stream(
            tokens=_last(old.tokens, where, tokens),
            used=_last(old.used, where, used[rows]),
            segment=_last(old.segment, where, self.before.segment[rows]),
            experts=old.experts,
            scores=None if old.scores is None or scores is None else _last_scores(old.scores, where, scores[rows]),
        )


def runs(competes: Bool[Tensor, "B L"], segments: Int[Tensor, "B L"] | None, state: Stream) -> Runs:
    """The rows of a chunk. A segment is a run of one id: where the id changes from one real token to the next, a new
    segment begins, and the first goes on with the state where it has its id."""
    batch, length = competes.shape
    if segments is None:
        group = pools("sequence", batch, length, competes)
        sequence = torch.arange(batch, device=competes.device)
        ids, first = torch.zeros_like(sequence), torch.ones_like(sequence, dtype=torch.bool)
    else:
        group = pools("sequence", batch, length, competes, _numbered(competes, segments))
        head = group.rows[:, :1].squeeze(1) if group.rows.shape[1] else group.rows.new_zeros(len(group.rows))
        sequence = head // max(length, 1)
        ids = segments.reshape(-1)[head]
        first = torch.ones_like(sequence, dtype=torch.bool)
        first[1:] = sequence[1:] != sequence[:-1]
    goes_on = first & (state.segment[sequence] == ids)

    def of_rows(values: Tensor, empty: float) -> Tensor:
        keep = goes_on.view(-1, *[1] * (values.ndim - 1))
        return values[sequence].where(keep, empty)

    before = Stream(
        tokens=of_rows(state.tokens, 0),
        used=of_rows(state.used, 0),
        segment=ids,
        experts=state.experts,
        scores=None if state.scores is None else of_rows(state.scores, -torch.inf),
    )
    return Runs(group=group, sequence=sequence, before=before)


def _numbered(competes: Tensor, segments: Tensor) -> Tensor:
    """0, 1, 2, ... for the segments of each sequence, as they follow each other among its real tokens."""
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    latest = index.where(competes, -1).cummax(1).values
    previous = torch.cat([torch.full_like(latest[:, :1], -1), latest[:, :-1]], 1)
    changes = competes & (previous >= 0) & (segments != segments.gather(1, previous.clamp(min=0)))
    return changes.cumsum(1)


def _last(old: Tensor, where: Tensor, values: Tensor) -> Tensor:
    """`old` with the last of the values for each place; places ascend."""
    last = torch.ones_like(where, dtype=torch.bool)
    last[:-1] = where[1:] != where[:-1]
    return old.index_put((where[last],), values[last].to(old.dtype))


def _last_scores(old: Tensor, where: Tensor, scores: Tensor) -> Tensor:
    """The same for rows of ascending scores, without the -inf that all have in front."""
    width = max(old.shape[1], scores.shape[1])

    def widened(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (width - values.shape[1], 0), value=-torch.inf)

    kept = _last(widened(old), where, widened(scores))
    longest = int((kept > -torch.inf).sum(1).max()) if kept.numel() else 0
    return kept[:, width - longest :]


@torch.no_grad()
def spend(
    count: Int[Tensor, "G S"], place: Int[Tensor, "G S"], used: Int[Tensor, " G"], k: float, burst: float
) -> Int[Tensor, "G S"]:
    """How many of the `count` pairs that each token wants the token bucket lets it have.

    used(t) = min(used(t-1) + count(t), floor(k*t + burst)), t being `place` and `used` the pairs of the tokens before
    the chunk. Unrolled, with C the running sum of count, used(t) = C(t) + min(used(0), min over s <= t of
    floor(k*s + burst) - C(s)): a running minimum, no loop.
    """
    level = (place.double() * k + burst).floor().long()
    # a state of a larger budget: nothing is spent, not even a floor, until this one has caught up
    level = level.maximum(used[:, None])
    total = count.cumsum(1)
    spent = total + (level - total).cummin(1).values.minimum(used[:, None])
    return spent.diff(dim=1, prepend=used[:, None])
