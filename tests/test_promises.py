"""The page of promises shows what the routers say, and what searches for an exception find."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import pytest
import torch

import usmoe
from every_router import ALL_ROUTERS, plain
from promises_table import ROWS, shown, table
from usmoe import Promises, Routing, TokenChoice, USMoE
from violations import kept_promises

found = cache(table)


@pytest.mark.parametrize("name", ROWS)
def test_a_router_keeps_what_it_promises_and_promises_what_it_keeps(name: str):
    assert found()[1][name] == ROWS[name].promises


def test_the_page_shows_what_was_tested():
    assert shown() == found()[0], "python tests/promises_table.py writes the table anew"


def test_every_kind_of_router_has_a_row():
    masked = [router for router in ALL_ROUTERS if getattr(plain(router), "mask_padding", True)]
    kinds = {(plain(router).name, router.promises) for router in masked}
    assert kinds <= {(plain(router).name, router.promises) for router in ROWS.values()}


@dataclass(frozen=True)
class Lies:
    """Claims what token choice promises, and does what another router does."""

    does: Any
    k: float = 2
    promises: ClassVar[Promises] = TokenChoice(k=2).promises
    name: ClassVar[str] = "token_choice"

    def __call__(self, logits: torch.Tensor, valid: torch.Tensor | None = None, **given: Any) -> Routing:
        return self.does(logits, valid, **given)


@pytest.mark.parametrize("router", [USMoE(k=2), usmoe.ExpertChoice(k=2, pool="batch"), USMoE(k=2, mask_padding=False)])
def test_a_router_that_lies_is_caught(router: Any):
    assert kept_promises(Lies(router)) != Lies.promises
