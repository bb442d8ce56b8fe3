"""Losses of routing, with every router: against the loops, padding left out, nothing at all."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from small_layer import VALID, B, E, L, layer, tokens
from usmoe import ExpertChoice, RouterOutput, Routing, TokenChoice, USMoE, route
from usmoe.layers.balance import balance_loss, pooled_balance_loss
from usmoe.layers.losses import distillation_loss, similarity_loss, z_loss


def outputs(router: Any, valid: Tensor | None) -> list[RouterOutput]:
    """Two layers of a stable gate, with gradients."""
    made = []
    for seed in (1, 2):
        logits, distilled = tokens(seed)[..., :E].requires_grad_(), tokens(seed + 5)[..., :E].requires_grad_()
        routing = route(logits, router, valid=valid)
        made.append(RouterOutput(routing=routing, logits=logits, distilled=distilled))
    return made


def balance_by_loops(said: list[RouterOutput]) -> Any:
    total: Any = 0.0
    for one in said:
        tokens = [t for t in range(one.routing.num_tokens) if real(one, t)]
        shares = {t: reference.softmax(list(one.logits.flatten(0, 1)[t])) for t in tokens}
        mask = one.routing.mask().tolist()
        for e in range(E):
            load = sum(mask[t][e] for t in tokens) / len(tokens)
            total = total + E * load * sum(shares[t][e] for t in tokens) / len(tokens)
    return total


def z_by_loops(said: list[RouterOutput]) -> Any:
    layers = []
    for one in said:
        rows = [row for t, row in enumerate(one.logits.flatten(0, 1)) if one.routing.valid is None or real(one, t)]
        layers.append(sum(reference.add([reference.exp(x) for x in row]).log() ** 2 for row in rows) / len(rows))
    return sum(layers) / len(layers)


def distillation_by_loops(said: list[RouterOutput]) -> Any:
    layers = []
    for one in said:
        assert one.distilled is not None
        shares = [reference.softmax(list(row)) for row in one.distilled.flatten(0, 1)]
        pairs = zip(one.routing.token.tolist(), one.routing.expert.tolist(), strict=True)
        costs = [-shares[t][e].log() for t, e in pairs if real(one, t)]
        layers.append(sum(costs) / len(costs))
    return sum(layers) / len(layers)


def similarity_by_loops(said: list[RouterOutput]) -> Any:
    """1/T sum over (i, j) of W_ij * P_ij, with W by counting tokens that have both experts."""
    layers = []
    for one in said:
        tokens = [t for t in range(one.routing.num_tokens) if real(one, t)]
        shares = {t: reference.softmax(list(one.logits.flatten(0, 1)[t])) for t in tokens}
        mask = one.routing.mask().tolist()
        shared = [[sum(mask[t][i] and mask[t][j] for t in tokens) for j in range(E)] for i in range(E)]
        diagonal = sum(shared[i][i] for i in range(E))
        others = sum(map(sum, shared)) - diagonal
        total: Any = 0.0
        for i in range(E):
            for j in range(E):
                alike = sum(shares[t][i] * shares[t][j] for t in tokens)
                factor = E / diagonal if i == j else (E * E - E) / max(others, 1)
                total = total + factor * shared[i][j] * alike
        layers.append(total / len(tokens))
    return sum(layers) / len(layers)


def real(one: RouterOutput, token: int) -> bool:
    return one.routing.valid is None or bool(one.routing.valid[token])


LOSSES = [
    (balance_loss, balance_by_loops),
    (z_loss, z_by_loops),
    (distillation_loss, distillation_by_loops),
    (similarity_loss, similarity_by_loops),
]


@pytest.mark.parametrize("valid", [None, VALID], ids=["whole", "padded"])
@pytest.mark.parametrize(
    "router", [TokenChoice(k=2), USMoE(k=1.5), USMoE(k=1.5, mask_padding=False), ExpertChoice(k=1)], ids=str
)
@pytest.mark.parametrize(("loss", "loops"), LOSSES, ids=["balance", "z", "distillation", "similarity"])
def test_losses_and_gradients_equal_the_loops(loss: Any, loops: Any, router: Any, valid: Tensor | None):
    said = outputs(router, valid)
    inputs: Any = [x for one in said for x in (one.logits, one.distilled)]
    ours, theirs = loss(said), loops(said)
    torch.testing.assert_close(ours, theirs)
    gradient = [torch.autograd.grad(x, inputs, allow_unused=True) for x in (ours, theirs)]
    for one, other in zip(*gradient, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("loss", [balance_loss, z_loss, distillation_loss, similarity_loss])
def test_what_padding_holds_reaches_no_loss_and_no_gradient(loss: Any):
    said = outputs(TokenChoice(k=1), VALID)
    for garbage in (1e30, math.nan, math.inf):
        spoilt = []
        for one in said:
            assert one.distilled is not None
            both = [
                x.detach().masked_fill(~VALID[..., None], garbage).requires_grad_() for x in (one.logits, one.distilled)
            ]
            spoilt.append(RouterOutput(routing=one.routing, logits=both[0], distilled=both[1]))
        torch.testing.assert_close(loss(spoilt), loss(said))
        loss(spoilt).backward()
        grads = [x.grad for one in spoilt for x in (one.logits, one.distilled) if x is not None and x.grad is not None]
        assert grads
        assert all(g.isfinite().all() and not g[~VALID].any() for g in grads)


def test_layers_that_are_imbalanced_towards_different_experts_are_imbalanced():
    """Layer e sends all tokens to expert e: E a layer, which transformers' pooled form takes for balance."""
    said = []
    for expert in range(E):
        logits = torch.zeros(1, 5, E)
        logits[..., expert] = 100.0
        said.append(RouterOutput(routing=route(logits, TokenChoice(k=1)), logits=logits))
    assert balance_loss(said).item() == pytest.approx(E * E)
    assert pooled_balance_loss(said).item() == pytest.approx(1)
    torch.testing.assert_close(balance_loss(said[:1]), pooled_balance_loss(said[:1]))


