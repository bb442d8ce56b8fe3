"""A trained language model under causal routers, its figures in one value, and their bands."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import usmoe
from tiny_language import V, assert_close, text, tiny, trained
from usmoe import ExpertChoice, TokenChoice, USMoE
from usmoe.data.bpe import Pieces
from usmoe.data.corpus import Corpus
from usmoe.data.vocabulary import Bytes, Words
from usmoe.models.flops import flops_of_reading
from usmoe.models.language import LanguageModel
from usmoe.report.estimate import band, in_blocks
from usmoe.train.config import Evaluation, TrainConfig
from usmoe.train.evaluation import evaluate_model, tokens_per_unit
from usmoe.train.figures import Figures, Serving
from usmoe.train.folder import Trained
from usmoe.train.likelihood import honest, teacher_forced
from usmoe.train.served import calibrated, served

# ---------------------------------------------------------------------------------------------- served


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_as_before(model: LanguageModel, before: dict[str, torch.Tensor], routers: list) -> None:
    now = model.state_dict()
    assert list(now) == list(before)
    assert all(torch.equal(now[name], value) for name, value in before.items())
    assert [layer.router for layer in model.moe_layers] == routers
    assert not any(layer.gate._forward_hooks for layer in model.moe_layers)


def test_served_by_the_thresholds_that_training_tracked():
    model, tokens, setting = trained(USMoE(k=1.5)), text(63), Evaluation(batch=4, segment=5, memory=10)
    by_hand = teacher_forced(usmoe.to_causal(copy.deepcopy(model)), tokens, setting)
    before, own = state(model), teacher_forced(model, tokens, setting)
    with served(model, "threshold") as routers:
        assert [router.threshold for router in routers] == [layer.cut.average.item() for layer in model.moe_layers]
        assert_close(teacher_forced(model, tokens, setting).nats, by_hand.nats, 0)
    assert_as_before(model, before, [USMoE(k=1.5)] * 2)
    assert_close(teacher_forced(model, tokens, setting).nats, own.nats, 0)
    assert (own.nats - by_hand.nats).abs().max() > 1e-3


@pytest.mark.parametrize("how", ["threshold", "prefix", "calibrated"])
@pytest.mark.parametrize("tracked", [True, False])
def test_everything_is_restored_bit_for_bit_also_after_an_error(how, tracked):
    """Also where a layer has tracked nothing, so that other routers change the shape of what it would track."""
    if how == "threshold" and not tracked:
        return
    model = trained(USMoE(k=1.5)) if tracked else tiny(USMoE(k=1.5))
    model.train()
    before = state(model)
    given = (
        {"calibration": text(40), "setting": Evaluation(batch=2, segment=5, memory=896)} if how == "calibrated" else {}
    )

    def interrupted() -> None:
        with served(model, "threshold" if how == "calibrated" else how, **given):
            teacher_forced(model, text(30), Evaluation(batch=2, segment=5, memory=896))
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        interrupted()
    assert_as_before(model, before, [USMoE(k=1.5)] * 2)
    assert all(module.training for module in model.modules())
    with pytest.raises(ValueError, match="2 MoE layers, and 1 routers"):
        teacher_forced(model, text(30), Evaluation(segment=128, memory=896), router=[ExpertChoice(k=2)])
    with pytest.raises(ValueError, match="impossible with 4 experts"):
        teacher_forced(model, text(30), Evaluation(segment=128, memory=896), router=[ExpertChoice(k=2), USMoE(k=9)])
    assert_as_before(model, before, [USMoE(k=1.5)] * 2)


@pytest.mark.parametrize("k", [None, 1.0, 2.3])
@pytest.mark.parametrize("gate", ["linear", "bias"])
def test_calibrated_thresholds_choose_exactly_k_pairs_a_token_in_every_layer(k, gate):
    """The bias of a gate counts, as it does when the layer routes."""
    model = tiny(USMoE(k=2), gate=gate)
    if gate == "bias":
        for layer in model.moe_layers:
            layer.gate.bias.copy_(torch.tensor([0.3, 0.0, -0.2, 0.1]))
    tokens, setting = text(83), Evaluation(batch=4, segment=6, memory=9)
    with served(model, "threshold", k=k, calibration=tokens, setting=setting) as routers:
        assert [router.pool for router in routers] == ["threshold"] * 2
        for number in range(2):
            apart = [routers[0], USMoE(k=4, pool="token")] if number == 0 else routers
            forced = teacher_forced(model, tokens, setting, router=apart)
            wanted = math.floor((k or 2) * 82 + 0.5)
            assert round(forced.experts * 2 * 82) == wanted + (4 * 82 if number == 0 else wanted)


def test_calibrated_expert_choice_has_a_threshold_an_expert():
    model, tokens = tiny(ExpertChoice(k=2, score="softmax_experts")), text(81)
    setting = Evaluation(batch=4, segment=6, memory=9)
    routers = calibrated(model, tokens, setting, k=1)
    assert [len(router.threshold) for router in routers] == [4, 4]
    assert teacher_forced(model, tokens, setting, router=routers).load_cv == 0  # 20 tokens each of 80
    assert teacher_forced(model, tokens, setting, router=routers).experts == 1


def test_prefix_keeps_the_score_and_takes_another_k():
    model = tiny(USMoE(k=2, alpha=0.3, expert_score="sigmoid"))
    with served(model, "prefix") as routers:
        assert routers == [USMoE(k=2, alpha=0.3, expert_score="sigmoid", pool="prefix")] * 2
    with served(model, "prefix", k=1.5) as routers:
        assert routers == [USMoE(k=1.5, alpha=0.3, expert_score="sigmoid", pool="prefix")] * 2


def test_what_cannot_be_served_so_is_refused():
    setting = {"calibration": text(40), "setting": Evaluation(segment=128, memory=896)}
    for router, how, given, said in (
        (USMoE(k=2), "threshold", {}, "has tracked no cut"),
        (USMoE(k=2), "threshold", {"k": 1.5}, "not of k=1.5. Give calibration tokens"),
        (USMoE(k=2), "greedy", {}, "Known: threshold, prefix"),
        (ExpertChoice(k=2), "prefix", {}, "pool=prefix is a pool of USMoE"),
        (TokenChoice(k=2), "threshold", setting, "not for token_choice"),
        (ExpertChoice(k=2, score="softmax_tokens"), "threshold", setting, "needs a pool of tokens"),
        (USMoE(k=2, expert_score="softmax_tokens"), "prefix", {}, "needs a pool of tokens"),
        (USMoE(pool="threshold", threshold=0.2), "prefix", {}, "says no number of experts"),
    ):
        model = tiny(router)
        with pytest.raises(ValueError, match=said), served(model, how, **given):
            pass
        assert [layer.router for layer in model.moe_layers] == [router] * 2


# ---------------------------------------------------------------------------------------------- figures


def as_trained(model: LanguageModel, vocabulary=None) -> Trained:
    config = TrainConfig(corpus=Corpus(source="text"), model=model.config)
    return Trained(model=model, vocabulary=vocabulary or Bytes(), config=config, step=3)


def test_all_figures_of_a_model_are_those_of_their_functions():
    model, tokens, setting = trained(USMoE(k=1.5)), text(203), Evaluation(batch=4, segment=6, memory=9)
    half = Serving(how="threshold", k=1, calibrated=True)
    found = evaluate_model(
        as_trained(model), tokens, setting, positions=40, served=("threshold", "prefix", half), calibration=text(90, 1)
    )
    forced = teacher_forced(model, tokens, setting)
    assert found.forced.nats == forced.mean
    assert found.honest == honest(model, tokens, setting, forced, 40)
    assert found.reset.nats == teacher_forced(model, tokens, dataclasses.replace(setting, memory=0)).mean
    assert found.alone is None
    assert list(found.served) == ["threshold", "prefix", "threshold k=1 calibrated"]
    for name, given in (
        ("threshold", {}),
        ("prefix", {}),
        (half.name, {"k": 1, "calibration": text(90, 1), "setting": setting}),
    ):
        with served(model, name.split()[0], **given):
            again = teacher_forced(model, tokens, setting)
        assert (found.served[name].nats, found.served[name].experts) == (again.mean, again.experts)
    assert found.stated(found.forced.nats) == pytest.approx(forced.mean / math.log(2))
    assert found.unit == "character"
    cost = [flops_of_reading(model.config, k, 51, 6, 9).without_words for k in (forced.experts, 2.0)]  # 4 x 51 >= 202
    assert found.forced.flops == cost[0]
    assert found.forced.relative == pytest.approx(cost[0] / cost[1])
    assert found.forced.relative < 1
    assert found.reset.flops < found.forced.flops
    assert found == Figures.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))


def route(logits, valid, **_):
    """A router of one's own, of k = 1."""
    return TokenChoice(k=1)(logits, valid)


