"""A patched model under routers with memory, and what its outputs know of later tokens."""

from __future__ import annotations

import pytest
import torch

import usmoe
from tiny import tiny, tokens

REMEMBERS = [usmoe.USMoE(k=2, pool="prefix"), usmoe.USMoE(k=2, pool="threshold", threshold=0.1, burst=4)]


@pytest.mark.parametrize("router", REMEMBERS, ids=str)
def test_a_router_with_memory_runs_whole_sequences_and_refuses_half_of_one(router):
    """A cache of keys and values does not hold what the router remembers: going on from one would route otherwise."""
    model = usmoe.patch(tiny(), router)
    x = tokens(2, 12)
    whole = model(x, use_cache=True)
    with pytest.raises(ValueError, match=r"remembers the tokens before.*use_cache=False"):
        model(x[:, -1:], past_key_values=whole.past_key_values)
    with pytest.raises(ValueError, match="remembers the tokens before"):
        model.model(x[:, -1:], past_key_values=whole.past_key_values)
    with pytest.raises(ValueError, match="remembers the tokens before"):
        model.generate(x, max_new_tokens=3, do_sample=False)
    grown = model.generate(x, max_new_tokens=3, do_sample=False, use_cache=False)
    for t in range(12, 15):  # what it wrote is what a forward over the whole says
        assert torch.equal(model(grown[:, :t]).logits[:, -1].argmax(-1), grown[:, t])


@pytest.mark.parametrize("router", [usmoe.USMoE(k=1.5, pool="prefix", burst=4), usmoe.USMoE(k=1.5)], ids=str)
def test_outputs_depend_on_later_tokens_exactly_where_the_router_looks_ahead(router):
    model = usmoe.patch(tiny(initializer_range=0.5).double(), router)
    x = tokens(2, 12)
    difference = (model(x).logits[:, :7] - model(x[:, :7]).logits).abs().max().item()
    assert (difference < 1e-12) is router.promises.causal
