"""Every family of the installed transformers whose experts are behind its interface, tiny, from its configuration."""

import contextlib
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

import usmoe
from families import FAMILIES, OUTSIDERS, build, inputs
from families_table import answer, distance, shown
from usmoe.hf.layers import Layer, moe_layers

pytestmark = pytest.mark.usefixtures("quiet_transformers")

LARGEST = 5e-6
"""Own choice against the model, relative to the largest logit: float32 rounding through three layers. docs/families.md
states what was seen for each family."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> tuple[PreTrainedModel, dict]:
    one = FAMILIES[request.param]
    return build(one), inputs(one)


def sees_all_tokens(model: PreTrainedModel, given: dict) -> bool:
    """Ernie 4.5 VL hands the tokens of its images to other experts than those of its text: each layer sees a part."""
    return "moe_mm_token_type_ids" not in given


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@torch.no_grad()
def test_own_choice_equals_the_model_another_route_differs_and_leaving_restores_every_bit(family):
    model, given = family
    before, hooked, keys = answer(model, given), hooks(model), list(model.state_dict())
    usmoe.patch(model, usmoe.OwnChoice())
    assert distance(answer(model, given), before) < LARGEST
    pool = dict(pool="sequence") if sees_all_tokens(model, given) else dict(pool="threshold", threshold=0.2)
    usmoe.patch(model, usmoe.USMoE(k="0.75x", **pool))
    assert distance(answer(model, given), before) > 1e-3
    assert list(model.state_dict()) == keys
    usmoe.unpatch(model)
    assert torch.equal(answer(model, given), before)
    assert hooks(model) == hooked


@contextlib.contextmanager
def by_every_expert(model: PreTrainedModel, layers: list[Layer], k: float, valid: torch.Tensor | None):
    """The oracle: the family's own blocks and its own eager experts, every expert asked for every token, with weight 0
    where the pair is not among the floor(k*S + 0.5) best of its sequence, found one after the other."""
    handles = []

    def dense(layer: Layer):
        def hook(module, args, out):
            rule = layer.rule
            logits = rule.outputs.read_logits(out)
            shape = valid.shape if valid is not None and valid.numel() == len(logits) else (1, len(logits))
            if valid is None or valid.shape != shape:
                real = torch.ones(shape, dtype=torch.bool)
                if layer.block.given.ndim == 3 and layer.block.given.shape[:2].numel() == len(logits):
                    real = torch.ones(layer.block.given.shape[:2], dtype=torch.bool)
            else:
                real = valid
            chosen = best_pairs(layer.host.ranking_scores(logits.detach()), real, k)
            scores = layer.host.weighing_scores(logits)
            picked = scores.where(chosen, 0)
            if rule.outputs.shared is not None:
                always = nn.functional.linear(args[0].reshape(-1, module.hidden_dim), module.weight).sigmoid()
                always = always[:, -module.n_shared_experts :]
                whole = module.route_scale * module.global_scale / (picked.sum(-1) + always.sum(-1)).unsqueeze(-1)
                return logits, picked * whole, experts_of(layer, logits), always * whole
            if rule.host.normalize == "chosen":
                picked = picked / picked.sum(-1, keepdim=True).clamp(min=1e-30)
            weights = (picked * layer.host.scale)[:, : layer.num_experts]
            replaced = list(out)
            replaced[rule.outputs.weights] = weights
            replaced[rule.outputs.indices] = experts_of(layer, logits)
            return tuple(replaced)

        return hook

    def remember(block, args, kwargs):
        block.given = args[0] if args else next(iter(kwargs.values()))

    for layer in layers:
        handles.append(layer.block.register_forward_pre_hook(remember, with_kwargs=True))
        handles.append(layer.router.register_forward_hook(dense(layer)))
    implementation = layers[0].experts.config._experts_implementation
    for layer in layers:
        layer.experts.config._experts_implementation = "eager"
    yield
    for layer in layers:
        layer.experts.config._experts_implementation = implementation
        layer.block.__dict__.pop("given", None)
    for handle in handles:
        handle.remove()


def experts_of(layer: Layer, logits: torch.Tensor) -> torch.Tensor:
    return torch.arange(layer.num_experts).expand(len(logits), -1)


def best_pairs(scores: torch.Tensor, real: torch.Tensor, k: float) -> torch.Tensor:
    """A mask (T, E) of the best pairs of each sequence, one by one."""
    batch, length = real.shape
    experts = scores.shape[1]
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for row in range(batch):
        tokens = [row * length + t for t in range(length) if real[row, t]]
        pairs = [(-scores[t, e].item(), t, e) for t in tokens for e in range(experts)]
        for _, token, expert in sorted(pairs)[: int(k * len(tokens) + 0.5)]:
            mask[token, expert] = True
    return mask


def test_a_ragged_route_equals_the_oracle_in_output_and_gradients(family):
    model, given = family
    if not sees_all_tokens(model, given):
        for some in (given, {name: value for name, value in given.items() if name != "attention_mask"}):
            with usmoe.patched(model, usmoe.USMoE()), pytest.raises(ValueError, match="which of them they are"):
                model(**some)
        return
    layers = [layer for layer in moe_layers(model) if not layer.fixed]
    k = 0.75 * layers[0].host.k + 0.3
    mask = given.get("attention_mask")
    results = []
    parameters = [p for layer in layers for p in (*layer.router.parameters(), *layer.experts.parameters())]
    parameters = list({id(p): p for p in parameters if p.requires_grad}.values())
    for way in (
        usmoe.patched(model, usmoe.USMoE(k=k)),
        by_every_expert(model, layers, k, None if mask is None else mask.bool()),
    ):
        with way:
            out = answer(model, given)
            toward = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
            gradients = torch.autograd.grad((out * toward).sum(), parameters, allow_unused=True)
        results.append((out.detach(), gradients))
    (ours, our_gradients), (theirs, their_gradients) = results
    assert distance(ours, theirs) < 2e-5
    assert any(g is not None and g.abs().sum() > 0 for g in our_gradients)
    for mine, other in zip(our_gradients, their_gradients, strict=True):
        mine = torch.zeros(()) if mine is None else mine
        other = torch.zeros_like(mine) if other is None else other
        assert (mine - other).abs().max() <= 1e-3 * other.abs().max() + 1e-6


@pytest.mark.parametrize("name", OUTSIDERS)
def test_a_family_outside_of_the_interface_is_refused_with_the_reason_and_left_alone(name):
    family = OUTSIDERS[name]
    model = build(family)
    rows = usmoe.supported(model)
    assert rows
    assert not any(row.supported for row in rows)
    assert all("experts interface" in row.reason for row in rows)
    hooked = hooks(model)
    with pytest.raises(ValueError, match="not behind transformers' experts interface"):
        usmoe.patch(model, usmoe.USMoE(k=2))
    assert hooks(model) == hooked


def test_every_family_of_this_transformers_is_here_and_on_the_page():
    models = Path(transformers.__file__).parent / "models"
    behind = {
        path.parent.name for path in models.glob("*/modeling_*.py") if "use_experts_implementation" in path.read_text()
    }
    assert behind <= {name.split()[0] for name in FAMILIES}
    rows = {cells[0]: cells for cells in shown()}
    assert list(rows) == [*FAMILIES, *OUTSIDERS], "python tests/families_table.py writes the table anew"
    for name in FAMILIES:
        assert float(rows[name][3]) < LARGEST
        assert rows[name][2] == "; ".join(
            dict.fromkeys(row.own_choice or row.reason for row in usmoe.supported(build(FAMILIES[name])))
        )