def test_figures_under_other_routers_leave_the_models_own_alone():
    model, tokens, setting = trained(USMoE(k=1.5)), text(203), Evaluation(batch=4, segment=6, memory=9)
    alone = evaluate_model(as_trained(model), tokens, setting, positions=40, served=())
    under = {"less": USMoE(k=1), "token_choice(k=1)": TokenChoice(k=1), "a layer": [USMoE(k=1), TokenChoice(k=2)]}
    found = evaluate_model(as_trained(model), tokens, setting, positions=40, served=(), under=under)
    assert (found.forced.nats, found.honest) == (alone.forced.nats, alone.honest)
    assert [layer.router for layer in model.moe_layers] == [USMoE(k=1.5)] * 2
    for name, router in under.items():
        fresh = trained(USMoE(k=1.5))
        fresh.reroute(router)
        expected = evaluate_model(as_trained(fresh), tokens, setting, positions=40, served=())
        assert found.under[name].forced.nats == expected.forced.nats
        assert found.under[name].honest == expected.honest
    assert found.under["token_choice(k=1)"].honest.interval == 0
    assert found == Figures.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
    without = {name: value for name, value in alone.to_dict().items() if name != "under"}
    assert Figures.from_dict(without) == alone
    for router, said in ((USMoE(k=5), "under it: .* impossible with 4 experts"), ([USMoE(k=1)], "2 MoE layers, and 1")):
        with pytest.raises(ValueError, match=said):
            evaluate_model(as_trained(model), tokens, setting, under={"it": router})
    with pytest.raises(ValueError, match="no experts, so that it has nothing to route"):
        evaluate_model(as_trained(tiny(num_experts=0)), tokens, setting, under={"it": USMoE(k=1)})


