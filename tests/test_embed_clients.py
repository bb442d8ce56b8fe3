"""What the clients of an encoder do with it: each option is honoured or refused, results of different encoders are kept
apart, and a copy, in whatever way it was made, gives the same vectors."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch

import usmoe
from test_embed_adapters import batches, metadata, positive, run, settings, sts
from tiny import tiny
from tiny_encoder import EACH, HALF, TEXTS, encoder, letters
from usmoe.embed.encoder import Encoder

mteb = pytest.importorskip("mteb")
sentence_transformers = pytest.importorskip("sentence_transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The `get_sentence_embedding_dimension`:FutureWarning"),  # which mteb calls
    pytest.mark.filterwarnings("ignore:The fill_missing parameter:DeprecationWarning"),  # which mteb gives
]


def meta_of(host) -> Any:
    from mteb.models.model_meta import ModelMeta

    return ModelMeta.from_sentence_transformer_model(host)


def opened(folder, **options):
    return sentence_transformers.SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", **options)


# Results are kept apart.


def test_no_two_hosted_encoders_share_a_folder_of_results(tmp_path, monkeypatch):
    monkeypatch.setattr(Encoder, "dimension", 1)  # no forward for each
    cache, seen = mteb.ResultCache(tmp_path), {}
    for one in settings():
        meta = meta_of(one.as_sentence_transformer())
        path = cache.get_task_result_path("Task", meta)
        assert path not in seen, (one.about(), seen[path])
        seen[path] = one.about()
        mine = one.as_mteb().mteb_model_meta
        assert meta.name == mine.name
        assert meta.revision.startswith(f"{mine.revision}-")


def test_mteb_gives_a_hosted_encoder_its_own_scores(tmp_path):
    encoders = [encoder(HALF, "moee"), encoder(None, "hidden"), encoder(EACH, "moee", moee="sum", w=0.3)]
    cache = mteb.ResultCache(tmp_path)
    for mine in encoders:
        expected = run(mine.as_mteb(), sts(), tmp_path / "mine")[0].get_score()
        for _ in range(2):
            said = mteb.evaluate(
                mine.as_sentence_transformer(), sts(), cache=cache, co2_tracker=False, show_progress_bar=False
            )
            assert said.task_results[0].get_score() == pytest.approx(expected, abs=1e-6)
    assert len(list(tmp_path.glob("results/*/*/TinySTS.json"))) == 3


def test_name_and_revision_are_the_same_after_save_and_load(tmp_path):
    mine = encoder(EACH, "moee", moee="sum", w=0.3, standardize=TEXTS, prompt='a "{text}"')
    host = mine.as_sentence_transformer()
    host.save(str(tmp_path / "mine"))
    loaded, again = opened(tmp_path / "mine"), Encoder.load(tmp_path / "mine")
    assert meta_of(loaded).name == again.as_mteb().mteb_model_meta.name == "usmoe/mine"
    assert meta_of(loaded).revision == meta_of(host).revision == meta_of(again.as_sentence_transformer()).revision
    assert json.loads((tmp_path / "mine" / "modules.json").read_text())[0]["type"].startswith("usmoe.")


def test_the_revision_follows_what_the_vectors_depend_on():
    mine = encoder(HALF, "hidden")
    host = mine.as_sentence_transformer()
    seen = [host.model_card_data.base_model_revision]
    assert host.model_card_data.base_model_revision == seen[0]
    host.max_seq_length = 9
    seen.append(host.model_card_data.base_model_revision)
    host.truncate_dim = 4
    seen.append(host.model_card_data.base_model_revision)
    host.prompts["query"] = "ask: "
    seen.append(host.model_card_data.base_model_revision)
    with torch.no_grad():
        mine.model.model.norm.weight[3] += 1
    seen.append(host.model_card_data.base_model_revision)
    assert len(set(seen)) == 5


def test_a_card_of_the_users_own_stays(tmp_path):
    encoder().as_sentence_transformer().save(str(tmp_path))
    card = sentence_transformers.SentenceTransformerModelCardData(model_name="me/mine")
    assert opened(tmp_path, model_card_data=card).model_card_data is card


# Options.


@pytest.mark.parametrize("ask", ["encode", "encode_query", "encode_document"])
def test_options_of_encode_are_honoured_or_refused(ask):
    mine = encoder(HALF)
    encode = getattr(mine.as_sentence_transformer(), ask)
    vectors = mine.encode(TEXTS)
    np.testing.assert_allclose(encode(TEXTS), vectors, atol=1e-5)
    with pytest.raises(ValueError, match=r"processing_kwargs=.*cannot be read"):
        encode(TEXTS, processing_kwargs={"text": {"max_length": 3, "truncation": True}})
    with pytest.raises(ValueError, match="does not use"):
        encode(TEXTS, instruction="Do it.")
    np.testing.assert_allclose(encode(TEXTS, truncate_dim=5), vectors[:, :5], atol=1e-5)
    assert encode(TEXTS, precision="int8").dtype == np.int8
    np.testing.assert_allclose(encode("cat", prompt="a "), mine.encode("a cat"), atol=1e-5)


def test_prompts_are_pooled_with_the_text_and_nothing_else_is_promised():
    host = encoder(HALF, pooling="mean").as_sentence_transformer()
    host.set_pooling_include_prompt(True)
    with pytest.raises(ValueError, match=r"set_pooling_include_prompt\(False\) is impossible"):
        host.set_pooling_include_prompt(False)
    host.prompts["query"] = "a "
    np.testing.assert_allclose(host.encode_query(["cat"]), host.encode(["a cat"]), atol=1e-5)


def test_a_sum_is_not_cut(tmp_path):
    host = encoder(HALF, "moee", moee="sum").as_sentence_transformer()
    host.save(str(tmp_path))
    for one in (host, opened(tmp_path)):
        whole = one.encode(TEXTS)
        for ask in (
            lambda one=one: one.encode(TEXTS, truncate_dim=20),
            lambda one=one: one.encode_query("a", truncate_dim=1),
        ):
            with pytest.raises(ValueError, match="truncate_dim is impossible for the sum"):
                ask()
        with one.truncate_embeddings(20), pytest.raises(ValueError, match="truncate_dim is impossible"):
            one.encode(TEXTS)
        np.testing.assert_array_equal(one.encode(TEXTS, truncate_dim=whole.shape[1]), whole)
        np.testing.assert_allclose(np.linalg.norm(one.encode(TEXTS, normalize_embeddings=True), axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"processor_kwargs": {"padding_side": "left"}}, "processor_kwargs=.*cannot be read"),
        ({"tokenizer_kwargs": {"padding_side": "left"}}, "processor_kwargs=.*cannot be read"),
        ({"config_kwargs": {"num_experts_per_tok": 1}}, "config_kwargs=.*cannot be read"),
        ({"backend": "onnx"}, "backend='onnx' is impossible"),
        ({"model_kwargs": {"attn_implementation": "eager"}}, "knows dtype alone"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*tokenizer_kwargs")
def test_options_of_loading_are_refused(options, sentence, tmp_path):
    encoder().as_sentence_transformer().save(str(tmp_path))
    with pytest.raises(ValueError, match=sentence):
        opened(tmp_path, **options)


@pytest.mark.parametrize(
    "option", [{"truncate_dim": 4}, {"prompt": "a "}, {"prompt_name": "query"}, {"normalize_embeddings": True}]
)
def test_encode_kwargs_that_an_encoder_does_not_read_are_refused_by_mteb(option, tmp_path):
    model = encoder(HALF).as_mteb()
    with pytest.raises(ValueError, match=f"{min(option)} of encode_kwargs cannot be read"):
        model.encode(batches("a"), task_metadata=metadata("STS", "spearman"), **option)
    with pytest.raises(ValueError, match=f"{min(option)} of encode_kwargs cannot be read"):
        mteb.evaluate(model, sts(), cache=None, co2_tracker=False, encode_kwargs=option)


# The rest of sentence-transformers.


@pytest.mark.parametrize(
    ("router", "options"), [(None, {}), (HALF, {"standardize": TEXTS}), (EACH, {"pooling": "mean"})]
)
def test_a_hidden_state_has_a_vector_a_token(router, options):
    mine = encoder(router, "hidden", **options)
    host = mine.as_sentence_transformer()
    texts = ["a cat sat", "z", "stocks fell"]
    found = host.encode(texts, output_value="token_embeddings", batch_size=2)
    assert [tuple(one.shape) for one in found] == [(len(text), 32) for text in texts]
    pooled = [one.mean(0) if mine.settings.pooling == "mean" else one[-1] for one in found]
    np.testing.assert_allclose(torch.stack(pooled), mine.encode(texts), atol=1e-5)
    every: Any = host.encode(texts, output_value=None)
    assert set(every[0]) >= {"sentence_embedding", "token_embeddings", "input_ids"}
    with pytest.raises(ValueError, match=r"token_embeddings.*only embedding="):
        encoder(HALF, "moee").as_sentence_transformer().encode(texts, output_value="token_embeddings")


def test_it_is_not_trained():
    host = encoder(HALF).as_sentence_transformer()
    features = host.preprocess(TEXTS)
    host.train()
    with pytest.raises(ValueError, match="gives no gradients, so it cannot be trained"):
        host(features)
    host.eval()
    assert host(features)["sentence_embedding"].shape == (6, 32)


def test_hosting_and_encoding_leave_the_mode_of_the_users_model():
    model = tiny(attention_dropout=0.5).train()
    mine = encoder(HALF, "hidden", model)
    host = mine.as_sentence_transformer()
    np.testing.assert_allclose(host.encode(TEXTS), mine.encode(TEXTS), atol=1e-5)
    host.eval()
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("router", [None, HALF, EACH], ids=str)
def test_it_can_be_compiled(router):
    mine = encoder(router, "moee")
    host = mine.as_sentence_transformer()
    host.compile(backend="eager")
    for texts in (TEXTS, TEXTS[:2], ["abc"]):
        np.testing.assert_allclose(host.encode(texts), mine.encode(texts), atol=1e-5)


# Copies.


def patched_before():
    return encoder(None, "moee", usmoe.patch(tiny(), HALF))


def loaded():
    return usmoe.Encoder(router=HALF, embedding="moee")


MADE = {
    "plain": lambda: encoder(),
    "a router": lambda: encoder(HALF, "moee"),
    "patched before": patched_before,
    "loaded": loaded,
    "a router of one's own": lambda: encoder(positive, "moee"),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_copies_give_the_same_vectors(make):
    mine = make()
    vectors = mine.encode(TEXTS)
    for same in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        np.testing.assert_array_equal(same.encode(TEXTS), vectors)
        assert same.about() == mine.about()
    host = mine.as_sentence_transformer()
    for same in (copy.deepcopy(host), pickle.loads(pickle.dumps(host))):
        np.testing.assert_allclose(same.encode(TEXTS), vectors, atol=1e-5)
        assert same.model_card_data.base_model_revision == host.model_card_data.base_model_revision


def test_joblib_hashes_and_remembers_what_an_encoder_says(tmp_path):
    joblib = pytest.importorskip("joblib")
    ran = []

    def embed(model, texts):
        ran.append(texts)
        return model.encode(texts)

    embed = joblib.Memory(tmp_path, verbose=0).cache(embed)
    for make in MADE.values():
        model = make()
        before = joblib.hash(model)  # two plain models of transformers with equal weights have different ones
        vectors = model.encode(TEXTS)
        assert joblib.hash(model) == before
        for _ in range(2):
            np.testing.assert_array_equal(embed(model, TEXTS), vectors)
    assert len(ran) == len(MADE)


def test_vectors_are_as_indexes_of_neighbours_want_them():
    for mine in (encoder(HALF, "moee"), encoder(HALF, "moee", moee="sum"), encoder(standardize=TEXTS)):
        vectors = mine.encode(TEXTS)
        assert vectors.dtype == np.float32
        assert vectors.flags.c_contiguous
        assert vectors.flags.owndata or vectors.base is not None
        assert [list(map(float, one)) for one in vectors] == vectors.tolist()


def test_it_stands_in_a_pipeline_of_scikit_learn():
    pytest.importorskip("sklearn")
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer

    mine = encoder(HALF)
    chain = make_pipeline(FunctionTransformer(mine.encode), LogisticRegression())
    assert chain.fit(TEXTS, [0, 1, 0, 1, 0, 1]).predict(TEXTS).shape == (6,)


def test_coroutines_share_an_encoder():
    mine = encoder(HALF, "moee")
    vectors = mine.encode(TEXTS)

    async def several():
        return await asyncio.gather(*(asyncio.to_thread(mine.encode, TEXTS, progress=False) for _ in range(8)))

    for found in asyncio.run(several()):
        np.testing.assert_array_equal(found, vectors)


def test_sentence_transformers_own_module_is_routed_as_the_model_is(tmp_path):
    """Its Transformer module calls model.forward: texts in a batch do not compete with padding."""
    model = tiny()
    model.save_pretrained(tmp_path)
    letters().save_pretrained(tmp_path)
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    module = Transformer(str(tmp_path))
    host = sentence_transformers.SentenceTransformer(
        modules=[module, Pooling(32, pooling_mode="lasttoken")], device="cpu"
    )
    host.tokenizer.padding_side = "right"
    usmoe.patch(host.transformers_model, HALF)
    texts = [text for text in TEXTS if text]
    alone = np.stack([host.encode(text) for text in texts])
    np.testing.assert_allclose(host.encode(texts, batch_size=3), alone, atol=1e-5)
    np.testing.assert_allclose(alone, encoder(HALF).encode(texts), atol=1e-5)
