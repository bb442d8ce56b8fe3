"""Every way of running a model x families x routers: each example comes out as it does alone, in one forward.

A new way is one line in ENGINES, a family one name in FAMILIES, a router one line in ROUTERS.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

import families
import usmoe
from usmoe.hf.patch import patch_of

pytestmark = pytest.mark.usefixtures("quiet_transformers")

FAMILIES = ["olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3", "glm4_moe", "phimoe", "granitemoe"]
FAMILIES += ["ernie4_5_moe", "minimax_m2", "afmoe", "qwen3_next", "lfm2_moe", "qwen3_vl_moe"]
ROUTERS = {
    "own": usmoe.OwnChoice(),  # the first: what it cannot, none can
    "fewer": usmoe.TokenChoice(k=1),
    "sequence": usmoe.USMoE(k=1.5),
    "experts choose": usmoe.ExpertChoice(k=1.5, score="softmax_experts"),
    "threshold": usmoe.USMoE(pool="threshold", threshold=0.2),
    "prefix": usmoe.USMoE(k=1.5, pool="prefix"),
    "burst": usmoe.USMoE(k=1, pool="threshold", threshold=0.1, burst=2),
}
REMEMBER = ("prefix", "burst")

Said = tuple[Tensor, Tensor]
"""The tokens (L,) of an example, and what the engine said of the last n of its positions: logits (n, V), or of its last
n tokens, which it chose: (n,)."""


def examples() -> list[Tensor]:
    random = torch.Generator().manual_seed(3)
    return [torch.randint(2, 96, (length,), generator=random) for length in (5, 8, 2)]


def in_rows(given: Sequence[Tensor], left: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask and positions, (B, L), padded to the longest."""
    side = "left" if left else "right"
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side=side)
    mask = pad([torch.ones_like(one) for one in given])
    return pad(given), mask, (mask.cumsum(1) - 1).clamp(min=0)


def of_rows(given: Sequence[Tensor], logits: Tensor, mask: Tensor) -> list[Said]:
    return [(one, row[real]) for one, row, real in zip(given, logits, mask.bool(), strict=True)]