def test_padding_is_left_out_also_under_a_router_that_does_not_say_what_it_is():
    def every_expert_above_average(logits: Tensor, valid: Any = None, **_: Any) -> Routing:
        shares = logits.softmax(-1)
        return Routing.from_dense(shares, shares > 1 / E)

    own = layer(router=every_expert_above_average)
    x = tokens()
    losses = (balance_loss, z_loss, similarity_loss)
    _, padded = own(x, valid=VALID)
    assert torch.equal(padded.routing.valid, VALID.flatten())
    _, other = own(x.masked_fill(~VALID[..., None], 3.0), valid=VALID)
    assert [loss([padded]) for loss in losses] == [loss([other]) for loss in losses]


def test_losses_of_nothing_are_0():
    nothing = outputs(TokenChoice(k=1), torch.zeros(B, L, dtype=torch.bool))
    for loss in (balance_loss, pooled_balance_loss, z_loss, distillation_loss, similarity_loss):
        assert loss([]) == 0
        assert loss(nothing) == 0
    _, plain = layer()(tokens())
    assert distillation_loss([plain]) == 0
    dull = torch.full((1, 2, E), -torch.inf)
    for loss in (balance_loss, z_loss):
        assert loss([RouterOutput(routing=route(dull, TokenChoice(k=1)), logits=dull)]) == 0


def test_similarity_is_1_where_all_is_even_and_more_where_experts_go_together():
    """Six tokens: each pair of experts shares as many tokens as any other, or none does, or two pairs share all."""
    even = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0]])
    flat = torch.zeros(1, 6, E, dtype=torch.float64)

    def of(mask: Tensor, logits: Tensor) -> float:
        routing = Routing.from_dense(torch.ones(6, E), mask.bool())
        return similarity_loss([RouterOutput(routing=routing, logits=logits)]).item()

    assert of(even, flat) == pytest.approx(1)
    assert of(torch.eye(E)[[0, 1, 2, 3, 0, 1]], flat) == pytest.approx(1 / E)  # no two together: the diagonal alone
    together = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]] * 3)
    alike = (together * 4.0).double().unsqueeze(0)  # and the logits go together as the route does
    assert of(even, (even * 4.0).double().unsqueeze(0)) == pytest.approx(1)
    assert of(together, flat) == pytest.approx(1)
    assert of(together, alike) > 1.5


def test_layers_that_distil_nothing_do_not_thin_the_loss():
    _, plain = layer()(tokens())
    said = outputs(TokenChoice(k=1), None)
    torch.testing.assert_close(distillation_loss([*said, plain]), distillation_loss(said))


def test_the_z_loss_can_be_made_small():
    moe = layer()
    start = z_loss([moe(tokens())[1]]).item()
    optimizer = torch.optim.Adam(moe.gate.parameters(), lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        loss = z_loss([moe(tokens())[1]])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * start
