"""Thresholds from text, and the two likelihoods."""

import math

import pytest
import torch

import usmoe
from tiny import tiny, tokens
from usmoe.cli.tokens import token_ids
from usmoe.hf.likelihood import honest, teacher_forced
from usmoe.hf.load import load
from usmoe.models import CALIBRATION, SAMPLE


@pytest.mark.parametrize("k", [None, "0.75x", 1.5])
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_calibrated_thresholds_spend_the_budget_on_their_own_text(k, alpha):
    model = tiny()
    batches = [tokens(4, 32, seed) for seed in range(4)]
    routers = usmoe.calibrate(model, batches, usmoe.USMoE(k=k, alpha=alpha))
    assert [router.pool for router in routers] == ["threshold", "threshold"]
    with usmoe.patched(model, routers), usmoe.record(model) as trace:
        for batch in batches:
            model(batch)
    wanted = {None: 4.0, "0.75x": 3.0, 1.5: 1.5}[k]
    first = sum(len(said.routing.token) for said in trace["model.layers.0.mlp"])
    assert first == math.floor(wanted * 512 + 0.5)  # nothing below it moves: exact
    second = sum(len(said.routing.token) for said in trace["model.layers.1.mlp"])
    assert abs(second / 512 - wanted) < 0.02 * wanted


def test_padding_does_not_move_a_threshold():
    model = tiny()
    x = tokens(2, 16)
    wide = torch.cat([x, tokens(2, 5, 9)], 1)
    mask = torch.zeros_like(wide)
    mask[:, :16] = 1
    plain = usmoe.calibrate(model, [x], usmoe.USMoE(k=1.5))
    padded = usmoe.calibrate(model, [{"input_ids": wide, "attention_mask": mask}], usmoe.USMoE(k=1.5))
    for one, other in zip(plain, padded, strict=True):
        assert one.threshold == pytest.approx(other.threshold, rel=1e-4)


