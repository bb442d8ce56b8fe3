"""transformers' continuous batching under a patch: each request gets the text that generate() gives it alone."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager

import usmoe
from tiny import tiny, tokens

pytestmark = pytest.mark.usefixtures("quiet_transformers")

ALONE = [
    usmoe.TokenChoice(k=2),
    usmoe.OwnChoice(k=2),
    usmoe.USMoE(pool="threshold", threshold=0.15),
    usmoe.ExpertChoice(pool="threshold", threshold=(0.5,) * 8),
]
REMEMBER = [usmoe.USMoE(k=2, pool="prefix"), usmoe.USMoE(k=2, pool="threshold", threshold=0.1, burst=4)]
NEW = 5


@pytest.fixture(autouse=True)
def little_garbage():
    """The engine collects garbage twice when it stops, and there is much that is none."""
    gc.freeze()
    yield
    gc.unfreeze()


def model_of(router: Any, family: str = "olmoe") -> PreTrainedModel:
    return usmoe.patch(tiny(family, initializer_range=0.4).double(), router)


def prompts(*lengths: int) -> list[list[int]]:
    return [tokens(1, length, seed=length)[0].tolist() for length in lengths]


def options(**changes: Any) -> GenerationConfig:
    return GenerationConfig(**(dict(max_new_tokens=NEW, do_sample=False, eos_token_id=-1) | changes))


def sizes(**changes: Any) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(
        **(dict(page_size=32, num_blocks=16, max_batch_tokens=8, max_requests_per_batch=3) | changes)
    )


def together(model: PreTrainedModel, given: list[list[int]], how: GenerationConfig | None = None, **changes: Any):
    outs = model.generate_batch(given, generation_config=how or options(), continuous_batching_config=sizes(**changes))
    assert not [out.error for out in outs.values() if out.error]
    return [out.generated_tokens for out in outs.values()]


def kept(model: PreTrainedModel, given: list[list[int]]) -> None:
    """Leave an engine with the model that has run the prompts."""
    how = dict(generation_config=options(), continuous_batching_config=sizes(), persistent_manager=True)
    assert not [out.error for out in model.generate_batch(given, **how).values() if out.error]


def alone(model: PreTrainedModel, given: list[list[int]]) -> list[list[int]]:
    way = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    return [model.generate(torch.tensor([one]), **way)[0, len(one) :].tolist() for one in given]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe"])
def test_more_requests_than_run_at_once_and_prompts_in_pieces(family, attention):
    """Prompts of up to 14 tokens, of which 8 run at once."""
    given = prompts(3, 9, 1, 14, 6)
    for router in ALONE:
        model = model_of(router, family)
        model.set_attn_implementation(attention)
        assert together(model, given) == alone(model, given), router


def test_no_token_is_left_without_experts():
    """Before, most were read as padding: the mask is (1, 1, tokens, keys of all requests)."""
    model = model_of(usmoe.TokenChoice(k=2))
    with usmoe.record(model) as trace:
        together(model, prompts(3, 9, 6))
    for routing in trace.routings["model.layers.0.mlp"]:
        assert routing.experts_per_token.tolist() == [2] * routing.num_tokens


@pytest.mark.parametrize(
    "router", [usmoe.USMoE(k=1.5), usmoe.USMoE(k=1.5, pool="batch"), usmoe.BoundedChoice(k=2)], ids=str
)
def test_requests_do_not_compete_and_looking_ahead_is_said_once(router):
    model, given = model_of(router), prompts(3, 9, 6)
    with pytest.warns(UserWarning, match="looks at tokens that are not generated yet") as told:
        said = together(model, given, max_batch_tokens=64)
    assert len(told) == 1
    assert said == alone(model, given)  # and says nothing more


@pytest.mark.parametrize("router", REMEMBER, ids=str)
def test_a_router_that_remembers_is_refused_before_anything_runs(router):
    model = model_of(router)
    ran = []
    model.register_forward_hook(lambda *_: ran.append(1))
    ways = (
        lambda: model.generate_batch(prompts(3), generation_config=options()),
        lambda: model.init_continuous_batching(options()),
        lambda: model.generate(tokens(1, 3), generation_config=options(), cache_implementation="paged"),
        lambda: model.continuous_batching_context_manager(options()).__enter__(),
    )
    for way in ways:
        with pytest.raises(ValueError, match=r"remembers the tokens before.*continuous batching.*threshold"):
            way()
    assert not ran


def test_an_engine_that_was_made_by_itself_says_it_for_each_request():
    model = model_of(REMEMBER[0])
    engine = ContinuousBatchingManager(model, options(), sizes())
    engine.start()
    name = engine.add_request(prompts(3)[0], max_new_tokens=NEW)
    said = engine.get_result(name, timeout=30)
    engine.stop(block=True)
    assert said is not None
    assert "remembers the tokens before" in str(said.error)
    assert not said.generated_tokens


def test_a_router_of_the_users_own_that_keeps_a_state_is_refused_too():
    class Counts:
        promises = usmoe.Promises(
            causal=True, batch_independent=True, padding_independent=True, streamable=True, budget="none"
        )

        def __call__(self, logits, valid=None, state=None, **_):
            return usmoe.Routing.from_dense(logits.softmax(-1), logits > 0, state=torch.zeros(len(logits)))

    outs = model_of(Counts()).generate_batch(
        prompts(3), generation_config=options(), continuous_batching_config=sizes()
    )
    assert ["remembers the tokens before" in str(out.error) for out in outs.values()] == [True]


def test_what_requests_share_is_run_once():
    """Whole pages of a prompt that another request has had are not run again."""
    start = tokens(1, 33, seed=9)[0].tolist()
    given = [start + one for one in prompts(3, 5, 7)]
    model = model_of(ALONE[2])
    with usmoe.record(model) as trace:
        said = together(model, given, max_batch_tokens=48, max_requests_per_batch=1)
        ran = [routing.num_tokens for routing in trace.routings["model.layers.0.mlp"]]
    assert sum(ran) < sum(map(len, given))
    assert said == alone(model, given)


def test_answers_that_branch_off_from_one_prompt():
    model, given = model_of(ALONE[0]), prompts(7, 4)
    said = together(model, given, options(num_return_sequences=2, do_sample=True, top_k=1))
    assert said == [one for one in alone(model, given) for _ in range(2)]


def test_requests_that_are_put_off_and_run_again():
    """Five pages of 32 tokens for three requests that grow to 50 each."""
    model, given = model_of(ALONE[2]), prompts(30, 29, 28)
    with usmoe.record(model) as trace:
        said = together(model, given, options(max_new_tokens=20), num_blocks=5, max_batch_tokens=32)
    ran = sum(routing.num_tokens for routing in trace.routings["model.layers.0.mlp"])
    assert ran > sum(map(len, given)) + 3 * 19  # some ran twice
    way = dict(max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert said == [model.generate(torch.tensor([one]), **way)[0, len(one) :].tolist() for one in given]


def test_steps_that_are_padded_to_one_size():
    """As an engine pads its rows that compiles: what comes after the last request is no token."""
    model, given = model_of(usmoe.USMoE(k=1.5)), prompts(3, 6)
    with pytest.warns(UserWarning, match="looks at tokens"):
        engine = model.init_continuous_batching(options(), sizes(max_batch_tokens=16, q_padding_interval_size=16))
    engine.warmup()
    engine.batch_processor.model_runner.pad_inputs = True
    with usmoe.record(model) as trace:
        engine.start()
        names = engine.add_requests(given, max_new_tokens=NEW)
        outs = [engine.get_result(name, timeout=30) for name in names]
        engine.stop(block=True)
    assert [out.generated_tokens for out in outs] == alone(model, given)
    last = trace.routings["model.layers.0.mlp"][-1]
    assert (last.num_tokens, int(last.valid.sum())) == (16, 2)
    assert last.experts_per_token.tolist()[2:] == [0] * 14


def test_an_engine_that_is_kept_does_not_outlive_the_route():
    given = prompts(33)
    model = tiny(initializer_range=0.4).double()
    model.set_experts_implementation("eager")  # in float64 the default has no kernel
    kept(model, given)
    usmoe.patch(model, ALONE[0])
    assert together(model, given) == alone(model, given)
    kept(model, given)
    usmoe.unpatch(model)
    assert together(model, given) == alone(model, given)


def test_graphs_that_replay_the_route_of_another_batch_are_refused():
    model = model_of(ALONE[0])
    with pytest.raises(ValueError, match="use_cuda_graph=True"):
        together(model, prompts(3), use_cuda_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.init_continuous_batching(options()).continuous_batching_config.use_cuda_graph == (False, False)
