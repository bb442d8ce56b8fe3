"""A plan of an experiment on training, without its texts: what the tests of plans and of tables share."""

from __future__ import annotations

import pytest

from usmoe.data.sources import Source
from usmoe.reproduce import Asked, find
from usmoe.reproduce.training.plan import Plan, plan

WHOLE = Source(name="made up", splits={"whole": ()}, identity={}, sentence="")
"""A text that has every split."""


def planned(name: str, **asked) -> Plan:
    """A plan without looking for texts."""
    patch = pytest.MonkeyPatch()
    patch.setattr("usmoe.data.sources.find_source", lambda corpus, data: WHOLE)
    try:
        return plan(find(name), Asked(**asked))
    finally:
        patch.undo()
