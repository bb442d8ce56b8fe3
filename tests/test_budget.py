"""The budget that is served beside the one that was asked for: said where they differ by more than a tenth."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import usmoe
from test_language_served import as_trained
from tiny import tiny
from tiny import tokens as ids
from tiny_language import text
from tiny_language import trained as language
from usmoe import BoundedChoice, ExpertChoice, TokenChoice, USMoE
from usmoe.cli.likelihood import _off_budget
from usmoe.hf.patch import patch_of
from usmoe.layers.budget import TOKENS, asked_of, mean_asked, off_budget
from usmoe.routing import Host, ReLUChoice
from usmoe.routing.gates import BiasGate
from usmoe.train.config import Evaluation
from usmoe.train.evaluation import evaluate_model
from usmoe.train.figures import Figures, Serving
from usmoe.types import is_causal

ASKED = r"spend (\d\.\d\d) experts a token, and 2\.00 are asked for.*usmoe\.calibrate\(\)"


def batch(seed: int, sequences: int = 4) -> torch.Tensor:
    return torch.randn(sequences, 64, 16, generator=torch.Generator().manual_seed(seed)) + 1


def balanced_by_bias(router: Any, score: Any = "softmax", steps: int = 40) -> usmoe.MoE:
    """A layer whose bias was still moving when training ended: under softmax scores, which are small beside it, the
    average of its cuts lags behind."""
    torch.manual_seed(0)
    moe = usmoe.MoE(16, 8, 16, router, gate=BiasGate(16, 16, score=score, rate=0.01))
    with torch.no_grad():
        for step in range(steps):
            moe(batch(step, 1))
    return moe.eval()


def spent(moe: usmoe.MoE, batches: int = 4) -> float:
    """Experts a token on new text of 256 tokens a batch."""
    return sum(len(moe(batch(1000 + seed))[1].routing.token) for seed in range(batches)) / (256 * batches)


BIASED = [USMoE(k=2, alpha=0.0), USMoE(k=2, pool="batch"), BoundedChoice(k=2, alpha=0.0, per_expert=None)]


@pytest.mark.parametrize("router", BIASED, ids=str)
def test_thresholds_of_a_bias_that_moves_are_said_to_miss_the_budget(router: Any):
    moe = usmoe.to_causal(balanced_by_bias(router))
    with pytest.warns(UserWarning, match=ASKED) as said:
        experts = spent(moe)
    assert abs(experts - 2) > 0.2
    assert f"spend {experts:.2f} experts" in str(said[0].message)
    spent(moe)  # once: the second time, a warning would be an error


@pytest.mark.parametrize("router", BIASED, ids=str)
def test_a_budget_that_is_kept_is_not_spoken_of_under_a_bias(router: Any):
    assert spent(usmoe.to_causal(balanced_by_bias(router, "sigmoid"))) == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("router", [USMoE(k=2, alpha=0.0), ExpertChoice(k=2), BoundedChoice(k=2)], ids=str)
def test_a_budget_that_is_kept_is_not_spoken_of(router: Any):
    torch.manual_seed(0)
    moe = usmoe.MoE(16, 8, 16, router)
    with torch.no_grad():
        for step in range(20):
            moe(batch(step, 2))
    assert spent(usmoe.to_causal(moe.eval())) == pytest.approx(2, rel=0.1)


def test_expert_choice_whose_gate_has_moved_on():
    torch.manual_seed(0)
    moe = usmoe.MoE(16, 8, 16, ExpertChoice(k=2))
    with torch.no_grad():
        for step in range(30):
            moe(batch(step))
        moe.gate.get_parameter("weight").mul_(3)
    with pytest.warns(UserWarning, match=ASKED):
        spent(usmoe.to_causal(moe.eval()))


def test_padding_and_training_do_not_count_and_too_little_text_says_nothing():
    moe = usmoe.to_causal(balanced_by_bias(USMoE(k=2, alpha=0.0)))
    spent(moe, batches=TOKENS // 256 - 1)
    valid = torch.zeros(4, 64, dtype=torch.bool)
    valid[:, 0] = True
    moe(batch(0), valid=valid)
    for seed in range(8):
        moe.train()(batch(seed))
    with pytest.warns(UserWarning, match=ASKED):
        spent(moe.eval(), batches=1)


def test_another_router_in_between_is_not_taken_for_the_thresholds():
    moe = usmoe.to_causal(balanced_by_bias(USMoE(k=2, alpha=0.0)))
    threshold = moe.router
    moe.reroute(TokenChoice(k=2))
    spent(moe, batches=8)
    moe.reroute(threshold)
    with pytest.warns(UserWarning, match=ASKED):
        spent(copy.deepcopy(moe))


def test_what_is_counted_is_no_part_of_a_checkpoint():
    moe = balanced_by_bias(USMoE(k=2, alpha=0.0))
    keys = set(moe.state_dict())
    assert set(usmoe.to_causal(moe).state_dict()) == keys
    moe.load_state_dict(balanced_by_bias(USMoE(k=2, alpha=0.0), steps=3).state_dict())


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("k", [None, 2, "0.5x"], ids=str)
def test_a_patched_model_says_it_once_for_all_its_layers(family: str, k: Any):
    model = usmoe.patch(tiny(family), USMoE(k=k)).train()
    patch = patch_of(model)
    assert patch is not None
    layers: Any = patch.layers
    with torch.no_grad():
        for seed in range(4):
            model(ids(8, 64, seed))
        for layer in layers:
            layer.router.weight.mul_(3)
        usmoe.to_causal(model.eval())
        for seed in range(2):
            model(ids(8, 64, 50 + seed)[:, :-1])  # 2 * 8 * 63 tokens: too few
        with pytest.warns(UserWarning, match=r"are asked for \(mean of 2 layers") as said:
            model(ids(8, 64, 60))
        model(ids(8, 64, 61))
    assert len(said) == 1
    own: Any = layers[0].host.k
    asked = {None: own, 2: 2, "0.5x": own / 2}[k]
    assert f"and {asked:.2f} are asked for" in str(said[0].message)


# ---- of runs


@pytest.mark.parametrize("router", [USMoE(k=1.5), ExpertChoice(k=2), BoundedChoice(k=2, per_expert=None)], ids=str)
def test_figures_say_what_is_asked_and_eval_says_where_it_is_missed(router: Any):
    model, setting = language(router), Evaluation(batch=4, segment=6, memory=9)
    with torch.no_grad():
        for layer in model.moe_layers:
            layer.cut.total *= 0.3
    calibrated = Serving(how="threshold", k=1, calibrated=True)
    asked = ("threshold",) if isinstance(router, BoundedChoice) else ("threshold", calibrated)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said with the figures, not twice
        found = evaluate_model(
            as_trained(model), text(903), setting, positions=5, served=asked, calibration=text(900, 1)
        )
    served = found.served["threshold"]
    assert (found.forced.asked, served.asked) == (router.k, router.k)
    assert served.experts is not None
    assert served.asked is not None
    assert served.experts > 1.1 * served.asked
    assert served.off_budget
    assert not found.forced.off_budget
    sentences = _off_budget(found)
    assert [sentence.split(":")[0] for sentence in sentences] == ["Served by threshold"]
    assert f"{served.experts:.2f} experts a token are spent, and {router.k:g} are asked for" in sentences[0]
    assert f"--serve-k {router.k:g}" in sentences[0]
    for name in set(found.served) - {"threshold"}:
        assert found.served[name].asked == 1
    assert Figures.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_figures_that_were_saved_without_it_are_still_read():
    found = evaluate_model(
        as_trained(language(USMoE(k=1.5))), text(103), Evaluation(batch=4, segment=6, memory=0), positions=2
    )
    saved = json.loads(json.dumps(found.to_dict()))
    del saved["forced"]["asked"]
    assert Figures.from_dict(saved).forced.asked is None
    assert not Figures.from_dict(saved).forced.off_budget


def test_what_is_asked():
    assert asked_of(USMoE(k=1.5), 4) == 1.5
    assert asked_of(USMoE(k="0.5x"), 8, Host(k=4)) == 2
    assert asked_of(USMoE(), 8, Host(k=4)) == 4
    assert asked_of(USMoE(), 8) is asked_of(lambda logits, valid: None, 8) is None
    assert asked_of(ReLUChoice(k=2), 8) == 2
    assert mean_asked([USMoE(k=1), USMoE(k=2)], 4) == 1.5
    assert mean_asked([USMoE(k=1), USMoE(pool="threshold", threshold=0.1)], 4) is mean_asked([], 4) is None
    assert off_budget(2.21, 2)
    assert off_budget(1.79, 2)
    assert not off_budget(2.19, 2)
    assert not off_budget(None, 2)
    assert not off_budget(2, None)
    assert is_causal(usmoe.to_causal(nn.ModuleList([balanced_by_bias(USMoE(k=2), steps=2)]))[0].router)
