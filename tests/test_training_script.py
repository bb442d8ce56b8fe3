"""The script that trained the shipped model: in parts or in one go, the same numbers bit for bit."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import muon
import train_shipped_model
from usmoe.models import CALIBRATION, SAMPLE

TINY = {
    "vocab-size": 300,
    "hidden-size": 16,
    "layers": 2,
    "heads": 2,
    "experts": 4,
    "experts-per-token": 2,
    "expert-size": 8,
    "context": 16,
    "batch": 2,
    "steps": 6,
    "warmup": 2,
    "decay": 3,
}


def run(folder: Path, *words: str) -> dict[str, torch.Tensor]:
    text = ["--text", str(SAMPLE), "--validation", str(CALIBRATION), "--run", str(folder)]
    recipe = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    train_shipped_model.main([*text, *recipe, "--no-compile", *words])
    return torch.load(folder / "state.pt", weights_only=True)


@pytest.mark.slow
def test_a_run_in_parts_ends_with_the_same_bits_and_exports_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(train_shipped_model, "keep_memory", lambda: None)
    whole = run(tmp_path / "whole")
    parts = run(tmp_path / "parts", "--hours", "1e-9")  # one step a call
    assert parts["step"] == 1
    while parts["step"] < 6:
        parts = run(tmp_path / "parts", "--hours", "1e-9", "--export", str(tmp_path / "model"))
    for name, value in whole["model"].items():
        assert torch.equal(value, parts["model"][name]), name

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for name, value in model.state_dict().items():
        assert torch.equal(value, whole["model"][name].bfloat16().float()), name


@pytest.mark.slow
def test_it_learns(tmp_path, monkeypatch):
    monkeypatch.setattr(train_shipped_model, "keep_memory", lambda: None)
    run(tmp_path, "--steps", "60", "--every", "20", "--lr", "0.01")
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["validation_bits_per_byte"] < rows[0]["validation_bits_per_byte"] - 0.1


def test_learning_rate_warms_up_stays_and_decays():
    recipe = train_shipped_model.Recipe(steps=100, warmup=10, decay=40, lr=1.0)
    rates = [train_shipped_model.learning_rate(step, recipe) for step in range(101)]
    assert rates[0] == 0.1
    assert rates[9] == rates[60] == 1.0
    assert rates[70] == 0.5  # a quarter of the decay: 1 - sqrt(1/4)
    assert rates[100] == 0.0


def test_an_orthogonalised_update_has_singular_values_near_one():
    matrices = torch.randn(3, 12, 20, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(muon.orthogonalise(matrices))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_the_head_loss_equals_the_plain_one_with_gradients():
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 16, generator=random).bfloat16().float().requires_grad_()
    weight = torch.randn(11, 16, generator=random).bfloat16().float().requires_grad_()
    target = torch.randint(11, (7,), generator=random)
    logits = hidden @ weight.T
    plain = torch.nn.functional.cross_entropy(logits, target) + 0.1 * logits.logsumexp(-1).square().mean()
    ours, _ = train_shipped_model.HeadLoss.apply(hidden, weight, target, 0.1, 3)
    assert ours.item() == pytest.approx(plain.item(), rel=2e-2)
    for one, other in zip(
        torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(plain, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.01)
