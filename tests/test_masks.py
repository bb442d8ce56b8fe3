"""Padding and examples, from masks drawn by hand: a row for each token, # where it may look at a key."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

import families
import usmoe
from tiny import tiny, tokens
from usmoe.hf.masks import MisshapenMaskError, UnreadableMaskError, tokens_of_mask

POOL, PREFIX, THRESHOLD = (
    usmoe.USMoE(k=1.5),
    usmoe.USMoE(k=1.5, pool="prefix"),
    usmoe.USMoE(pool="threshold", threshold=0.2),
)


def drawn(*rows: str) -> Tensor:
    return torch.tensor([[one == "#" for one in row] for row in rows])[None, None]


def added(mask: Tensor, least: float = torch.finfo(torch.float32).min) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, least)


READ = {
    "causal": (drawn("#..", "##.", "###"), [1, 1, 1], None),
    "in both directions": (drawn("###", "###", "###"), [1, 1, 1], None),
    "a prefix in both directions": (drawn("##..", "##..", "###.", "####"), [1, 1, 1, 1], None),
    "a window of two": (drawn("#...", "##..", ".##.", "..##"), [1, 1, 1, 1], None),
    "two examples": (drawn("#...", "##..", "..#.", "..##"), [1, 1, 1, 1], [-1, -1, 0, 0]),
    "two examples in both directions": (drawn("##..", "##..", "..##", "..##"), [1, 1, 1, 1], [-1, -1, 0, 0]),
    "an example of one token": (drawn("#..", ".#.", ".##"), [1, 1, 1], [-1, 0, 0]),
    "two examples under a window": (
        drawn("#.....", "##....", ".##...", "...#..", "...##.", "....##"),
        [1] * 6,
        [-1, -1, -1, 0, 0, 0],
    ),
    "padding on the left that looks at nothing": (drawn("....", "....", "..#.", "..##"), [0, 0, 1, 1], None),
    "padding on the left that looks at itself": (drawn("#...", ".#..", "..#.", "..##"), [1, 1, 1, 1], [-2, -1, 0, 0]),
    "padding on the right that looks at what is real": (drawn("#...", "##..", "##..", "##.."), [1, 1, 0, 0], None),
    "padding between two examples": (
        drawn("#....", "##...", ".....", "...#.", "...##"),
        [1, 1, 0, 1, 1],
        [-1, -1, -1, 0, 0],
    ),
}


@pytest.mark.parametrize("form", ["bool", "least", "-inf", "half", "heads", "mapping"])
@pytest.mark.parametrize("name", READ)
def test_a_mask_is_read_as_it_is_drawn(name, form):
    mask, real, example = READ[name]
    length = mask.shape[-1]
    forms = {
        "bool": mask,
        "least": added(mask),
        "-inf": added(mask, -torch.inf),
        "half": added(mask, torch.finfo(torch.float16).min).half(),
        "heads": torch.cat([mask, mask & torch.eye(length, dtype=torch.bool)], 1),  # a head that looks at itself alone
        "mapping": {"full": added(mask), "sliding": added(mask & torch.eye(length, dtype=torch.bool)), "linear": None},
    }
    valid, segments = tokens_of_mask(forms[form], 2, length, 0)
    assert valid is not None
    assert valid.int().tolist() == [real, real]
    assert (None if segments is None else segments.tolist()) == (None if example is None else [example, example])


UNREADABLE = {
    "two answers to one question": drawn("#...", "##..", "###.", "##.#"),
    "padding on the right that looks at what is real and at itself": drawn("#....", "##...", "###..", "##.#.", "##..#"),
    "padding on the left that looks at all": drawn("####", "####", "..#.", "..##"),
    "an order of its own": drawn("####", ".#..", ".##.", ".###"),
    "a token that others look at, but not itself": drawn("#..", "#..", "###"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_told_is_refused_where_tokens_compete(name):
    mask = UNREADABLE[name]
    with pytest.raises(UnreadableMaskError):
        tokens_of_mask(mask, 1, mask.shape[-1], 0)
    model, x = tiny(), tokens(1, mask.shape[-1])
    for router in (POOL, PREFIX):
        with pytest.raises(ValueError, match=r"which tokens are padding and which belong together, and under usmoe\("):
            usmoe.patch(model, router)(x, attention_mask=mask)
    usmoe.patch(model, THRESHOLD)
    with usmoe.record(model) as trace:
        model(x, attention_mask=mask)
    assert all(said.routing.valid is None for said in trace.last.values())  # each token by itself, and none is dropped


def test_with_a_cache_the_last_keys_are_those_of_the_tokens():
    step = drawn("###.", "####")  # two tokens after two, in a cache that grows
    assert tokens_of_mask(step, 1, 2, 2)[1] is None
    static = drawn("###...", "####..")  # the same in a cache of six
    valid, segments = tokens_of_mask(static, 1, 2, 2)
    assert (valid.tolist(), segments) == ([[True, True]], None)
    assert tokens_of_mask(drawn("..#...", "..##.."), 1, 2, 2)[0].tolist() == [[True, True]]  # what is before is padding
    with pytest.raises(UnreadableMaskError, match="go on from one cache"):
        tokens_of_mask(drawn("###.", "##.#"), 1, 2, 2)
    with pytest.raises(MisshapenMaskError):
        tokens_of_mask(step, 1, 3, 2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_masks_that_transformers_makes_are_read(attention):
    """By its own functions: causal and by window, with padding on the left, with examples packed by positions."""
    config = tiny("mixtral", sliding_window=3).config
    config._attn_implementation = attention
    embeds, padding = torch.zeros(2, 6, 32), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    places = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    for make in (create_causal_mask, create_sliding_window_causal_mask):
        given = dict(config=config, inputs_embeds=embeds, past_key_values=None)
        valid, segments = tokens_of_mask(make(attention_mask=padding, **given), 2, 6, 0)
        assert valid.int().tolist() == padding.tolist()
        assert segments is None
        valid, segments = tokens_of_mask(make(attention_mask=None, position_ids=places, **given), 2, 6, 0)
        assert bool(valid.all())
        assert segments.tolist() == [[-1, -1, -1, 0, 0, 0]] * 2


@torch.no_grad()
@pytest.mark.parametrize("router", [POOL, PREFIX, usmoe.BoundedChoice(k=2), usmoe.ExpertChoice(k=2)], ids=str)
@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "qwen2_moe"])
def test_padding_that_looks_at_itself_does_not_compete_with_what_is_real(family, router):
    model, x = usmoe.patch(tiny(family).double(), router), tokens(1, 6)
    alone = model(x[:, 2:]).logits
    mask = drawn("#.....", ".#....", "..#...", "..##..", "..###.", "..####")
    places = torch.tensor([[0, 0, 0, 1, 2, 3]])
    for form in (mask, added(mask).double()):
        said = model(x, attention_mask=form, position_ids=places).logits[:, 2:]
        torch.testing.assert_close(said, alone, rtol=1e-6, atol=1e-7)


@torch.no_grad()
def test_what_is_packed_by_a_mask_does_not_go_on_in_a_cache_that_remembers_one():
    model = usmoe.patch(tiny(), PREFIX)
    mask = READ["two examples"][0]
    with pytest.raises(ValueError, match=r"packed into one row here, and usmoe\(k=1.5, pool=prefix\) remembers one"):
        model(tokens(1, 4), attention_mask=mask, past_key_values=DynamicCache(config=model.config))
    model(tokens(1, 4), attention_mask=mask, use_cache=False)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss", "afmoe", "gemma4", "qwen3_vl_moe"])
@pytest.mark.usefixtures("quiet_transformers")
def test_positions_part_what_is_routed_exactly_where_they_part_what_attention_sees(family, use_cache):
    """Another first example moves the second under our routers exactly where it does under the model's own: beside a
    cache it does, and in some families always."""
    x, places = tokens(1, 9), torch.cat([torch.arange(4), torch.arange(5)])[None]
    other = torch.cat([tokens(1, 4, seed=5), x[:, 4:]], 1)
    moves = {}
    for router in (usmoe.OwnChoice(), POOL, PREFIX, usmoe.ExpertChoice(k=2)):
        model = usmoe.patch(families.build(families.FAMILIES[family]).double(), router)
        one, two = (model(ids, position_ids=places, use_cache=use_cache).logits[:, 4:] for ids in (x, other))
        moves[str(router)] = bool((one - two).abs().max() > 1e-9)
    assert len(set(moves.values())) == 1, moves
    assert moves["own_choice"] is (use_cache or family in ("gpt_oss", "afmoe"))


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_run_again_in_backward_keep_examples_apart(reentrant):
    x, places = tokens(1, 9), torch.cat([torch.arange(4), torch.arange(5)])[None]
    gradients = []
    for again in (False, True):
        model = tiny().double().train()
        model.set_experts_implementation("eager")
        if again:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        usmoe.patch(model, POOL)
        model(x, position_ids=places, labels=x, use_cache=False).loss.backward()
        gradients.append(model.model.layers[0].mlp.experts.down_proj.grad)
    torch.testing.assert_close(*gradients)


@torch.no_grad()
def test_lengths_for_flash_attention_part_examples_where_it_is_used():
    """Its kernels are not here, so attention is replaced by the same in plain words."""

    def by_lengths(module, query, key, value, mask, scaling=None, cu_seq_lens_q=None, **_):
        number = torch.searchsorted(cu_seq_lens_q[1:].contiguous(), torch.arange(query.shape[2]), right=True)
        looks = (number[:, None] == number) & torch.ones(len(number), len(number), dtype=torch.bool).tril()
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=looks, scale=scaling)
        return out.transpose(1, 2), None

    AttentionInterface.register("flash_in_words", by_lengths)
    first, second = tokens(1, 4, 1), tokens(1, 5, 2)
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    lengths = dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=5, max_length_k=5)
    places = torch.cat([torch.arange(4), torch.arange(5)])[None]
    for router in (usmoe.OwnChoice(), POOL, PREFIX):
        model = usmoe.patch(tiny().double(), router)
        alone = torch.cat([model(first).logits, model(second).logits], 1)
        model.config._attn_implementation_internal = "flash_in_words"
        packed = model(torch.cat([first, second], 1), position_ids=places, use_cache=False, **lengths).logits
        torch.testing.assert_close(packed, alone, rtol=1e-6, atol=1e-7)
