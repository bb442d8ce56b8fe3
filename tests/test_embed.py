"""An embedding is what a plain forward says, depends on its text alone, and is cut and standardised as it is said."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import usmoe
from every_router import ALL_ROUTERS, Hosted, fit
from families import FAMILIES, SIZES, build
from tiny import FAMILIES as TINY
from tiny import tiny, tokenizer
from usmoe import ExpertChoice, OwnChoice, USMoE
from usmoe.embed.prompts import PROMPTS, template_of
from usmoe.embed.standardize import Statistics
from usmoe.hf.patch import patch_of
from usmoe.types import promises_of

TEXTS = ["the cat sat on the mat", "a", "is 2 + 2 = 4 ?", "no", "routers choose pairs of tokens and experts"]


def encoder(router=None, family="olmoe", **settings) -> usmoe.Encoder:
    return usmoe.Encoder(tiny(family), tokenizer(), router, **settings)


def close(one, other, tolerance=2e-5):
    np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(1.0, float(np.abs(other).max())))


# --- reference: a plain forward of one text -------------------------------------------------------------------------


@torch.no_grad()
def plainly(model, text: str, pooling: str) -> tuple[np.ndarray, np.ndarray]:
    """Hidden state and router logits of one text by transformers alone."""
    ids = torch.tensor([tokenizer()(text)["input_ids"]])
    said = model(ids, output_hidden_states=True, output_router_logits=True)
    weights = {
        "last": torch.eye(ids.shape[1])[-1],
        "mean": torch.ones(ids.shape[1]) / ids.shape[1],
        "weighted_mean": torch.arange(1, ids.shape[1] + 1) / torch.arange(1, ids.shape[1] + 1).sum(),
    }[pooling]
    hidden = weights @ said.hidden_states[-1][0]
    router = torch.cat([weights @ logits.view(ids.shape[1], -1) for logits in said.router_logits])
    return hidden.numpy(), router.numpy()


@pytest.mark.parametrize("pooling", ["last", "mean", "weighted_mean"])
@pytest.mark.parametrize("family", [name for name in TINY if name != "gpt_oss"])
def test_features_are_those_of_a_plain_forward(family, pooling):
    model = tiny(family)
    enc = usmoe.Encoder(model, tokenizer(), embedding="moee", pooling=pooling)
    expected = [np.concatenate(plainly(model, text, pooling)) for text in TEXTS]
    close(enc.encode(TEXTS), expected)
    close(enc.variant(embedding="hidden").encode(TEXTS), [row[:32] for row in expected])
    close(enc.variant(embedding="router").encode(TEXTS), [row[32:] for row in expected])


def test_vectors_are_of_float32_whatever_the_models_are():
    model = tiny(next(iter(TINY)))
    enc = usmoe.Encoder(model, tokenizer(), embedding="moee", pooling="mean")
    expected = enc.encode(TEXTS)
    model.double()
    assert enc.encode(TEXTS).dtype == np.float32
    close(enc.encode(TEXTS), expected)


def test_probabilities_are_the_softmax_of_each_layer():
    logits = encoder(embedding="router").encode(TEXTS).reshape(len(TEXTS), 2, 8)
    said = encoder(embedding="router", router_features="probabilities").encode(TEXTS)
    close(said.reshape(len(TEXTS), 2, 8), torch.tensor(logits).softmax(-1).numpy())


def test_layers_are_chosen_by_index_or_name_in_the_order_given():
    every = encoder(embedding="router").encode(TEXTS)
    for layers in ([1, 0], [-1, -2], ["model.layers.1.mlp", "model.layers.0.mlp"]):
        close(encoder(embedding="router", layers=layers).encode(TEXTS), np.roll(every, 8, axis=1))
    close(encoder(embedding="router", layers=[1]).encode(TEXTS), every[:, 8:])
    for wrong in ([2], ["model.layers.7.mlp"], [], [0, 0], [0, -2], [True]):
        with pytest.raises(ValueError, match=r"MoE layer|layer once"):
            encoder(embedding="router", layers=wrong)


def test_moee_is_the_formula():
    hidden, router = (encoder(embedding=name).encode(TEXTS) for name in ("hidden", "router"))
    close(encoder(embedding="moee").encode(TEXTS), np.concatenate([hidden, router], axis=1))

    def cosines(x):
        return (x @ x.T) / np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(x, axis=1))

    for w in (0.0, 0.5, 1.0, 3.0):
        both = encoder(embedding="moee", moee="sum", w=w)
        vectors = both.encode(TEXTS)
        close(both.similarity(vectors, vectors), cosines(hidden) + w * cosines(router))
        close(both.similarity_pairwise(vectors, vectors[::-1]), np.diag((cosines(hidden) + w * cosines(router))[::-1]))


# --- an embedding depends on its text alone -------------------------------------------------------------------------

EVERY = [router for router in ALL_ROUTERS if not isinstance(router, Hosted)]
MODEL = tiny()
some_texts = st.lists(st.text(st.characters(min_codepoint=33, max_codepoint=125), max_size=24), max_size=6).map(
    lambda texts: ["".join(dict.fromkeys(text)) for text in texts] or ["a"]
)
"""No character twice in a text: of two equal tokens side by side, rounding would say which one an expert prefers."""


def fitted(router):
    return fit(router, 8)


@pytest.mark.parametrize("router", [None, *EVERY], ids=str)
def test_a_text_alone_has_the_vector_that_it_has_among_others(router):
    chosen = None if router is None else fitted(router)
    enc = usmoe.Encoder(MODEL, tokenizer(), chosen, embedding="moee")
    promised = chosen is None or (promises_of(chosen).batch_independent and promises_of(chosen).padding_independent)
    assert enc.text_alone == promised
    if not promised:
        return
    alone = np.stack([enc.encode(text) for text in TEXTS])
    close(enc.encode(TEXTS), alone)
    close(enc.encode(TEXTS[::-1], batch_size=2)[::-1], alone)
    close(enc.encode([*TEXTS, "x" * 60])[:-1], alone)  # padded much further


@pytest.mark.parametrize("router", [None, USMoE(alpha=0.5), ExpertChoice(), USMoE(k=1.5, pool="prefix")], ids=str)
@given(texts=some_texts, batch_size=st.integers(1, 5), data=st.data())
@settings(max_examples=15, deadline=None, derandomize=True)
def test_batch_size_and_order_change_nothing(router, texts, batch_size, data):
    enc = usmoe.Encoder(MODEL, tokenizer(), router, embedding="moee")
    order = data.draw(st.permutations(range(len(texts))))
    alone = np.stack([enc.encode(text) for text in texts])
    close(enc.encode([texts[i] for i in order], batch_size=batch_size), alone[order])


@pytest.mark.parametrize(
    "router", [USMoE(alpha=0.5, pool="batch"), USMoE(alpha=0.5, pool="time_step"), USMoE(mask_padding=False)], ids=str
)
def test_the_routers_that_cannot_promise_it_say_so_and_do_move(router):
    enc = encoder(router)
    assert not enc.text_alone
    alone = np.stack([enc.encode(text) for text in TEXTS])
    assert np.abs(enc.encode(TEXTS) - alone).max() > 1e-3


def test_a_router_of_ones_own_promises_nothing():
    assert not encoder(lambda logits, valid, **_: usmoe.route(logits, usmoe.TokenChoice(k=2), valid)).text_alone


READING = [name for name in FAMILIES if name not in ("diffusion_gemma", "dots3_note vision", "qwen3_omni_moe talker")]
"""The families that read token ids and have a hidden state for each of them."""


class Characters:
    """A tokenizer by hand: any callable with input_ids will do."""

    pad_token_id, eos_token_id, is_fast = 0, 1, False

    def __call__(self, texts, **_):
        rows = [
            [2 + (7 * place + ord(c)) % (SIZES["vocab_size"] - 2) for place, c in enumerate(text)]
            for text in ([texts] if isinstance(texts, str) else texts)
        ]
        return {"input_ids": rows[0] if isinstance(texts, str) else rows}


@pytest.mark.slow
@pytest.mark.usefixtures("quiet_transformers")
@pytest.mark.parametrize("family", READING)
def test_every_family(family):
    model = build(FAMILIES[family])
    texts = ["one", "three", "seventy"]  # at most 8 tokens: sparse attention chooses among more, and ties there
    plain = usmoe.Encoder(model, Characters()).encode(texts)
    for router in (None, USMoE(k=2, alpha=0.5)):
        enc = usmoe.Encoder(model, Characters(), router, embedding="moee")
        both = enc.encode(texts)
        assert np.isfinite(both).all()
        assert both.shape[1] > plain.shape[1]
        if router is None:
            close(both[:, : plain.shape[1]], plain, 1e-4)
        close(both, np.stack([enc.encode(text) for text in texts]), 1e-4)
    assert patch_of(model) is None


@pytest.mark.usefixtures("quiet_transformers")
@pytest.mark.parametrize("family", ["diffusion_gemma", "dots3_note vision"])
def test_a_model_that_reads_no_text_is_refused(family):
    with pytest.raises(ValueError, match=r"reads no token ids|answers token by token"):
        usmoe.Encoder(build(FAMILIES[family]), Characters()).encode(TEXTS)


# --- the model is left as it was ------------------------------------------------------------------------------------


def test_a_model_of_ones_own_is_patched_only_while_it_encodes():
    model = tiny()
    enc = usmoe.Encoder(model, tokenizer(), USMoE(alpha=0.5), embedding="moee")
    enc.encode(TEXTS)
    assert patch_of(model) is None
    with pytest.raises(TypeError, match="Text 1 is of type int"):
        enc.encode(["a", 3])
    assert patch_of(model) is None
    router = USMoE(k=1, alpha=0.5)
    usmoe.patch(model, router)
    seen = usmoe.Encoder(model, tokenizer()).encode(TEXTS)
    close(seen, usmoe.Encoder(tiny(), tokenizer(), router).encode(TEXTS))
    usmoe.Encoder(model, tokenizer(), OwnChoice()).encode(TEXTS)
    assert {str(one) for one in patch_of(model).routers} == {str(router)}


def test_the_router_changes_the_vectors():
    own, expert = encoder().encode(TEXTS), encoder(ExpertChoice()).encode(TEXTS)
    assert np.abs(own - expert).max() > 1e-2
    close(encoder(OwnChoice()).encode(TEXTS), own)


def test_threads_take_turns_on_a_model():
    model = tiny()
    encoders = [usmoe.Encoder(model, tokenizer(), router) for router in (USMoE(alpha=0.5), ExpertChoice(), None)]
    expected = [enc.encode(TEXTS) for enc in encoders]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            found = list(pool.map(lambda enc: enc.encode(TEXTS, batch_size=2), encoders * 2))
            for one, other in zip(found, expected * 2, strict=True):
                close(one, other)
    assert patch_of(model) is None


def test_a_model_in_training_mode_encodes_in_evaluation_mode_and_goes_on_training():
    model = tiny(attention_dropout=0.5)
    expected = usmoe.Encoder(model, tokenizer(), USMoE()).encode(TEXTS)
    model.train()
    model.lm_head.eval()
    close(usmoe.Encoder(model, tokenizer(), USMoE()).encode(TEXTS), expected)
    assert model.training
    assert not model.lm_head.training


# --- variants -------------------------------------------------------------------------------------------------------


def test_a_variant_keeps_statistics_where_features_stay_and_never_loses_them_without_a_word():
    enc = encoder(USMoE(), embedding="moee", standardize=SAMPLE)
    assert enc.variant(moee="sum", w=2.0).statistics is enc.statistics
    assert enc.variant(embedding="moee").statistics is enc.statistics
    for changes in ({"embedding": "router"}, {"prompt": "prompteol"}, {"max_length": 60}, {"pooling": "mean"}):
        with pytest.raises(ValueError, match="are of other features than this variant has"):
            enc.variant(**changes)
        assert enc.variant(**changes, standardize=None).statistics is None
    fresh = enc.variant(embedding="router", standardize=SAMPLE)
    close(fresh.encode(TEXTS), encoder(USMoE(), embedding="router", standardize=SAMPLE).encode(TEXTS))
    assert enc.variant(standardize=None).statistics is None
    with pytest.raises(ValueError, match=r"router cannot be changed\. Choose from embedding, prompt"):
        enc.variant(router=None)


# --- prompts and truncation -----------------------------------------------------------------------------------------


class Watched:
    """Remembers what its model was given."""

    def __init__(self, model):
        self.seen: list[list[int]] = []
        model.base_model.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, module, args, kwargs):
        for row, mask in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True):
            self.seen.append(row[mask.bool()].tolist())


def read(prompt: str, text: str, **given) -> str:
    model = tiny()
    watched = Watched(model)
    usmoe.Encoder(model, tokenizer(), prompt=prompt, **given.pop("settings", {})).encode(text, **given)
    return "".join(tokenizer().convert_ids_to_tokens(watched.seen[-1]))


def test_prompts_stand_around_the_text():
    assert len(PROMPTS) == 11
    assert read("none", "abc") == "abc"
    assert read("quoted", "abc") == '"abc"'
    assert read("prompteol", "abc") == 'This sentence : "abc" means in one word:"'
    assert read("<{text}>", "abc") == "<abc>"
    assert read("<{text}>", "{text}") == "<{text}>"
    for name, template in PROMPTS.items():
        assert template_of(name) == tuple(template.split("{text}"))
    for wrong in ("promptoel", "no place", "{text}{text}", ""):
        with pytest.raises(ValueError, match=r"is no name, and does not hold \{text\} once"):
            encoder(prompt=wrong)


def test_an_instruction_stands_inside_of_the_prompt():
    assert read("({text})", "abc", instruction="Go") == "(<|user|>?Go?<|embed|>?abc)"  # ? for a new line


@pytest.mark.parametrize("length", [63, 64, 65, 500])
def test_a_long_text_is_cut_and_the_prompt_stays_whole(length):
    text = "".join(chr(97 + i % 26) for i in range(length))
    assert read("none", text) == text[:64]  # the tiny model reads 64 tokens
    before, after = 'This sentence : "', '" means in one word:"'
    assert read("prompteol", text) == before + text[: 64 - len(before) - len(after)] + after
    assert read("none", text, settings={"max_length": 7}) == text[:7]


def test_the_cut_keeps_special_tokens_and_works_without_offsets():
    from tokenizers.processors import TemplateProcessing

    made = tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing("<eos> $A <eos>", special_tokens=[("<eos>", 1)])
    ids = usmoe.Encoder(tiny(), made, prompt="({text})", max_length=8).read(["abcdefgh"])[0]
    assert made.convert_ids_to_tokens(ids) == ["<eos>", "(", *"abcd", ")", "<eos>"]

    class Slow:
        is_fast, pad_token_id, bos_token_id = False, 0, 1

        def __call__(self, texts, **given):
            given.pop("return_offsets_mapping", None)
            return tokenizer()(texts, **given)

    assert len(usmoe.Encoder(tiny(), Slow(), prompt="({text})", max_length=8).read(["abcdefghij"])[0]) == 8


def test_a_prompt_that_leaves_no_room_and_an_impossible_length_are_refused():
    with pytest.raises(ValueError, match="leave no room for a text in 20 tokens"):
        encoder(prompt="prompteol", max_length=20).encode("abc")
    for wrong in (0, 65, "5", 5.5, True):
        with pytest.raises(ValueError, match=f"max_length={wrong!r} is impossible: this model reads 1 to 64"):
            encoder(max_length=wrong)


# --- bad and empty input --------------------------------------------------------------------------------------------


def test_an_empty_text_is_read_as_the_token_that_ends_one():
    model = tiny()
    watched = Watched(model)
    found = usmoe.Encoder(model, tokenizer()).encode(["", "abc", ""])
    assert np.isfinite(found).all()
    assert sorted(map(len, watched.seen)) == [1, 1, 3]
    close(found[0], found[2])
    with pytest.raises(ValueError, match="One of the texts is empty, and this tokenizer has no token"):
        usmoe.Encoder(model, tokenizer(eos_token=None)).encode([""])


def test_no_texts_and_a_single_one():
    enc = encoder(embedding="moee")
    assert enc.encode([]).shape == (0, 48) == (0, enc.dimension)
    assert enc.encode("abc").shape == (48,)
    assert enc.encode(("abc", "d")).dtype == np.float32


@pytest.mark.parametrize("wrong", [None, 3, b"abc", ["a"], 2.5, float("nan")], ids=str)
def test_what_is_no_text_is_refused_by_its_place(wrong):
    with pytest.raises(TypeError, match="Text 2 is"):
        encoder().encode(["a", "b", wrong])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"embedding": "hiden"}, "embedding='hiden' is unknown. Choose one of: hidden, router, moee"),
        ({"pooling": "max"}, "pooling='max' is unknown"),
        ({"moee": "product"}, "moee='product' is unknown"),
        ({"router_features": "weights"}, "router_features='weights' is unknown"),
        ({"w": -1}, "w=-1 is no weight"),
        ({"w": float("nan")}, "w=nan is no weight"),
        ({"layers": [0]}, "does not read"),
        ({"prompt": None}, "prompt=None is no text"),
        ({"w": True}, "w=True is no weight"),
    ],
    ids=str,
)
def test_unknown_settings_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        encoder(**changes)


def test_a_model_without_its_tokenizer_or_without_experts_is_refused():
    with pytest.raises(ValueError, match="was given without its tokenizer"):
        usmoe.Encoder(tiny())
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(vocab_size=96, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4)
    dense = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=64)).eval()
    assert usmoe.Encoder(dense, tokenizer()).encode(TEXTS).shape == (5, 32)
    for asked in ({"embedding": "router"}, {"router": USMoE()}):
        with pytest.raises(ValueError, match="no MoE layer"):
            usmoe.Encoder(dense, tokenizer(), **asked)
    small = usmoe.Encoder(LlamaForCausalLM(LlamaConfig(**(shape | {"vocab_size": 40}))).eval(), tokenizer())
    with pytest.raises(ValueError, match="The tokenizer gives token 95, and the model has 40"):
        small.encode("}}")


@pytest.mark.parametrize("wrong", [3, None, {"a": 1}, {"a", "b"}], ids=str)
def test_what_is_no_list_of_texts_is_refused(wrong):
    with pytest.raises(TypeError, match="Texts cannot be a"):
        encoder().encode(wrong)


def test_any_ordered_collection_of_texts_will_do():
    enc = encoder()
    expected = enc.encode(TEXTS)
    close(enc.encode(np.array(TEXTS)), expected)
    close(enc.encode(text for text in TEXTS), expected)
    close(enc.encode(TEXTS, np.int64(2)), expected)
    close(enc.features(iter(TEXTS)).hidden, expected)


def test_half_a_surrogate_pair_and_an_instruction_that_is_no_text_are_refused():
    with pytest.raises(ValueError, match="Text 1 holds half of a surrogate pair"):
        encoder().encode(["a", "b\ud800"])
    for wrong in (["x", "y"], 5):
        with pytest.raises(TypeError, match=r"is no text\. Give one for all texts"):
            encoder().encode(["a", "b"], instruction=wrong)


def test_where_a_model_of_ones_own_stands_is_its_owners_matter():
    with pytest.raises(ValueError, match="are for a model that is loaded here"):
        usmoe.Encoder(tiny(), tokenizer(), dtype="bfloat16")
    with pytest.raises(TypeError, match="is not a transformers model"):
        usmoe.Encoder(torch.nn.Linear(2, 2), tokenizer())


@pytest.mark.parametrize("name", ["batch_size", "processes"])
def test_impossible_numbers_are_refused(name):
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match=f"{name}={wrong} is impossible"):
            encoder().encode(TEXTS, **{name: wrong})


# --- standardising --------------------------------------------------------------------------------------------------

SAMPLE = ["some text", "other words", "and 3 more", "to calibrate on"]


@pytest.mark.parametrize("embedding", ["router", "moee", "hidden"])
def test_features_are_standardised_by_the_sample_whatever_the_batch(embedding):
    raw = encoder(embedding=embedding)
    of_sample = raw.encode(SAMPLE)
    enc = encoder(embedding=embedding, standardize={"four": SAMPLE})
    expected = (raw.encode(TEXTS) - of_sample.mean(0)) / of_sample.std(0)
    close(enc.encode(TEXTS), expected, 1e-4)
    close(enc.encode(TEXTS[:1]), expected[:1], 1e-4)
    assert (enc.statistics.name, enc.statistics.texts) == ("four", 4)
    kept = encoder(embedding=embedding, standardize=enc.statistics)
    close(kept.encode(TEXTS), expected, 1e-4)


def test_a_sum_standardises_before_it_measures_cosines():
    enc = encoder(embedding="moee", moee="sum", standardize=SAMPLE)
    whole = encoder(embedding="moee", standardize=SAMPLE).encode(TEXTS)
    first, second = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in np.split(whole, [32], axis=1))
    close(enc.similarity(enc.encode(TEXTS), enc.encode(TEXTS)), first @ first.T + second @ second.T, 1e-4)


def test_a_sample_is_a_name_a_file_or_texts(tmp_path):
    file = tmp_path / "sample.txt"
    file.write_text("\n".join(SAMPLE) + "\n\n", encoding="utf-8")
    by_file, by_texts = (encoder(embedding="router", standardize=one) for one in (file, SAMPLE))
    close(by_file.encode(TEXTS), by_texts.encode(TEXTS))
    assert by_file.statistics.name == "sample.txt"
    assert by_texts.statistics.name.startswith("4 texts ")
    assert usmoe.Encoder(embedding="router", standardize="novels").statistics.name == "novels"
    file.write_bytes(b"good\nb\xffd\n")
    with pytest.raises(ValueError, match="is not UTF-8: line 2 holds byte 0xff"):
        encoder(embedding="router", standardize=file)
    with pytest.raises(ValueError, match="is no sample and no file"):
        encoder(standardize="nowhere.txt")
    with pytest.raises(ValueError, match="holds 1 texts, and a deviation needs two"):
        encoder(standardize=["one"])
    with pytest.raises(TypeError, match="standardize cannot be a int"):
        encoder(standardize=3)
    with pytest.raises(ValueError, match="are of 16 features, and there are 32"):
        encoder(standardize=by_texts.statistics).encode(TEXTS)


def test_a_feature_that_does_not_vary_is_not_blown_up():
    constant = Statistics.of(np.array([[1.0, 0.3], [1.0, 0.5]], dtype=np.float32), "two")
    assert constant.deviation[0] == 1.0
    assert constant(np.array([[1.0, 0.4]], dtype=np.float32))[0, 0] == 0.0


# --- several processes ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("router", [None, USMoE(alpha=0.5)], ids=str)
def test_several_processes_give_the_same_vectors(router):
    enc = encoder(router, embedding="moee", standardize=SAMPLE)
    alone = enc.encode(TEXTS * 3, batch_size=2)
    close(enc.encode(TEXTS * 3, batch_size=2, processes=2), alone)  # each process has its share of the threads
    assert patch_of(enc.model) is None
