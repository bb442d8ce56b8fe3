"""Generation under a patch: with a cache, step by step, as one forward over the whole says."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

import usmoe
from tiny import tiny, tokens

REMEMBERS = [
    usmoe.USMoE(k=2, pool="prefix"),
    usmoe.USMoE(k=1.5, pool="prefix", burst=3, min_experts=1),
    usmoe.USMoE(k=2, pool="threshold", threshold=0.1, burst=4),
]
CAUSAL = [*REMEMBERS, usmoe.USMoE(pool="threshold", threshold=0.15), usmoe.OwnChoice(), usmoe.OwnChoice(k=2)]
WAYS = {
    "greedy": dict(do_sample=False),
    "sampling": dict(do_sample=True, temperature=2.0),
    "static cache": dict(do_sample=False, cache_implementation="static"),
    "no cache": dict(do_sample=False, use_cache=False),
}


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts, padded on the left: of 7, 4 and 1 tokens."""
    x = tokens(3, 7)
    mask = torch.ones_like(x)
    mask[1, :3] = 0
    mask[2, :6] = 0
    return x.where(mask.bool(), 0), mask


@torch.no_grad()
def generated(model, x, mask, **way):
    torch.manual_seed(5)
    way = dict(max_new_tokens=6, min_new_tokens=6, output_logits=True, return_dict_in_generate=True) | way
    return model.generate(x, attention_mask=mask, **way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("router", CAUSAL, ids=str)
def test_generation_equals_one_forward_over_what_it_wrote(router, way):
    model = usmoe.patch(tiny(initializer_range=0.4).double(), router)
    x, mask = prompts()
    out = generated(model, x, mask, **WAYS[way])
    for row in range(3):
        start = int(7 - mask[row].sum())
        whole = model(out.sequences[row : row + 1, start:]).logits[0]
        for step, logits in enumerate(out.logits):
            torch.testing.assert_close(logits[row], whole[6 - start + step].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.portable
@pytest.mark.parametrize("router", CAUSAL, ids=str)
def test_a_text_does_not_depend_on_its_batch_mates(router):
    model = usmoe.patch(tiny(initializer_range=0.4).double(), router)
    x, mask = prompts()
    together = generated(model, x, mask, do_sample=False).sequences
    for row in range(3):
        start = int(7 - mask[row].sum())
        alone = generated(model, x[row : row + 1, start:], mask[row : row + 1, start:], do_sample=False).sequences
        assert torch.equal(together[row, start:], alone[0])


@pytest.mark.portable
@pytest.mark.parametrize("router", REMEMBERS, ids=str)
def test_beam_search_reorders_what_the_router_remembers(router):
    """With and without a cache the same beams: without one nothing is remembered, nor has to be reordered."""
    model = usmoe.patch(tiny(initializer_range=0.4).double(), router)
    x, mask = prompts()
    beams = dict(do_sample=False, num_beams=4, num_return_sequences=2, output_logits=False, output_scores=True)
    cached, plain = (generated(model, x, mask, use_cache=use, **beams) for use in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(cached.sequences_scores, plain.sequences_scores, rtol=1e-6, atol=1e-6)
    moved = cached.beam_indices[:, 1:6]  # the test would see nothing if every beam went on from itself
    assert (moved[moved >= 0].view(-1) != cached.beam_indices[:, :5][moved >= 0].view(-1)).any()


ASSISTED = {
    "prompt lookup": lambda: dict(prompt_lookup_num_tokens=3),
    "an assistant": lambda: dict(assistant_model=tiny(seed=1).double()),
    "its own first layers": lambda: dict(assistant_early_exit=1),
    "a configuration": lambda: dict(generation_config=GenerationConfig(prompt_lookup_num_tokens=3, eos_token_id=1)),
}
"""Ways to have tokens guessed, which are dropped again where the guess was wrong."""


@pytest.mark.parametrize("way", ASSISTED)
def test_assisted_decoding_is_refused_at_the_start_where_what_was_spent_cannot_be_taken_back(way):
    x = tokens(1, 4).repeat(1, 4)
    length = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    for router in REMEMBERS:
        model = usmoe.patch(tiny(initializer_range=0.4).double(), router)
        ran = model.register_forward_hook(lambda *_: pytest.fail("a token was run"))
        with pytest.raises(ValueError, match=r"remembers the tokens before.*assisted decoding"):
            model.generate(x, **length, **ASSISTED[way]())
        ran.remove()
    for router in (usmoe.USMoE(pool="threshold", threshold=0.15), usmoe.TokenChoice(k=2), usmoe.OwnChoice(k=2)):
        usmoe.patch(model, router)
        given = ASSISTED[way]()
        if "assistant_model" in given:
            given["assistant_model"].set_experts_implementation("eager")  # in float64 the default has no kernel
        if "generation_config" in given:
            given["generation_config"].update(**length)
        said = model.generate(x, **(length if "generation_config" not in given else {}), **given)
        assert torch.equal(said, model.generate(x, **length))


def test_assisted_decoding_is_refused_where_the_model_asks_for_it_by_itself_or_is_the_assistant():
    x = tokens(1, 4).repeat(1, 4)
    model = usmoe.patch(tiny(initializer_range=0.4).double(), REMEMBERS[0])
    other = usmoe.patch(tiny(initializer_range=0.4, seed=1).double(), usmoe.OwnChoice())
    with pytest.raises(ValueError, match=r"remembers the tokens before.*does not work with this model"):
        other.generate(x, assistant_model=model, max_new_tokens=8, do_sample=False)
    model.generation_config.prompt_lookup_num_tokens = 3
    with pytest.raises(ValueError, match=r"remembers the tokens before.*assisted decoding"):
        model.generate(x, max_new_tokens=8, do_sample=False)


@torch.no_grad()
@pytest.mark.parametrize("router", REMEMBERS, ids=str)
def test_a_copied_cache_goes_on_by_itself(router):
    """One prompt, read once, answered twice: the way to reuse a system prompt."""
    model = usmoe.patch(tiny(initializer_range=0.4).double(), router)
    prompt, first, second = tokens(1, 6, 1), tokens(1, 5, 2), tokens(1, 5, 3)
    cache = model(prompt, use_cache=True).past_key_values
    for rest in (first, second):
        ours = model(rest, past_key_values=copy.deepcopy(cache)).logits
        whole = model(torch.cat([prompt, rest], 1)).logits[:, 6:]
        torch.testing.assert_close(ours, whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("router", REMEMBERS, ids=str)
def test_sequences_are_repeated_selected_and_forgotten_with_the_cache(router):
    model = usmoe.patch(tiny(initializer_range=0.4).double(), router)
    prompt, rest = tokens(3, 6, 1), tokens(6, 3, 2)
    cache = DynamicCache(config=model.config)
    model(prompt, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    index = torch.tensor([5, 0, 2])
    cache.batch_select_indices(index)
    ours = model(rest[index], past_key_values=cache).logits
    whole = model(torch.cat([prompt.repeat_interleave(2, 0), rest], 1)[index]).logits[:, 6:]
    torch.testing.assert_close(ours, whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("router", REMEMBERS, ids=str)
def test_the_inner_model_hands_on_what_its_routers_remember_too(router):
    model = usmoe.patch(tiny(initializer_range=0.4).double(), router)
    x = tokens(2, 9)
    whole = model.model(x).last_hidden_state
    out = model.model(x[:, :4], use_cache=True)
    rest = model.model(x[:, 4:], past_key_values=out.past_key_values).last_hidden_state
    torch.testing.assert_close(rest, whole[:, 4:], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("router", REMEMBERS, ids=str)
def test_a_cache_that_another_route_filled_is_refused(router):
    model = tiny()
    x = tokens(2, 8)
    cache = model(x, use_cache=True).past_key_values
    usmoe.patch(model, router)
    with pytest.raises(ValueError, match=r"this cache holds 8 tokens that it has not seen"):
        model(x[:, -1:], past_key_values=cache)
    cache = model(x, use_cache=True).past_key_values
    usmoe.patch(model, usmoe.USMoE(k=1, pool="prefix"))
    with pytest.raises(ValueError, match="has not seen"):
        model(x[:, -1:], past_key_values=cache)


def test_a_router_that_looks_ahead_warns_once_when_it_generates():
    model = usmoe.patch(tiny(), usmoe.USMoE(k=1.5))
    with pytest.warns(UserWarning, match=r"usmoe\(k=1.5\) looks at tokens.*usmoe.calibrate") as told:
        model.generate(tokens(), max_new_tokens=2, do_sample=False)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(tokens(), max_new_tokens=2, do_sample=False)
        usmoe.patch(model, usmoe.USMoE(pool="threshold", threshold=0.1)).generate(tokens(), max_new_tokens=2)


@pytest.mark.parametrize("router", [usmoe.USMoE(k=1.5, pool="prefix", burst=4), usmoe.USMoE(k=1.5)], ids=str)
def test_outputs_depend_on_later_tokens_exactly_where_the_router_looks_ahead(router):
    model = usmoe.patch(tiny(initializer_range=0.5).double(), router)
    x = tokens(2, 12)
    difference = (model(x).logits[:, :7] - model(x[:, :7]).logits).abs().max().item()
    assert (difference < 1e-12) is router.promises.causal


@pytest.mark.parametrize("router", [*REMEMBERS, usmoe.USMoE(k=1.5), usmoe.BoundedChoice(k=2)], ids=str)
def test_examples_that_are_packed_into_a_sequence_are_routed_apart(router):
    """As transformers does, by positions that begin anew, where there is neither a mask nor a cache."""
    model = usmoe.patch(tiny(initializer_range=0.4).double(), router)
    first, second = tokens(1, 6, 1), tokens(1, 5, 2)
    places = torch.cat([torch.arange(6), torch.arange(5)])[None]
    packed = model(torch.cat([first, second], 1), position_ids=places, use_cache=False).logits
    torch.testing.assert_close(packed[:, :6], model(first).logits, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(packed[:, 6:], model(second).logits, rtol=1e-6, atol=1e-9)


def test_a_second_thread_is_refused_while_a_forward_is_running():
    """Two forwards would read each other's padding; a copy a thread is the way."""
    import threading

    model = usmoe.patch(tiny(), usmoe.USMoE(k=1.5))
    x, said = tokens(), []
    before = model(x).logits

    def other():
        for part, given in ((model, x), (model.model.layers[0].mlp, torch.randn(2, 12, 32))):
            try:
                part(given)
            except RuntimeError as error:
                said.append(str(error))

    def meanwhile(module, args):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    handle = model.model.layers[1].register_forward_pre_hook(meanwhile)
    assert torch.equal(model(x).logits, before)
    handle.remove()
    assert len(said) == 2
    assert all("in another thread" in one for one in said)
    assert torch.equal(model(x).logits, before)
