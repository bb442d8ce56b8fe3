"""Evaluating a trained language model: the two likelihoods against plain loops, and against what must not change
them."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from tiny_language import assert_close, text, tiny, trained
from usmoe import ExpertChoice, Routing, TokenChoice, USMoE
from usmoe.models.language import LanguageModel
from usmoe.train.config import Evaluation
from usmoe.train.likelihood import honest, recomputed, teacher_forced
from usmoe.train.reading import deciding
from usmoe.train.served import served

LOOK_AHEAD = (USMoE(k=1.5), ExpertChoice(k=2, score="softmax_tokens"))
ACROSS = (USMoE(k=1.5, pool="time_step"), USMoE(k=1.5, pool="batch"))
CAUSAL = (
    TokenChoice(k=2),
    USMoE(pool="threshold", threshold=0.3),
    USMoE(k=1.5, pool="prefix"),
    USMoE(k=1.5, pool="prefix", burst=3),
)


def whole(model: LanguageModel, piece: np.ndarray, **given) -> list[float]:
    """NLL of each token of a piece after the first, by one forward over all but the last."""
    tokens = torch.from_numpy(piece.astype(np.int64))
    with torch.no_grad():
        out = model(tokens[None, :-1], **given)
        said = model.words.logits(out.hidden)[0].log_softmax(-1)
    return [-said[place, token].item() for place, token in enumerate(tokens[1:])]


def streams(tokens: np.ndarray, batch: int) -> list[np.ndarray]:
    """Contiguous parts that share one token each: the last target of one is the first input of the next."""
    last = len(tokens) - 1
    return [tokens[last * row // batch : last * (row + 1) // batch + 1] for row in range(batch)]


# ---------------------------------------------------------------------------------------------- teacher-forced


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("router", [TokenChoice(k=2), USMoE(k=1.5)])
def test_without_memory_each_window_is_read_alone_and_each_token_predicted_once(batch, router):
    """100 tokens, 99 targets: in three streams of 33, windows of 7, 7, 7, 7 and 5 targets."""
    model, tokens = tiny(router), text()
    by_hand = []
    for stream in streams(tokens, batch):
        for start in range(0, len(stream) - 1, 7):
            by_hand += whole(model, stream[start : start + 8])
    forced = teacher_forced(model, tokens, Evaluation(batch=batch, segment=7, memory=0))
    assert forced.tokens == 99
    assert_close(forced.nats, by_hand)
    assert forced.mean == pytest.approx(sum(by_hand) / 99, rel=1e-5)


@pytest.mark.parametrize("position", ["relative", "rotary"])
def test_a_memory_that_is_long_enough_makes_one_long_sequence_of_each_stream(position):
    model, tokens = tiny(TokenChoice(k=2), position=position), text()
    by_hand = [nats for stream in streams(tokens, 2) for nats in whole(model, stream)]
    assert_close(teacher_forced(model, tokens, Evaluation(batch=2, segment=8, memory=64)).nats, by_hand)
    short = teacher_forced(model, tokens, Evaluation(batch=2, segment=8, memory=8)).nats
    assert (short - torch.tensor(by_hand)).abs().max() > 1e-3


def test_memory_is_handed_on_from_segment_to_segment():
    model, tokens = tiny(USMoE(k=1.5)), text(60)
    by_hand, memory = [], None
    for start in range(0, 59, 9):
        piece = torch.from_numpy(tokens[start : start + 10].astype(np.int64))
        with torch.no_grad():
            out = model(piece[None, :-1], memory=memory, remember=12)
        said = model.words.logits(out.hidden)[0].log_softmax(-1)
        by_hand += [-said[place, token].item() for place, token in enumerate(piece[1:])]
        memory = out.memory
    assert_close(teacher_forced(model, tokens, Evaluation(batch=1, segment=9, memory=12)).nats, by_hand)


@pytest.mark.parametrize("router", [*CAUSAL, *LOOK_AHEAD], ids=str)
def test_the_other_streams_change_nothing_for_routers_that_do_not_look_at_them(router):
    """62 targets in four streams of 15 or 16: in the last segment, of 4, some have 3 and a padded place, which must not
    compete."""
    model, tokens, setting = tiny(router), text(63), Evaluation(batch=4, segment=6, memory=10)
    together = teacher_forced(model, tokens, setting, window=12)
    alone = teacher_forced(model, tokens, setting, window=12, alone=True)
    assert_close(together.nats, alone.nats)
    assert together.experts == pytest.approx(alone.experts)
    assert together.dropped == pytest.approx(alone.dropped)
    assert together.load_cv == pytest.approx(alone.load_cv)


@pytest.mark.parametrize("router", ACROSS, ids=str)
def test_the_other_streams_change_the_figure_of_routers_that_look_across_the_batch(router):
    model, tokens, setting = tiny(router), text(63), Evaluation(batch=4, segment=5, memory=10)
    alone = teacher_forced(model, tokens, setting, alone=True)
    assert (teacher_forced(model, tokens, setting).nats - alone.nats).abs().max() > 1e-3


def test_a_router_that_remembers_goes_on_over_a_window_and_no_further():
    """Windows of 1, 2 and 3 segments of 8; the oracle hands the router's state on by itself."""
    model, tokens = tiny(USMoE(k=1.5, pool="prefix")), text(49)
    found = {}
    for window in (0, 8, 16, 23, 24):
        by_hand, memory = [], None
        for number, start in enumerate(range(0, 48, 8)):
            piece = torch.from_numpy(tokens[start : start + 9].astype(np.int64))
            if memory is not None and number % max(1, window // 8) == 0:
                memory = dataclasses.replace(memory, routers=(None, None))
            with torch.no_grad():
                out = model(piece[None, :-1], memory=memory, remember=16, stream=True)
            said = model.words.logits(out.hidden)[0].log_softmax(-1)
            by_hand += [-said[place, token].item() for place, token in enumerate(piece[1:])]
            memory = out.memory
        forced = teacher_forced(model, tokens, Evaluation(batch=1, segment=8, memory=16), window=window)
        assert_close(forced.nats, by_hand)
        found[window] = forced.mean
    assert found[0] == found[8]
    assert found[16] == found[23]
    assert len({found[8], found[16], found[24]}) == 3


def test_what_the_routers_do_is_counted_over_all_segments_without_padding():
    model, tokens = tiny(USMoE(k=1.2)), text(63)
    pairs, empty, loads = 0, 0, torch.zeros(2, 4)
    for stream in streams(tokens, 4):
        for start in range(0, len(stream) - 1, 5):
            piece = torch.from_numpy(stream[start : start + 6].astype(np.int64))
            for number, one in enumerate(model(piece[None, :-1]).said):
                pairs += len(one.routing.token)
                empty += int((one.routing.experts_per_token == 0).sum())
                loads[number] += one.routing.load
    forced = teacher_forced(model, tokens, Evaluation(batch=4, segment=5, memory=0))
    assert forced.experts == pytest.approx(pairs / (2 * 62))
    assert forced.dropped == pytest.approx(empty / (2 * 62))
    assert forced.dropped > 0
    spread = loads.std(1, correction=0) / loads.mean(1)
    assert forced.load_cv == pytest.approx(spread.mean().item())


def only_the_first_token(logits, valid=None, **given):
    """A router of one's own, which does not say what is padding."""
    mask = torch.zeros_like(logits, dtype=torch.bool)
    mask[:, 0, 0] = True
    return Routing.from_dense(logits.sigmoid(), mask)


def test_padding_is_not_counted_for_a_router_of_ones_own():
    """5 targets in two streams of 2 and 3: one place of six is padding."""
    forced = teacher_forced(tiny(only_the_first_token), text(6), Evaluation(batch=2, segment=4, memory=0))
    assert (forced.tokens, forced.experts, forced.dropped) == (5, 2 / 5, 3 / 5)


def test_another_router_for_one_reading():
    model, tokens, setting = tiny(TokenChoice(k=2)), text(40), Evaluation(batch=2, segment=8, memory=8)
    other = teacher_forced(model, tokens, setting, router=USMoE(k=1))
    assert other.experts == 1
    assert_close(other.nats, teacher_forced(tiny(USMoE(k=1)), tokens, setting).nats)
    each = teacher_forced(model, tokens, setting, router=[TokenChoice(k=1), TokenChoice(k=2)])
    assert each.experts == 1.5
    assert [layer.router for layer in model.moe_layers] == [TokenChoice(k=2)] * 2
    with pytest.raises(ValueError, match="2 MoE layers, and 3 routers"):
        teacher_forced(model, tokens, setting, router=[TokenChoice(k=1)] * 3)


# ---------------------------------------------------------------------------------------------- edges


def test_short_splits():
    model = tiny(TokenChoice(k=2))
    three = text(3)
    by_hand = whole(model, three)
    for setting in (
        Evaluation(segment=128, memory=896),
        Evaluation(batch=1, segment=512, memory=896),
        Evaluation(batch=1, segment=2, memory=896),
    ):
        assert teacher_forced(model, three, setting).tokens == 2
    assert_close(teacher_forced(model, three, Evaluation(batch=1, segment=128, memory=896)).nats, by_hand)
    two_streams = whole(model, three[:2]) + whole(model, three[1:])
    assert_close(teacher_forced(model, three, Evaluation(batch=10, segment=128, memory=896)).nats, two_streams)
    with pytest.raises(ValueError, match="has 1 tokens to read"):
        teacher_forced(model, text(1), Evaluation(segment=128, memory=896))
    with pytest.raises(ValueError, match="has 1 tokens to read"):
        teacher_forced(model, three, Evaluation(segment=128, memory=896, tokens=1))


def test_a_part_of_a_split_is_its_beginning():
    model, tokens = tiny(TokenChoice(k=2)), text(60)
    some = teacher_forced(model, tokens, Evaluation(batch=2, segment=8, memory=8, tokens=31))
    assert_close(some.nats, teacher_forced(model, tokens[:31], Evaluation(batch=2, segment=8, memory=8)).nats)


def test_a_model_without_experts_has_no_figures_of_routing():
    model, tokens, setting = tiny(num_experts=0), text(40), Evaluation(batch=2, segment=8, memory=8)
    forced = teacher_forced(model, tokens, setting)
    assert (forced.experts, forced.dropped, forced.load_cv) == (None, None, None)
    assert_close(recomputed(model, tokens, setting, torch.arange(39)), forced.nats)
    with pytest.raises(ValueError, match="no experts"), served(model, "prefix"):
        pass


def test_a_likelihood_that_is_no_number_is_refused_and_the_mode_restored():
    model = tiny(TokenChoice(k=2)).train()
    with torch.no_grad():
        model.words.vectors[7] = math.nan
    with pytest.raises(ValueError, match="no finite number"):
        teacher_forced(model, text(40), Evaluation(batch=2, segment=8, memory=896))
    assert all(module.training for module in model.modules())


def test_each_module_is_in_the_mode_that_it_was_in():
    model = tiny(TokenChoice(k=2), dropout=0.5).train()
    model.layers[1].eval()
    tokens, setting = text(40), Evaluation(batch=2, segment=8, memory=8)
    modes = [module.training for module in model.modules()]
    forced = teacher_forced(model, tokens, setting)
    assert [module.training for module in model.modules()] == modes
    recomputed(model, tokens, setting, torch.arange(3))
    assert [module.training for module in model.modules()] == modes
    assert_close(forced.nats, teacher_forced(model.eval(), tokens, setting).nats, 0)  # no dropout


def test_training_goes_on_after_an_evaluation():
    """What is cached in evaluation (distances, masks) has no bar against gradients."""
    for position in ("relative", "rotary"):
        model = tiny(TokenChoice(k=2), position=position).train()
        teacher_forced(model, text(40), Evaluation(batch=2, segment=9, memory=7))
        out = model(torch.from_numpy(text(18).astype(np.int64)).view(2, 9))
        out.hidden.sum().backward()
        assert torch.is_grad_enabled()


def test_an_adaptive_softmax_meets_no_padding():
    model, tokens = tiny(TokenChoice(k=2), cutoffs=(10, 20)), text(6)
    by_hand = [nats for stream in streams(tokens, 2) for nats in whole(model, stream)]
    assert_close(teacher_forced(model, tokens, Evaluation(batch=2, segment=8, memory=896)).nats, by_hand)


# ---------------------------------------------------------------------------------------------- honest


@pytest.mark.parametrize("window", [0, 10])
@pytest.mark.parametrize("router", CAUSAL, ids=str)
def test_a_causal_router_has_no_gap_at_any_position(router, window):
    """The promise is not taken at its word here: every position is run on its prefix."""
    model, tokens, setting = tiny(router), text(63), Evaluation(batch=4, segment=5, memory=10)
    forced = teacher_forced(model, tokens, setting, window=window)
    assert_close(recomputed(model, tokens, setting, torch.arange(62), window=window), forced.nats)
    alone = honest(model, tokens, setting, forced, 20, window=window)
    assert (alone.nats, alone.interval, alone.positions) == (forced.mean, 0.0, 0)


@pytest.mark.parametrize("memory", [0, 6])
@pytest.mark.parametrize("router", LOOK_AHEAD, ids=str)
def test_the_honest_likelihood_by_hand(router, memory):
    """Whole segments before, the current one cut after each token and run anew."""
    model, tokens, setting = tiny(router), text(24), Evaluation(batch=1, segment=6, memory=memory)
    by_hand, before = [], None
    for start in range(0, 23, 6):
        piece = tokens[start : start + 7]
        for size in range(2, len(piece) + 1):
            by_hand.append(whole(model, piece[:size], memory=before)[-1])
        with torch.no_grad():
            inputs = torch.from_numpy(piece[:-1].astype(np.int64))[None]
            before = model(inputs, memory=before, remember=memory).memory
    places = torch.randperm(23, generator=torch.Generator().manual_seed(1))
    assert_close(recomputed(model, tokens, setting, places), torch.tensor(by_hand)[places])


@pytest.mark.parametrize("router", LOOK_AHEAD, ids=str)
def test_a_planted_look_ahead_moves_the_two_figures_apart(router):
    model, tokens, setting = tiny(router), text(63), Evaluation(batch=4, segment=5, memory=10)
    forced = teacher_forced(model, tokens, setting)
    every = honest(model, tokens, setting, forced, positions=1000)
    assert (every.positions, every.interval) == (62, 0)  # all there are: no uncertainty is left
    assert every.nats == pytest.approx(recomputed(model, tokens, setting, torch.arange(62)).mean().item(), rel=1e-6)
    assert abs(every.nats - forced.mean) > 0.01
    some = honest(model, tokens, setting, forced, positions=30, seed=3)
    assert some.positions == 30
    assert 0 < abs(some.nats - every.nats) < 2 * some.interval
    assert some == honest(model, tokens, setting, forced, positions=30, seed=3)
    assert some != honest(model, tokens, setting, forced, positions=30, seed=4)


@pytest.mark.parametrize("router", ACROSS, ids=str)
def test_honest_is_a_sequence_by_itself_where_routers_look_across_the_batch(router):
    model, tokens, setting = tiny(router), text(63), Evaluation(batch=4, segment=5, memory=10)
    forced = teacher_forced(model, tokens, setting)
    every = honest(model, tokens, setting, forced, positions=62)
    alone = teacher_forced(model, tokens, setting, alone=True)
    apart = teacher_forced(model, tokens, setting, router=USMoE(k=1.5))
    if router.pool == "time_step":  # at batch 1 a token competes with itself alone
        assert every.nats == pytest.approx(alone.mean, rel=1e-6)
    else:  # at batch 1 the batch is the sequence
        by_sequence = tiny(USMoE(k=1.5))
        cut = recomputed(by_sequence, tokens, setting, torch.arange(62))
        assert every.nats == pytest.approx(cut.mean().item(), rel=1e-6)
        assert_close(alone.nats, apart.nats)
    assert abs(every.nats - forced.mean) > 1e-3


def test_a_layer_that_routes_by_its_moving_average_is_honest_as_it_is():
    model, tokens = trained(USMoE(k=1.5), moving=True), text(63)
    setting = Evaluation(batch=4, segment=5, memory=10)
    assert [router.pool for router in deciding(model)] == ["threshold"] * 2
    forced = teacher_forced(model, tokens, setting)
    assert_close(recomputed(model, tokens, setting, torch.arange(62)), forced.nats)
    assert honest(model, tokens, setting, forced, 10).positions == 0


def test_honest_refuses_the_figure_of_another_text_and_no_sample():
    model, setting = tiny(USMoE(k=1.5)), Evaluation(batch=2, segment=5, memory=896)
    forced = teacher_forced(model, text(30), setting)
    with pytest.raises(ValueError, match="is of 29 tokens, and these are 39"):
        honest(model, text(40), setting, forced, 10)
    with pytest.raises(ValueError, match="positions=0 is no sample"):
        honest(model, text(30), setting, forced, 0)
