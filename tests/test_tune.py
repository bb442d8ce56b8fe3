"""One budget over all layers, spent where it is worth most: honest likelihood decides."""

import math

import pytest
import torch

import usmoe
from tiny import tiny, tokens
from usmoe.hf.frontier import WAYS, fewer, frontier
from usmoe.hf.layers import moe_layers
from usmoe.hf.tune import _better, _convex, search, trials


def batches(number: int = 3) -> list[torch.Tensor]:
    return [tokens(4, 24, seed) for seed in range(number)]


def teach(model, steps: int = 60) -> None:
    """Give the model something to lose: it learns the batches by heart."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        for x in batches():
            optimizer.zero_grad()
            model(x, labels=x).loss.backward()
            optimizer.step()


def nats(model, routers) -> float:
    with torch.no_grad(), usmoe.patched(model, routers):
        return sum(model(x, labels=x).loss.item() for x in batches()) / 3


def experts(model, routers) -> float:
    """Experts a token over all layers, by count."""
    with torch.no_grad(), usmoe.patched(model, routers), usmoe.record(model) as trace:
        for x in batches():
            model(x)
    counts = [said.routing.experts_per_token.double() for outs in trace.values() for said in outs]
    return torch.cat(counts).mean().item()


@pytest.mark.slow
def test_the_budget_moves_to_the_layer_where_it_is_worth_something():
    """The experts of layer 0 are made worthless: what they get is wasted, and layer 1 should have it."""
    model = tiny()
    teach(model)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj.mul_(0.01)
    found = search(model, batches(), budget=1.5, alphas=(0.0,), floors=(0,))
    assert found.routers[0].k < 1.2 < 1.8 < found.routers[1].k
    assert experts(model, found.routers) == pytest.approx(1.5, abs=0.05)
    even = usmoe.calibrate(model, batches(), usmoe.USMoE(k=1.5))
    assert nats(model, found.routers) < nats(model, even) - 0.02
    assert found.nats == pytest.approx(nats(model, found.routers), abs=1e-4)
    assert found.nats < found.even_nats


def test_tune_gives_one_causal_threshold_router_a_layer_within_the_budget():
    model = tiny()
    ticks = []
    routers = usmoe.tune(model, batches(), budget="0.75x", tick=lambda: ticks.append(1))
    assert [router.pool for router in routers] == ["threshold"] * 2
    assert all(router.promises.causal for router in routers)
    assert sum(router.k for router in routers) / 2 <= 3 + 1e-9
    assert experts(model, routers) == pytest.approx(3, abs=0.1)
    assert 0 < len(ticks) <= trials(2)
    assert not hasattr(model, "_usmoe_patch")
    assert usmoe.patch(model, routers)(tokens()).logits.isfinite().all()


def test_padding_is_asked_nothing():
    """Padded on the right, the batches say what they say without the padding."""
    model = tiny()
    wide = [torch.nn.functional.pad(x, (0, 5)) for x in batches()]
    masks = [torch.nn.functional.pad(torch.ones_like(x), (0, 5)) for x in batches()]
    padded = [{"input_ids": x, "attention_mask": mask} for x, mask in zip(wide, masks, strict=True)]
    one, other = (search(model, text, 2, alphas=(0.0,), floors=(0,)) for text in (batches(), padded))
    assert one.nats == pytest.approx(other.nats, abs=1e-4)


def test_training_mode_and_an_earlier_patch_are_put_back():
    model = usmoe.patch(tiny(), usmoe.USMoE(k=1)).train()
    x = tokens()
    before = model(x).logits
    usmoe.tune(model, batches(1), budget=2, alphas=(0.0,), floors=(0,))
    assert model.training
    assert torch.equal(model(x).logits, before)


def test_bad_requests_are_refused_in_a_sentence():
    model = tiny()
    with pytest.raises(ValueError, match="A budget of k=9 experts per token is impossible with 8 experts"):
        usmoe.tune(model, batches(), budget=9)
    with pytest.raises(ValueError, match="'a lot' is not a budget"):
        usmoe.tune(model, batches(), budget="a lot")
    with pytest.raises(TypeError, match=r"Give a list of batches: \[batch\]"):
        usmoe.tune(model, tokens())
    with pytest.raises(ValueError, match="no two real tokens in a row"):
        usmoe.tune(model, [tokens(3, 1)])
    assert not hasattr(model, "_usmoe_patch")


def test_the_convex_hull_leaves_out_what_lies_above_a_chord():
    points = [(1.0, 5.0), (2.0, 4.5), (3.0, 1.0), (4.0, 0.9), (5.0, 0.5)]
    assert _convex(points) == [(1.0, 5.0), (3.0, 1.0), (5.0, 0.5)]


def test_chance_is_not_taken_for_better():
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert _better(losses - torch.tensor([0.1, 0.2, 0.1, 0.2]), losses)
    assert not _better(losses - torch.tensor([1.0, -0.9, 0.9, -0.95]), losses)
    assert not _better(losses, losses)


def test_calibrate_takes_one_router_a_layer():
    model = tiny()
    wanted = [usmoe.USMoE(k=1), usmoe.USMoE(k=2.5, min_experts=1, pool="threshold", threshold=0.0)]
    routers = usmoe.calibrate(model, batches(), wanted)
    assert [router.k for router in routers] == [1, 2.5]
    with torch.no_grad(), usmoe.patched(model, routers), usmoe.record(model) as trace:
        for x in batches():
            model(x)
    means = [torch.cat([o.routing.experts_per_token for o in outs]).double().mean().item() for outs in trace.values()]
    assert means == pytest.approx([1, 2.5], abs=0.02)


def test_fewer_experts_meet_a_fractional_budget_over_the_layers():
    layers = moe_layers(tiny(num_hidden_layers=4))
    assert [router.k for router in fewer(layers, "0.75x")] == [3, 3, 3, 3]
    assert [router.k for router in fewer(layers, 2.5)] == [3, 2, 3, 2]
    assert [router.k for router in fewer(layers, 1.25)] == [1, 2, 1, 1]


def test_the_frontier_has_three_ways_a_budget():
    model = tiny()
    entries = frontier(model, torch.cat(batches(2)), ["0.5x"])
    assert [entry.label for entry in entries] == ["the model's own choice", *(f"{way}, 0.5x" for way in WAYS)]
    for entry in entries[1:]:
        assert experts(model, entry.router) == pytest.approx(2, abs=0.2)
    assert math.isfinite(nats(model, entries[-1].router))