def test_a_router_of_ones_own_is_named_without_an_address():
    found = evaluate_model(as_trained(tiny(route)), text(63), Evaluation(batch=4, segment=5, memory=0), positions=5)
    assert found.routers == (f"{__name__}:route",)
    assert set(found.unserved) == {"threshold", "prefix"}
    for reason in found.unserved.values():
        assert " 0x" not in reason
        assert f"{__name__}:route" in reason


def test_figures_of_a_router_that_looks_across_the_batch():
    model, tokens, setting = (
        trained(USMoE(k=1.5, pool="time_step")),
        text(63),
        Evaluation(batch=4, segment=5, memory=10),
    )
    found = evaluate_model(as_trained(model), tokens, setting, positions=62)
    assert found.alone.nats == teacher_forced(model, tokens, setting, alone=True).mean
    assert found.alone.nats != found.forced.nats
    assert found.honest.nats == pytest.approx(found.alone.nats, rel=1e-6)
    assert list(found.served) == ["threshold", "prefix"]


def test_what_there_is_no_figure_of_has_a_reason():
    tokens, setting = text(63), Evaluation(batch=4, segment=5, memory=0)
    causal = evaluate_model(as_trained(tiny(TokenChoice(k=2))), tokens, setting)
    assert causal.unserved == dict.fromkeys(("threshold", "prefix"), "The model is causal as it is.")
    assert (causal.reset, causal.served, causal.honest.interval) == (None, {}, 0.0)
    dense = evaluate_model(as_trained(tiny(num_experts=0)), tokens, setting)
    assert dense.forced.relative is None
    assert dense.routers == ()
    assert dense == Figures.from_dict(json.loads(json.dumps(dense.to_dict())))
    leaky = evaluate_model(as_trained(tiny(ExpertChoice(k=2, score="softmax_tokens"))), tokens, setting, positions=5)
    assert leaky.served == {}
    assert "USMoE" in leaky.unserved["prefix"]
    with pytest.raises(ValueError, match="needs calibration tokens"):
        evaluate_model(
            as_trained(tiny(USMoE(k=2))), tokens, setting, served=[Serving(how="threshold", calibrated=True)]
        )
    with pytest.raises(ValueError, match="unserved is too much or missing"):
        Figures.from_dict({name: value for name, value in causal.to_dict().items() if name != "unserved"})
    with pytest.raises(ValueError, match="calibrated belongs to how=threshold"):
        Serving(how="prefix", calibrated=True)


