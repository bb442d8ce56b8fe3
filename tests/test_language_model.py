"""Transformer-XL and the modern decoder: attention by hand, memory, padding, causality, vocabularies, sizes."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import usmoe
from rounding import assert_to_rounding
from usmoe.models.attention import RelativeAttention, Sight, shift, sinusoid
from usmoe.models.config import MODELS, LanguageConfig
from usmoe.models.flops import flops, flops_of_reading
from usmoe.models.language import LanguageModel
from usmoe.models.words import CHUNK, AdaptiveWords, Words

TINY = {
    "xl": LanguageConfig(
        vocabulary=11, layers=2, d_model=16, heads=2, d_ff=8, num_experts=4, dropout=0.0, router="token_choice(k=2)"
    ),
    "decoder": LanguageConfig(
        vocabulary=11,
        layers=2,
        d_model=16,
        heads=2,
        d_ff=8,
        num_experts=4,
        dropout=0.0,
        router="token_choice(k=2)",
        position="rotary",
        norm="rms",
        norm_place="pre",
        qk_norm=True,
        activation="swiglu",
    ),
}
ROUNDING = {"relative": 1e-12, "rotary": 2e-6}
"""The models are in float64; angles are float32, and another offset of a sequence rounds them differently."""
backbones = pytest.mark.parametrize("config", TINY.values(), ids=TINY)


def made(config: LanguageConfig, router: object = None, seed: int = 0) -> LanguageModel:
    """A model in evaluation mode whose gates and vectors have spread, in float64."""
    torch.manual_seed(seed)
    model = LanguageModel(config, router).eval().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.5)
    return model


def text(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 11, (batch, length), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------ attention


def test_relative_attention_by_hand():
    """One head of width 1, D = 2, two tokens after one remembered: every product written out.

    seen = (1, 0), (0, 1), (1, 1); the last two are the segment. Wq = (1, 2), Wk = (3, 1), Wv = (1, -1), Wr = (1, 1),
    u = 0.5, v = 0.25. r(distance) = sin(distance) + cos(distance).
    """
    attention = RelativeAttention(LanguageConfig(d_model=2, heads=1, head_size=1, num_experts=0, d_ff=1)).eval()
    with torch.no_grad():
        attention.query.weight.copy_(torch.tensor([[1.0, 2.0]]))
        attention.key_value.weight.copy_(torch.tensor([[3.0, 1.0], [1.0, -1.0]]))
        attention.distance.weight.copy_(torch.tensor([[1.0, 1.0]]))
        attention.content_bias.fill_(0.5)
        attention.distance_bias.fill_(0.25)
        attention.out.weight.copy_(torch.tensor([[1.0], [10.0]]))
    seen = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    r = {distance: math.sin(distance) + math.cos(distance) for distance in range(3)}
    key, value = (3.0, 1.0, 4.0), (1.0, -1.0, 0.0)

    def mixed(query: float, place: int) -> float:
        scores = [(query + 0.5) * key[j] + (query + 0.25) * r[place - j] for j in range(place + 1)]
        weights = torch.tensor(scores).softmax(0).tolist()
        return sum(w * value[j] for j, w in enumerate(weights))

    first, second = mixed(2.0, 1), mixed(3.0, 2)
    found = attention(seen[:, 1:], seen, Sight.of(2, 1))
    torch.testing.assert_close(found, torch.tensor([[[first, 10 * first], [second, 10 * second]]]))


def test_dropout_stands_on_the_distances():
    """The same outputs as those of a layer that knows no distances, where all of them are dropped."""
    torch.manual_seed(0)
    config = LanguageConfig(d_model=8, heads=2, num_experts=0, d_ff=1, dropout=0.999999)
    attention, x = RelativeAttention(config).double(), torch.randn(1, 5, 8, dtype=torch.float64)
    dropped = attention(x, x, Sight.of(5, 0))
    assert not torch.equal(dropped, attention.eval()(x, x, Sight.of(5, 0)))
    torch.nn.init.zeros_(attention.distance.weight)
    torch.testing.assert_close(dropped, attention(x, x, Sight.of(5, 0)))


@pytest.mark.portable
@backbones
def test_a_model_that_was_read_in_inference_mode_can_be_trained(config: LanguageConfig):
    """Of a length that no other test has: what is kept of a length is made by whoever comes first."""
    model, tokens = made(config), torch.arange(61).view(1, 61) % 11
    with torch.inference_mode():
        before = model(tokens).hidden.clone()
    after = model(tokens).hidden
    after.sum().backward()
    torch.testing.assert_close(before, after, rtol=0, atol=1e-12)


def test_the_shift_brings_each_distance_to_its_key():
    length, keys = 3, 5
    by_distance = torch.arange(length * keys, dtype=torch.float32).view(1, 1, length, keys)
    found = shift(by_distance)
    for i in range(length):
        for j in range(keys - length + i + 1):
            distance = keys - length + i - j
            assert found[0, 0, i, j] == by_distance[0, 0, i, keys - 1 - distance]


def test_the_sinusoids_of_the_distances():
    found = sinusoid(3, 4, torch.device("cpu"), torch.float32)
    for row, distance in enumerate((2, 1, 0)):
        expected = [math.sin(distance), math.sin(distance / 100), math.cos(distance), math.cos(distance / 100)]
        torch.testing.assert_close(found[row], torch.tensor(expected))


@pytest.mark.portable
@backbones
def test_no_gradient_comes_from_a_later_word(config: LanguageConfig):
    """The gradient of one token's output with respect to later words is exactly zero, to earlier ones it is not.

    Exactly on every processor: what is masked has weight 0, and 0 times anything is 0. The output is weighed, since the
    plain sum of what a LayerNorm returns is 0 whatever it reads.
    """
    model = made(config)
    x = model.words.embed(text(1, 6)).detach().requires_grad_()
    model.words.embed = lambda tokens: x
    (model(text(1, 6)).hidden[0, 2] * torch.arange(16)).sum().backward()
    assert x.grad is not None
    assert (x.grad[0, 3:] == 0).all()
    assert (x.grad[0, :3].abs().amax(-1) > 1e-3).all()


# --------------------------------------------------------------------------------------------- memory

POOLS = {
    "token choice": usmoe.TokenChoice(k=2),
    "threshold": usmoe.USMoE(pool="threshold", threshold=0.3),
    "prefix": usmoe.USMoE(k=1.5, pool="prefix"),
    "prefix, bucket": usmoe.USMoE(k=1.5, pool="prefix", burst=1.5),
    "threshold, bucket": usmoe.USMoE(k=1, pool="threshold", threshold=0.2, burst=2),
    "time step": usmoe.USMoE(k=1.5, pool="time_step"),
}


@pytest.mark.portable
@pytest.mark.parametrize("router", POOLS.values(), ids=POOLS)
@backbones
def test_two_segments_with_memory_are_one_long_segment(config: LanguageConfig, router: usmoe.USMoE):
    model, tokens = made(config, router), text(3, 12)
    whole = model(tokens, stream=True).hidden
    first = model(tokens[:, :7], remember=7, stream=True)
    second = model(tokens[:, 7:], memory=first.memory, remember=7, stream=True)
    torch.testing.assert_close(
        torch.cat([first.hidden, second.hidden], 1), whole, rtol=0, atol=ROUNDING[config.position]
    )
    assert second.memory is not None
    assert second.memory.length == 7


@backbones
def test_a_pool_of_a_segment_is_not_a_pool_of_the_whole(config: LanguageConfig):
    """The positive control: what looks ahead differs."""
    model, tokens = made(config, usmoe.USMoE(k=1.5)), text(3, 12)
    first = model(tokens[:, :7], remember=7, stream=True)
    second = model(tokens[:, 7:], memory=first.memory, stream=True)
    parts = torch.cat([first.hidden, second.hidden], 1)
    assert (parts - model(tokens).hidden).abs().max() > 1e-3


@backbones
def test_memory_has_a_length_and_no_gradient(config: LanguageConfig):
    model, tokens = made(config), text(2, 5)
    memory = None
    for _ in range(3):
        out = model(tokens, memory=memory, remember=8)
        memory = out.memory
        assert all(not layer.requires_grad for layer in memory.layers)
    assert memory.length == 8
    assert model(tokens).memory is None
    short = model(tokens, memory=model(tokens, remember=2).memory).hidden
    long = model(tokens, memory=model(tokens, remember=5).memory).hidden
    assert (short - long).abs().max() > 1e-6


# ----------------------------------------------------------------------- padding, packing, causality


@pytest.mark.portable
@pytest.mark.parametrize("router", [usmoe.TokenChoice(k=2), usmoe.USMoE(k=1.5), usmoe.ExpertChoice(k=2)], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@backbones
def test_padding_changes_nothing(config: LanguageConfig, router: object, side: str):
    model, tokens = made(config, router), text(1, 5)
    alone = model(tokens).hidden
    padding = text(1, 3, seed=9)
    both = (padding, tokens) if side == "left" else (tokens, padding)
    real = torch.cat([torch.full_like(part, part is tokens, dtype=torch.bool) for part in both], 1)
    beside = text(1, 8, seed=4)
    padded = model(torch.cat([torch.cat(both, 1), beside]), valid=torch.cat([real, torch.ones_like(real)])).hidden
    torch.testing.assert_close(padded[:1][real].unsqueeze(0), alone, rtol=0, atol=ROUNDING[config.position])


@pytest.mark.portable
@backbones
def test_packed_examples_are_as_if_alone(config: LanguageConfig):
    model, one, two = made(config, usmoe.USMoE(k=1.5)), text(1, 5), text(1, 4, seed=3)
    packed = model(torch.cat([one, two], 1), segments=torch.tensor([[7] * 5 + [9] * 4])).hidden
    torch.testing.assert_close(packed[:, :5], model(one).hidden, rtol=0, atol=ROUNDING[config.position])
    torch.testing.assert_close(packed[:, 5:], model(two).hidden, rtol=0, atol=ROUNDING[config.position])


@pytest.mark.portable
@pytest.mark.parametrize("router", [usmoe.TokenChoice(k=2), usmoe.USMoE(k=1.5, pool="prefix")], ids=str)
@backbones
def test_later_tokens_change_nothing(config: LanguageConfig, router: object):
    model, tokens = made(config, router), text(2, 8)
    other = tokens.clone()
    other[:, 5:] = (other[:, 5:] + 3) % 11
    torch.testing.assert_close(
        model(tokens).hidden[:, :5], model(other).hidden[:, :5], rtol=0, atol=ROUNDING[config.position]
    )


# ---------------------------------------------------------------------------------------------- words


def test_head_and_loss_in_chunks_are_those_of_the_whole():
    config = LanguageConfig(vocabulary=7, d_model=5, heads=1, num_experts=0)
    words, hidden = Words(config, std=1.0), torch.randn(CHUNK + 9, 5, requires_grad=True)
    targets = torch.randint(0, 7, (len(hidden),))
    total, nats = words.loss(hidden, targets, 0.3)
    logits = hidden @ words.vectors.T
    expected = cross_entropy(logits, targets) + 0.3 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(nats, cross_entropy(logits, targets))
    wanted = torch.autograd.grad(expected, [hidden, words.vectors])
    for found, want in zip(torch.autograd.grad(total, [hidden, words.vectors]), wanted, strict=True):
        torch.testing.assert_close(found, want)
    torch.testing.assert_close(words.nats(hidden, targets), cross_entropy(logits, targets, reduction="none"))


def adaptive() -> AdaptiveWords:
    torch.manual_seed(0)
    config = LanguageConfig(vocabulary=30, d_model=8, heads=1, num_experts=0, cutoffs=(6, 14), shrink=2)
    return AdaptiveWords(config, std=1.0)


def test_adaptive_softmax_is_torchs():
    words = adaptive()
    theirs = torch.nn.AdaptiveLogSoftmaxWithLoss(8, 30, [6, 14], div_value=2)
    with torch.no_grad():
        theirs.head.weight.copy_(torch.cat([words.vectors[0], words.clusters]))
        for number, tail in enumerate(theirs.tail):
            tail[0].weight.copy_(words.projections[number].T)
            tail[1].weight.copy_(words.vectors[number + 1])
    hidden, targets = torch.randn(50, 8), torch.randint(0, 30, (50,))
    torch.testing.assert_close(words.logits(hidden), theirs.log_prob(hidden))
    torch.testing.assert_close(words.logits(hidden).exp().sum(-1), torch.ones(50))
    torch.testing.assert_close(words.nats(hidden, targets), -theirs(hidden, targets).output)
    total, nats = words.loss(hidden, targets)
    torch.testing.assert_close(total, theirs(hidden, targets).loss)
    assert nats == total.detach()


def test_adaptive_words_are_tied():
    words = adaptive()
    tokens = torch.tensor([[3, 8], [20, 0]])
    expected = [
        words.vectors[0][3],
        words.projections[0] @ words.vectors[1][2],
        words.projections[1] @ words.vectors[2][6],
        words.vectors[0][0],
    ]
    torch.testing.assert_close(words.embed(tokens).flatten(0, 1), torch.stack(expected))


# ------------------------------------------------------------------------------------ sizes and costs


def test_the_base_model_has_the_papers_size():
    """19.42 M parameters without the words, as the released code's model (facts: d 256, 8 heads of 64, 16 experts)."""
    model = LanguageModel(MODELS["transformer-xl-base"].replace(vocabulary=256))
    counted = sum(one.numel() for name, one in model.named_parameters() if not name.startswith("words."))
    assert 19.40e6 < counted < 19.44e6


