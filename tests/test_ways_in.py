"""`model.forward(...)`, parts that are called by themselves, and what other libraries put in place of a forward.

Padding is known in each, and nothing of a forward that is over is left for the next."""

from __future__ import annotations

import copy
import inspect
import pickle

import accelerate.hooks
import peft
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import usmoe
from tiny import tiny, tokenizer, tokens

ROUTERS = [usmoe.USMoE(k=1.5), usmoe.ExpertChoice(k=2), usmoe.BoundedChoice(k=2), usmoe.USMoE(k=1.5, pool="prefix")]
FAMILIES = ["olmoe", "mixtral", "qwen3_moe", "gpt_oss"]


def padded() -> tuple[Tensor, Tensor]:
    x = tokens()
    mask = torch.ones_like(x)
    mask[0, 7:] = 0
    return x, mask


def counts(model: PreTrainedModel, run) -> list[int]:
    """Pairs of each of the two sequences, in the first layer."""
    with usmoe.record(model) as trace:
        run()
    return trace.last["model.layers.0.mlp"].routing.experts_per_token.view(2, -1).sum(1).tolist()


@torch.no_grad()
@pytest.mark.parametrize("router", ROUTERS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_a_way_in_like_the_call(family, router):
    model = usmoe.patch(tiny(family).double(), router)
    x, mask = padded()
    for part in (model, model.model):
        called = part(x, attention_mask=mask)[0]
        part(x, attention_mask=mask.flip(0))  # a mask of the same shape, which must not stay
        assert torch.equal(part.forward(x, attention_mask=mask)[0], called)
        plain = part(x)[0]
        part(x, attention_mask=mask)
        assert torch.equal(part.forward(x)[0], plain)
        cache = DynamicCache(config=model.config)
        if router.promises.causal:
            pieces = [part.forward(some, past_key_values=cache)[0] for some in x.split([5, 7], 1)]
            torch.testing.assert_close(torch.cat(pieces, 1), plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("router", [*ROUTERS, usmoe.USMoE(pool="threshold", threshold=0.2)], ids=str)
def test_sentence_transformers_own_module_gives_each_text_its_own_vector(router, tmp_path):
    """Its `Transformer` calls model.forward(...)."""
    base = tiny().model
    base.save_pretrained(tmp_path)
    tokenizer(model_input_names=["input_ids", "attention_mask"]).save_pretrained(tmp_path)
    module = Transformer(str(tmp_path))
    encoder = SentenceTransformer(modules=[module, Pooling(32)], device="cpu")
    usmoe.patch(encoder.transformers_model, router)
    texts = ["a storm", "the night was dark and so long", "x", "another one, of thirty letters"]
    alone = torch.cat([encoder.encode([text], convert_to_tensor=True) for text in texts])
    for size in (2, 4):
        together = encoder.encode(texts, batch_size=size, convert_to_tensor=True)
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_peft_calls_forward_too():
    x, mask = padded()
    model = usmoe.patch(tiny(), ROUTERS[0])
    before = counts(model, lambda: model(x, attention_mask=mask))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for way in (adapted, adapted.base_model, adapted.base_model.forward, adapted.get_base_model().forward):
        assert counts(model, lambda way=way: way(input_ids=x, attention_mask=mask)) == before == [11, 18]


@torch.no_grad()
def test_a_part_by_itself_knows_what_it_is_handed_and_nothing_else():
    model = usmoe.patch(tiny(), ROUTERS[0])
    x, mask = padded()
    model(x, attention_mask=mask)
    hidden = torch.randn(2, 12, 32)
    layer, block = model.model.layers[0], model.model.layers[0].mlp
    looks = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril() & mask.bool()[:, None, None]
    turns = model.model.rotary_emb(hidden, torch.arange(12)[None])
    assert counts(model, lambda: block(hidden)) == [18, 18]
    assert counts(model, lambda: layer(hidden, position_embeddings=turns)) == [18, 18]
    assert counts(model, lambda: layer(hidden, attention_mask=looks, position_embeddings=turns)) == [11, 18]
    assert counts(model, lambda: layer.forward(hidden, attention_mask=looks, position_embeddings=turns)) == [11, 18]
    assert counts(model, lambda: block(hidden)) == [18, 18]


def test_nothing_is_left_of_a_forward_that_was_broken_off():
    """Torch runs no hook after a KeyboardInterrupt."""
    model = usmoe.patch(tiny(), ROUTERS[0])
    x, mask = padded()

    def stop(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(x, attention_mask=mask)
    handle.remove()
    assert counts(model, lambda: model.model.layers[0].mlp(torch.randn(2, 12, 32))) == [18, 18]
    assert counts(model, lambda: model.model(x)) == [18, 18]


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_run_again_in_backward_know_the_padding_of_the_last_forward(reentrant):
    x, mask = padded()
    gradients = []
    for again in (False, True):
        model = tiny().train()
        if again:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        usmoe.patch(model, ROUTERS[0])
        model.forward(x, attention_mask=mask, labels=x, use_cache=False).loss.backward()
        gradients.append(model.model.layers[0].mlp.experts.down_proj.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patch_leaves_the_signature_and_unpatching_leaves_nothing(family):
    model = tiny(family)
    signatures = {name: inspect.signature(module.forward) for name, module in model.named_modules()}
    usmoe.patch(model, ROUTERS[0])
    for name, module in model.named_modules():
        assert inspect.signature(module.forward) == signatures[name]
        pickle.loads(pickle.dumps(inspect.signature(module.forward)))
    usmoe.unpatch(model)
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]


@torch.no_grad()
def test_what_another_library_puts_around_a_forward_stays_before_and_after():
    x, mask = padded()
    plain, routed = tiny(), usmoe.patch(tiny(), ROUTERS[0])
    own, ours = (one(x, attention_mask=mask).logits for one in (plain, routed))

    first = accelerate.hooks.add_hook_to_module(tiny(), accelerate.hooks.ModelHook())
    usmoe.patch(first, ROUTERS[0])
    assert torch.equal(first(x, attention_mask=mask).logits, ours)
    usmoe.unpatch(first)
    assert torch.equal(first(x, attention_mask=mask).logits, own)
    assert hasattr(first, "_hf_hook")

    later = accelerate.hooks.add_hook_to_module(usmoe.patch(tiny(), ROUTERS[0]), accelerate.hooks.ModelHook())
    assert torch.equal(later(x, attention_mask=mask).logits, ours)
    twin = copy.deepcopy(later)
    usmoe.unpatch(later)
    assert torch.equal(later(x, attention_mask=mask).logits, own)
    accelerate.hooks.remove_hook_from_module(later)
    assert torch.equal(later(x, attention_mask=mask).logits, own)
    assert torch.equal(twin(x, attention_mask=mask).logits, ours)