def test_expert_choice_gets_one_threshold_an_expert():
    model = tiny()
    batches = [tokens(4, 32, seed) for seed in range(2)]
    routers = usmoe.calibrate(model, batches, usmoe.ExpertChoice(k=2, score="softmax_experts"))
    with usmoe.patched(model, routers), usmoe.record(model) as trace:
        for batch in batches:
            model(batch)
    loads = sum(said.routing.load for said in trace["model.layers.0.mlp"])
    assert loads.tolist() == [256 * 2 // 8] * 8


def test_calibrate_leaves_the_model_as_it_was():
    model = tiny().train()
    model.model.layers[0].eval()
    x = tokens()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    usmoe.calibrate(model, [{"input_ids": x, "use_cache": False}], usmoe.USMoE(k=2))
    assert model.training
    assert not model.model.layers[0].training
    assert not hasattr(model, "_usmoe_patch")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_calibrate_stops_listening_to_a_model_that_was_patched_before():
    from usmoe.hf.patch import patch_of

    model = usmoe.patch(tiny(), usmoe.USMoE(k=1))
    usmoe.calibrate(model, [tokens()], usmoe.USMoE(k=2))
    assert patch_of(model).routers == [usmoe.USMoE(k=1)] * 2
    assert patch_of(model).listeners == []


def test_what_cannot_be_calibrated_is_refused():
    model = tiny()
    with pytest.raises(ValueError, match="not for token_choice"):
        usmoe.calibrate(model, [tokens()], usmoe.TokenChoice(k=2))
    with pytest.raises(TypeError, match="one batch"):
        usmoe.calibrate(model, tokens(), usmoe.USMoE(k=2))
    with pytest.raises(ValueError, match="no real token"):
        usmoe.calibrate(model, [], usmoe.USMoE(k=2))
    with pytest.raises(ValueError, match="softmax_tokens needs a pool"):
        usmoe.calibrate(model, [tokens()], usmoe.USMoE(k=2, expert_score="softmax_tokens"))


def test_teacher_forced_nats_by_hand():
    model = tiny()
    x = tokens(3, 10)
    logits = model(x).logits.log_softmax(-1)
    by_hand = [[-logits[b, t, x[b, t + 1]].item() for t in range(9)] for b in range(3)]
    torch.testing.assert_close(teacher_forced(model, x, 2), torch.tensor(by_hand), rtol=1e-4, atol=1e-5)


def test_honest_equals_teacher_forced_for_a_causal_router_and_not_for_a_look_ahead_one():
    model = tiny(initializer_range=0.5)
    x = tokens(3, 24)
    for router, causal in (
        (usmoe.OwnChoice(), True),
        (usmoe.USMoE(pool="threshold", threshold=0.2), True),
        (usmoe.USMoE(k=1.5, alpha=0.5), False),
        (usmoe.ExpertChoice(k=2), False),
    ):
        with usmoe.patched(model, router):
            forced = teacher_forced(model, x)
            alone = honest(model, x, forced, positions=69)
        gap = abs(alone.nats - forced.mean().item())
        assert alone.positions == 69
        if causal:
            assert gap < 1e-5
            assert alone.interval < 1e-5
        else:
            assert gap > 1e-3


def test_honest_over_all_positions_is_the_mean_of_prefix_forwards():
    model = tiny(initializer_range=0.5)
    x = tokens(2, 8)
    with usmoe.patched(model, usmoe.ExpertChoice(k=2)):
        forced = teacher_forced(model, x)
        alone = honest(model, x, forced, positions=14)
        by_hand = [
            -model(x[b : b + 1, : t + 1]).logits[0, -1].log_softmax(-1)[x[b, t + 1]].item()
            for b in range(2)
            for t in range(7)
        ]
    assert alone.nats == pytest.approx(sum(by_hand) / 14, rel=1e-5)
    assert alone.interval == 0  # the whole population was seen


@pytest.mark.slow
@pytest.mark.parametrize("router", [usmoe.USMoE(), usmoe.USMoE(k=2, alpha=0.5, pool="threshold", min_experts=1)])
def test_thresholds_keep_the_budget_on_held_out_text_of_the_same_kind(router):
    """Novels that the thresholds were not found on: mean experts a token within 1 % of k."""
    model, tokenizer = load()
    found_on, held_out = (
        token_ids(tokenizer, text.read_text(encoding="utf-8"))[: 64 * 512].view(-1, 512)
        for text in (CALIBRATION, SAMPLE)
    )
    routers = usmoe.calibrate(model, found_on.split(8), router)
    pairs = tokens_seen = 0
    with torch.no_grad(), usmoe.patched(model, routers), usmoe.record(model) as trace:
        for part in held_out.split(8):
            model(part, use_cache=False)
    for said in trace.values():
        pairs += sum(len(one.routing.token) for one in said)
        tokens_seen += sum(one.routing.num_tokens for one in said)
    assert pairs / tokens_seen == pytest.approx(router.k or 4, rel=0.01)


def test_the_floor_is_part_of_the_budget():
    """min_experts adds pairs, so the threshold lies higher, and the sum is k all the same."""
    model = tiny()
    batches = [tokens(4, 32, seed) for seed in range(4)]
    plain, floor = (
        usmoe.calibrate(model, batches, usmoe.USMoE(k=1, pool="threshold", min_experts=least)) for least in (0, 1)
    )
    assert floor[0].threshold > plain[0].threshold
    assert floor[0].min_experts == 1
    less = usmoe.calibrate(model, batches, usmoe.USMoE(k=1.5, pool="threshold", min_experts=1, burst=4))
    assert less[0].burst == 4
    routers = usmoe.calibrate(model, batches, usmoe.USMoE(k=1.5, pool="threshold", min_experts=1))
    with torch.no_grad(), usmoe.patched(model, routers), usmoe.record(model) as trace:
        for batch in batches:
            model(batch)
    said = trace["model.layers.0.mlp"]
    assert sum(len(one.routing.token) for one in said) == 768
    assert min(one.routing.experts_per_token.min().item() for one in said) == 1