def test_an_interval_that_is_no_number_survives_json():
    model = tiny(USMoE(k=1.5))
    found = evaluate_model(
        as_trained(model), text(63), Evaluation(batch=4, segment=5, memory=896), positions=1, served=()
    )
    again = Figures.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
    assert math.isnan(found.honest.interval)
    assert math.isnan(again.honest.interval)


def test_units_of_words_and_of_bpe():
    words = Words(("<eos>", "<unk>", "AAA", *(f"w{number}" for number in range(V - 3))))
    model, setting = tiny(TokenChoice(k=2)), Evaluation(batch=2, segment=8, memory=896)
    found = evaluate_model(as_trained(model, words), text(40), setting)
    assert found.unit == "word"
    assert found.stated(found.forced.nats) == pytest.approx(math.exp(found.forced.nats))
    pieces = Pieces.learn(["the theme of these others\n"] * 20, 270)
    tokens = pieces.encode("the theme of others")
    assert len(tokens) < 19
    assert tokens_per_unit(pieces, tokens) == len(tokens) / 19
    assert tokens_per_unit(words, tokens) == 1


# ---------------------------------------------------------------------------------------------- bands


def test_blocks_by_hand():
    assert in_blocks(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), 2) == ([3.0, 12.0, 16.0], [2, 2, 1])


def test_the_band_of_a_mean_over_blocks():
    """200 blocks of 10 tokens whose sums have deviation 10: the mean a token has deviation 1/sqrt(200)."""
    sums = np.random.default_rng(0).normal(30, 10, 200)
    counts = [10] * 200
    low, high = band(sums.tolist(), counts, resamples=4000)
    mean, half = sums.mean() / 10, 1.96 * sums.std() / 10 / math.sqrt(200)
    assert low == pytest.approx(mean - half, abs=0.1 * half)
    assert high == pytest.approx(mean + half, abs=0.1 * half)
    assert band([6.0, 2.0], [3, 1]) == (2.0, 2.0)  # a ratio: the short block weighs less
    assert band([5.0], [2]) is None


def test_a_paired_band_is_narrower_than_the_bands_it_is_made_of():
    """The same text under k = 2 and k = 1.5: what is hard for one is hard for the other."""
    tokens, setting = text(403), Evaluation(batch=4, segment=5, memory=5)
    model = trained(USMoE(k=2))
    one, other = (
        evaluate_model(as_trained(model), tokens, setting, positions=2, served=[way])
        for way in ("threshold", Serving(how="prefix", k=1.5))
    )
    paired = one.served["threshold"].beside(other.served["prefix k=1.5"])
    bands = [one.served["threshold"].band, other.served["prefix k=1.5"].band]
    assert paired[0] < one.served["threshold"].nats - other.served["prefix k=1.5"].nats < paired[1]
    assert paired[1] - paired[0] < 0.7 * min(high - low for low, high in bands)
    with pytest.raises(ValueError, match="other lengths"):
        one.forced.beside(evaluate_model(as_trained(model), tokens[:99], setting, served=(), positions=2).forced)
