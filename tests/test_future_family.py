"""A family that transformers does not have yet: picked up by what it declares and does, or refused with a reason."""

import pytest
import torch
from torch import nn
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.integrations.moe import use_experts_implementation
from transformers.utils.output_capturing import OutputRecorder

import usmoe
from tiny import tokens


@use_experts_implementation(is_transposed=True, has_gate=False)
class Specialists(nn.Module):
    """Experts without a gate, stored the other way round, under a name that nobody has heard of."""

    def __init__(self, config, number=8, width=24):
        super().__init__()
        self.num_experts = number
        self.up_proj = nn.Parameter(torch.randn(number, config.hidden_size, width) * 0.2)
        self.down_proj = nn.Parameter(torch.randn(number, width, config.hidden_size) * 0.2)
        self.act_fn = nn.GELU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for token, (experts, weights) in enumerate(zip(top_k_index.tolist(), top_k_weights, strict=True)):
            for expert, weight in zip(experts, weights, strict=True):
                hidden = self.act_fn(hidden_states[token] @ self.up_proj[expert])
                out[token] = out[token] + weight * (hidden @ self.down_proj[expert])
        return out


class Dispatcher(nn.Module):
    """Square root of softplus, an offset an expert for ranking, clusters, a gain: outputs in an order of its own."""

    def __init__(self, config, rule="expressible"):
        super().__init__()
        self.matrix = nn.Linear(config.hidden_size, 8)
        self.usage_offsets = nn.Buffer(torch.zeros(8))
        self.clusters, self.open_clusters, self.fan_out, self.gain, self.rule = 4, 2, 3, 2.5, rule

    def forward(self, x):
        logits = self.matrix(x)
        scores = nn.functional.softplus(logits).sqrt()
        ranked = scores + self.usage_offsets
        best = ranked.view(-1, 4, 2).sum(-1).topk(self.open_clusters).indices
        closed = torch.ones(len(ranked), 4, dtype=torch.bool).scatter(1, best, False).repeat_interleave(2, 1)
        chosen = ranked.masked_fill(closed, -torch.inf).topk(self.fan_out).indices
        weights = scores.gather(1, chosen)
        weights = self.gain * weights / weights.sum(-1, keepdim=True)
        if self.rule == "squared":
            weights = weights**2
        if self.rule == "logits alone":
            return logits
        return chosen, weights, logits


class Bureau(nn.Module):
    def __init__(self, config, rule="expressible"):
        super().__init__()
        self.dispatcher = Dispatcher(config, rule)
        self.specialists = Specialists(config)

    def forward(self, hidden_states):
        flat = hidden_states.flatten(0, 1)
        said = self.dispatcher(flat)
        if isinstance(said, torch.Tensor):
            weights, chosen = said.softmax(-1).topk(3)
        else:
            chosen, weights, _ = said
        return self.specialists(flat, chosen, weights).view_as(hidden_states)


class TomorrowForCausalLM(OlmoeForCausalLM):
    _can_record_outputs = {"router_logits": OutputRecorder(Dispatcher, index=2)}  # noqa: RUF012


def model(rule="expressible", declared=True) -> OlmoeForCausalLM:
    config = OlmoeConfig(
        vocab_size=96, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    made = (TomorrowForCausalLM if declared else OlmoeForCausalLM)(config)
    for layer in made.model.layers:
        layer.mlp = Bureau(made.config, rule)
        layer.mlp.dispatcher.usage_offsets.normal_(std=0.1)
        layer.mlp.specialists.config = made.config
    made.set_experts_implementation("eager")
    return made.eval()


@pytest.mark.parametrize("declared", [True, False])
def test_it_is_picked_up_with_its_rule(declared):
    """Where nothing is declared, the module beside the experts that returns logits, weights and indices is asked; it
    must then have its logits in front, as all families do."""
    one = model(declared=declared)
    if not declared:
        for layer in one.model.layers:
            forward = layer.mlp.dispatcher.forward
            layer.mlp.dispatcher.forward = lambda x, forward=forward: (forward(x)[2], *forward(x)[1::-1])
            layer.mlp.forward = lambda x, block=layer.mlp: block.specialists(
                x.flatten(0, 1), *block.dispatcher(x.flatten(0, 1))[:0:-1]
            ).view_as(x)
    x = tokens()
    rows = usmoe.supported(one)
    assert {row.own_choice for row in rows} == {
        "top 3 of sqrtsoftplus + correction bias in the best 2 of 4 groups normalised over chosen times 2.5"
    }
    before = one(x).logits
    with usmoe.patched(one, usmoe.OwnChoice()):
        torch.testing.assert_close(one(x).logits, before, rtol=1e-5, atol=1e-5)
    with usmoe.patched(one, usmoe.USMoE(k=1.5)), usmoe.record(one) as trace:
        assert (one(x).logits - before).abs().max() > 1e-3
    assert [len(said.routing.token) for said in trace.last.values()] == [36, 36]
    assert torch.equal(one(x).logits, before)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("squared", "follows a rule that usmoe cannot express yet"),
        ("logits alone", "returns logits alone, and the block chooses the experts"),
    ],
)
def test_it_is_refused_with_the_reason_and_left_as_it_was(rule, reason):
    one = model(rule)
    before = one(tokens()).logits
    assert [row.reason for row in usmoe.supported(one)] == [f"its router {reason}"] * 2
    with pytest.raises(ValueError, match=rf"model\.layers\.0\.mlp of Tomorrow.* patched: its router {reason}"):
        usmoe.patch(one, usmoe.USMoE(k=1.5))
    assert torch.equal(one(tokens()).logits, before)


def test_experts_without_any_router_beside_them_are_refused():
    one = model(declared=False)
    for layer in one.model.layers:
        layer.mlp.dispatcher.forward = lambda x: x
    assert {row.reason for row in usmoe.supported(one)} == {"no router was found beside its experts"}