def test_an_expert_more_costs_what_the_arithmetic_says():
    base = MODELS["transformer-xl-base"].replace(vocabulary=256)
    one, two = (flops(base, k, segment=512, memory=512) for k in (1, 2))
    assert two.experts - one.experts == 4 * 2 * (2 * 256 * 512) == 2_097_152
    assert two.total - one.total == two.experts - one.experts
    dense = flops(base.replace(num_experts=0, d_ff=1024), 0, segment=512, memory=512)
    assert dense.shared == two.experts
    assert dense.experts == dense.router == 0


def test_a_reading_costs_the_memory_that_was_there():
    """Ten tokens in segments of four that remember six: 4 after none, 4 after four, 2 after six."""
    for config in (TINY["xl"], TINY["decoder"]):
        found = flops_of_reading(config, 1.5, 10, segment=4, memory=6)
        parts = [(4, flops(config, 1.5, 4, 0)), (4, flops(config, 1.5, 4, 4)), (2, flops(config, 1.5, 2, 6))]
        for name in ("experts", "shared", "router", "projections", "attention", "words"):
            mean = sum(tokens * getattr(cost, name) for tokens, cost in parts) / 10
            assert getattr(found, name) == pytest.approx(mean), name
        assert found.total < flops(config, 1.5, 4, 6).total
    with pytest.raises(ValueError, match="A text of 0 tokens"):
        flops_of_reading(TINY["xl"], 1.5, 0, segment=4)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"heads": 3}, "does not divide into 3 heads"),
        ({"position": "absolute"}, "one of relative, rotary"),
        ({"dropout": 1.0}, "no share"),
        ({"cutoffs": (5, 3)}, "do not ascend"),
        ({"cutoffs": (5, 11)}, "leave nothing"),
        ({"cutoffs": (5,), "tied": False}, "shares its words"),
        ({"gate": "quantum"}, "Known: linear"),
        ({"num_experts": -1}, "Give 0 or more"),
        ({"position": "rotary", "head_size": 3}, "even head_size"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        TINY["xl"].replace(**changes)


def test_k_above_the_number_of_experts_is_refused():
    with pytest.raises(ValueError, match="impossible with 4 experts"):
        LanguageModel(TINY["xl"].replace(router="token_choice(k=5)"))


def test_routers_one_a_layer():
    model = made(TINY["xl"])
    model.reroute([usmoe.TokenChoice(k=1), usmoe.TokenChoice(k=3)])
    said = model(text(1, 4)).said
    assert [one.routing.experts_per_token.unique().tolist() for one in said] == [[1], [3]]
    with pytest.raises(ValueError, match="2 MoE layers, and 3 routers"):
        model.reroute([usmoe.TokenChoice(k=1)] * 3)


# ------------------------------------------------------------------------------------- transformers


@pytest.mark.portable
@pytest.mark.parametrize("router", ["token_choice(k=2)", "usmoe(k=1.5)"])
def test_the_decoder_is_an_olmoe(router: str, tmp_path, quiet_transformers):
    from usmoe.train.export import as_olmoe, export

    model, tokens = made(TINY["decoder"].replace(router=router)).float(), text(2, 9)
    theirs = as_olmoe(model, context=16).eval()
    logits = model.words.logits(model(tokens).hidden)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, logits, rtol=1e-5, atol=1e-4)
    export(model, None, tmp_path / "model", context=16)
    again = usmoe.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert_to_rounding(again(tokens).logits, theirs(tokens).logits)
    with pytest.raises(ValueError, match="already there"):
        export(model, None, tmp_path / "model", context=16)


def test_a_transformer_xl_is_no_olmoe():
    from usmoe.train.export import as_olmoe

    with pytest.raises(ValueError, match="position='relative'"):
        as_olmoe(made(TINY["xl"]), context=16)
