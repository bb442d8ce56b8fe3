"""The model that ships: plain transformers loads it, it is small, and it has learned to read."""

import dataclasses
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeForCausalLM

import usmoe
from usmoe.hf.likelihood import teacher_forced
from usmoe.models import CALIBRATION, SAMPLE, SHIPPED


@pytest.fixture(scope="module")
def shipped():
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(SHIPPED)


def test_plain_transformers_loads_it_and_it_is_what_the_card_says(shipped):
    model, tokenizer = shipped
    assert isinstance(model, OlmoeForCausalLM)
    assert model.config.num_experts >= 16
    assert model.config.num_hidden_layers >= 4
    assert len(tokenizer) == model.config.vocab_size
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 15_000_000
    assert "bits per byte" in (SHIPPED / "README.md").read_text(encoding="utf-8")


def test_the_tokenizer_loses_nothing(shipped):
    _, tokenizer = shipped
    for text in (SAMPLE.read_text(encoding="utf-8")[:5000], "naïve 中文 \t\n  emoji 🙂 <|endoftext", " lead", ""):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_it_predicts_held_out_text_better_than_a_compressor(shipped):
    model, tokenizer = shipped
    text = SAMPLE.read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    tokens = ids[: len(ids) // 512 * 512].view(-1, 512)[::8]
    nats = teacher_forced(model, tokens).double().mean().item()
    bits_per_byte = nats / math.log(2) * len(ids) / len(text.encode())
    assert bits_per_byte < 2.0  # bzip2 -9 reaches 2.20 on held-out novels


def test_own_choice_on_the_shipped_model_equals_it_to_float_rounding(shipped):
    """Up to the first token whose fourth and fifth expert are equal to rounding: there the order of a sum decides."""
    model, tokenizer = shipped
    ids = tokenizer(CALIBRATION.read_text(encoding="utf-8")[:3000], return_tensors="pt").input_ids[:, :512].view(16, 32)
    theirs = model(ids).logits
    with usmoe.patched(model, usmoe.OwnChoice()), usmoe.record(model) as trace:
        ours = model(ids).logits
    best = torch.stack([said.logits for said in trace.last.values()]).topk(5).values
    decided = (best[..., 3] - best[..., 4] > 1e-5).all(0).int().cummin(1).values.bool()
    assert decided.float().mean() > 0.9
    assert (ours - theirs)[decided].abs().max() < 5e-5  # logits of magnitude 20
    assert torch.equal(model(ids).logits, theirs)


def test_sample_and_calibration_are_different_texts():
    sample, calibration = SAMPLE.read_text(encoding="utf-8"), CALIBRATION.read_text(encoding="utf-8")
    lines = {line for line in sample.splitlines() if len(line) > 40}
    assert not lines & set(calibration.splitlines())


@pytest.mark.parametrize("shift", [str, str.upper, lambda text: text[::-1]], ids=["as it is", "capitals", "backwards"])
def test_a_bucket_holds_at_every_prefix_of_shifted_text(shipped, shift):
    """used(t) <= k*t + burst in every layer, whatever the text; a threshold alone spends in bursts (the control)."""
    model, tokenizer = shipped
    found_on = tokenizer(CALIBRATION.read_text(encoding="utf-8")[:8000], return_tensors="pt").input_ids[:, :1024]
    routers = usmoe.calibrate(model, [found_on.view(4, 256)], usmoe.USMoE(k=2))
    text = shift(SAMPLE.read_text(encoding="utf-8")[:4000])
    x = tokenizer(text, return_tensors="pt").input_ids[:, :512].view(2, 256)
    allowed = 2 * torch.arange(1, 257) + 4

    def overspent(given) -> bool:
        with torch.no_grad(), usmoe.patched(model, given), usmoe.record(model) as trace:
            model(x)
        used = [said.routing.experts_per_token.view(2, 256).cumsum(1) for said in trace.last.values()]
        return any(bool((counts > allowed).any()) for counts in used)

    assert overspent(routers)
    assert not overspent([dataclasses.replace(router, burst=4) for router in routers])