def in_one_row(given: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and positions, (1, L), and who may look at whom, (1, 1, L, L)."""
    places = torch.cat([torch.arange(len(one)) for one in given])
    number = torch.cat([torch.full_like(one, index) for index, one in enumerate(given)])
    looks = (number[:, None] == number) & torch.ones(len(number), len(number), dtype=torch.bool).tril()
    return torch.cat(list(given))[None], places[None], looks[None, None]


def of_one_row(given: Sequence[Tensor], logits: Tensor) -> list[Said]:
    return list(zip(given, logits[0].split([len(one) for one in given]), strict=True))


def padded(model: PreTrainedModel, given: Sequence[Tensor], *, left: bool) -> list[Said]:
    ids, mask, places = in_rows(given, left)
    return of_rows(given, model(ids, attention_mask=mask, position_ids=places).logits, mask)


def by_forward(model: PreTrainedModel, given: Sequence[Tensor]) -> list[Said]:
    """As sentence-transformers and peft call a model; another batch of the same shape came before."""
    ids, mask, _ = in_rows(given, left=False)
    model(ids.flip(0), attention_mask=mask.flip(0))
    return of_rows(given, model.forward(ids, attention_mask=mask).logits, mask)


def filled_rows(model: PreTrainedModel, given: Sequence[Tensor]) -> list[Said]:
    """A mask of four dimensions in which padding looks at itself, so that no row of it is empty."""
    ids, mask, places = in_rows(given, left=True)
    length = ids.shape[1]
    looks = torch.ones(length, length, dtype=torch.bool).tril() & mask.bool()[:, None, None]
    looks = looks | torch.eye(length, dtype=torch.bool)
    return of_rows(given, model(ids, attention_mask=looks, position_ids=places).logits, mask)


def packed_by_mask(model: PreTrainedModel, given: Sequence[Tensor], *, added: bool = False) -> list[Said]:
    ids, places, looks = in_one_row(given)
    if added:
        looks = torch.zeros(looks.shape, dtype=model.dtype).masked_fill(~looks, torch.finfo(model.dtype).min)
    return of_one_row(given, model(ids, attention_mask=looks, position_ids=places, use_cache=False).logits)


def packed_by_positions(model: PreTrainedModel, given: Sequence[Tensor]) -> list[Said]:
    ids, places, _ = in_one_row(given)
    return of_one_row(given, model(ids, position_ids=places, use_cache=False).logits)


def in_chunks(model: PreTrainedModel, given: Sequence[Tensor]) -> list[Said]:
    """The prompt in pieces of 3 tokens, with a cache."""
    ids, mask, places = in_rows(given, left=True)
    cache, logits = DynamicCache(config=model.config), []
    for start in range(0, ids.shape[1], 3):
        end = min(start + 3, ids.shape[1])
        now = dict(attention_mask=mask[:, :end], position_ids=places[:, start:end], past_key_values=cache)
        logits.append(model(ids[:, start:end], use_cache=True, **now).logits)
    return of_rows(given, torch.cat(logits, 1), mask)


def generates(model: PreTrainedModel, given: Sequence[Tensor], **way: object) -> list[Said]:
    ids, mask, _ = in_rows(given, left=True)
    way = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, return_dict_in_generate=True) | way
    out = model.generate(ids, attention_mask=mask, output_logits=True, **way)
    logits = torch.stack(out.logits, 1)
    whole = [row[len(row) - 4 - len(one) : -1] for row, one in zip(out.sequences, given, strict=True)]
    return [(one, said.to(model.dtype)) for one, said in zip(whole, logits, strict=True)]


def assisted(model: PreTrainedModel, given: Sequence[Tensor]) -> list[Said]:
    """Tokens that are guessed from the prompt, one example at a time, as transformers has it."""
    prompts = [one.repeat(3) for one in given]  # so that there is something to guess
    way = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, prompt_lookup_num_tokens=2)
    outs = [model.generate(one[None], **way)[0] for one in prompts]
    return [(out, out[-6:]) for out in outs]


def continuous(model: PreTrainedModel, given: Sequence[Tensor]) -> list[Said]:
    """More requests than run at once, and prompts that are longer than what runs at once."""
    before = model.config._attn_implementation
    options = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1)
    sizes = ContinuousBatchingConfig(page_size=32, num_blocks=16, max_batch_tokens=6, max_requests_per_batch=2)
    gc.freeze()  # the engine collects garbage when it stops, and there is much that is none
    try:
        prompts = [one.tolist() for one in given]
        outs = model.generate_batch(prompts, generation_config=options, continuous_batching_config=sizes).values()
    finally:
        gc.unfreeze()
        model.set_attn_implementation(before)
    assert not any(out.error for out in outs)
    chosen = [torch.tensor(out.generated_tokens) for out in outs]
    return [(torch.cat([one, new]), new) for one, new in zip(given, chosen, strict=True)]


ENGINES: dict[str, Callable[[PreTrainedModel, Sequence[Tensor]], list[Said]]] = {
    "padding on the left": functools.partial(padded, left=True),
    "padding on the right": functools.partial(padded, left=False),
    "model.forward": by_forward,
    "rows filled": filled_rows,
    "packed by a mask": packed_by_mask,
    "packed by an added mask": functools.partial(packed_by_mask, added=True),
    "packed by positions": packed_by_positions,
    "chunks": in_chunks,
    "generate": generates,
    "static cache": functools.partial(generates, cache_implementation="static"),
    "without a cache": functools.partial(generates, use_cache=False),
    "chunked prefill": functools.partial(generates, prefill_chunk_size=3),
    "assisted": assisted,
    "generate_batch": continuous,
}
STEPS = ("chunks", "generate", "static cache", "without a cache", "chunked prefill", "assisted", "generate_batch")
"""Where tokens come one after the other: a router that looks ahead says something else there, and warns."""
TAKES_BACK = ("assisted", "generate_batch")
"""What a router that remembers is refused in."""

_MASKS = ("rows filled", "packed by a mask", "packed by an added mask", "packed by positions")
CANNOT: dict[tuple[str, str], str] = {
    **{("gpt_oss", engine): "its attention adds True as 1" for engine in _MASKS if "added" not in engine},
    ("gpt_oss", "packed by positions"): "it heeds no positions in its masks",
    ("afmoe", "packed by positions"): "it heeds no positions in its masks",
    ("deepseek_v3", "generate_batch"): "its values are narrower than its keys, and pages are of one width",
    **{("qwen3_next", engine): "a linear layer goes on through masks" for engine in _MASKS},
    **{("lfm2_moe", engine): "a convolution goes on through masks" for engine in _MASKS},
    **{(family, "generate_batch"): "no pages for its kind of layer" for family in ("qwen3_next", "lfm2_moe")},
    ("qwen3_next", "assisted"): "a linear layer cannot go back",
}
"""What a family cannot do by itself, so that no router can: checked as well."""

TOLERANCE = 1e-5
"""Of the largest logit. Everything is in float64; some families have parts that are not (norms, rotary positions)."""


@functools.cache
def model_of(family: str, router: str) -> PreTrainedModel:
    model = families.build(families.FAMILIES[family]).double()
    return usmoe.patch(model, ROUTERS[router])


@functools.cache
def alone(model: PreTrainedModel, tokens: tuple[int, ...]) -> Tensor:
    """What one forward over an example by itself says: logits (L, V)."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0]


def off(model: PreTrainedModel, said: Said) -> float:
    """How far what was said of an example is from what is said of it alone; 0 for tokens that would have been chosen,
    and infinite for others."""
    tokens, last = said
    if last.ndim == 1:
        return (
            0.0
            if torch.equal(alone(model, tuple(tokens.tolist()))[-len(last) - 1 : -1].argmax(-1), last)
            else torch.inf
        )
    whole = alone(model, tuple(tokens.tolist()))[-len(last) :]
    return ((last - whole).abs().max() / whole.abs().max()).item()


@torch.no_grad()
def furthest(model: PreTrainedModel, engine: str) -> float:
    return max(off(model, one) for one in ENGINES[engine](model, examples()))


def cannot(model: PreTrainedModel, engine: str) -> bool:
    """Whether a model under its own choice is refused by an engine, or says something else in it than alone."""
    try:
        return furthest(model, engine) > 1e-3
    except (ValueError, AssertionError):  # a refusal of transformers', or a request that ended with one
        return True


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_example_comes_out_as_it_does_alone(family, engine):
    if reason := CANNOT.get((family, engine)):
        assert cannot(model_of(family, "own"), engine), f"it can; {reason} is no longer true"
        return
    for name, router in ROUTERS.items():
        model = model_of(family, name)
        if name in REMEMBER and engine in TAKES_BACK:
            with pytest.raises(ValueError, match="remembers the tokens before"):
                furthest(model, engine)
        elif router.promises.causal or engine not in STEPS:
            assert furthest(model, engine) < TOLERANCE, name


HEADS = {
    "base": lambda model, ids, mask: model.base_model(ids, attention_mask=mask).last_hidden_state,
    "base.forward": lambda model, ids, mask: model.base_model.forward(ids, attention_mask=mask).last_hidden_state,
    "classification": lambda model, ids, mask: classifier_of(model)(ids, attention_mask=mask).logits,
    "classification.forward": lambda model, ids, mask: classifier_of(model).forward(ids, attention_mask=mask).logits,
}
"""(B, L, D) or (B, classes) of a batch that is padded on the right."""


@functools.cache
def classifier_of(model: PreTrainedModel) -> PreTrainedModel:
    """A classifier on the same weights, under the same router."""
    torch.manual_seed(0)
    config = type(model.config).from_dict(model.config.to_dict() | dict(num_labels=3))
    made = transformers.AutoModelForSequenceClassification.from_config(config).double().eval()
    made.base_model.load_state_dict(model.base_model.state_dict())
    return usmoe.patch(made, patch_of(model).routers)


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_says_of_an_example_what_it_says_of_it_alone(family, head):
    given = examples()
    ids, mask, _ = in_rows(given, left=False)
    for name in ROUTERS:
        model = model_of(family, name)
        if "classification" in head and type(model.config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            pytest.skip("a family without a classifier")
        together = HEADS[head](model, ids, mask)
        for one, row in zip(given, together, strict=True):
            alone = HEADS[head](model, one[None], torch.ones_like(one)[None])[0]
            row = row[: len(one)] if row.ndim == 2 else row
            assert (row - alone).abs().max() < TOLERANCE * alone.abs().max(), name
