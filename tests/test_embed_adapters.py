"""An Encoder in sentence-transformers and in mteb: the same vectors everywhere, each text run once, and no two settings
that share a folder of results."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import usmoe
from rounding import assert_to_rounding
from tiny import tiny
from tiny_encoder import EACH, ENCODERS, HALF, TEXTS, encoder, letters, positive
from usmoe.embed.digest import digest
from usmoe.embed.encoder import Encoder
from usmoe.hf.patch import patch_of

mteb = pytest.importorskip("mteb")
sentence_transformers = pytest.importorskip("sentence_transformers")

# sentence-transformers and torchmetrics, which mteb imports when it first evaluates, still script a function
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


# In sentence-transformers.


@pytest.mark.parametrize("make", ENCODERS.values(), ids=ENCODERS)
def test_a_hosted_encoder_gives_the_same_vectors(make):
    mine = make()
    before = patch_of(mine.model)
    vectors, host = mine.encode(TEXTS), mine.as_sentence_transformer()
    assert isinstance(host, sentence_transformers.SentenceTransformer)
    np.testing.assert_allclose(host.encode(TEXTS, batch_size=2), vectors, atol=1e-5)
    np.testing.assert_allclose(host.encode("a cat sat"), mine.encode("a cat sat"), atol=1e-5)
    assert host.get_embedding_dimension() == vectors.shape[1]
    assert host.max_seq_length == mine.max_length
    assert patch_of(mine.model) is before


def test_its_encode_knows_what_users_of_sentence_transformers_ask_for():
    mine = encoder(HALF, "moee", prompt='"{text}" means "', max_length=40)
    host = mine.as_sentence_transformer()
    tensor = host.encode(TEXTS, convert_to_tensor=True)
    np.testing.assert_allclose(tensor, mine.encode(TEXTS), atol=1e-5)
    unit = host.encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(host.encode("cat", prompt="a "), mine.encode("a cat"), atol=1e-5)
    assert host.encode([]).shape == (0,)
    assert host.tokenizer is mine.tokenizer
    with pytest.raises(TypeError, match="Text 1 is None"):
        host.encode(["a", None])


def test_the_model_is_shared_and_counted_once():
    mine = encoder(HALF)
    host = mine.as_sentence_transformer()
    assert [id(one) for one in host.parameters()] == [id(one) for one in mine.model.parameters()]
    assert host.device == mine.model.device
    assert not host.eval().training
    assert host.transformers_model is mine.model


def test_the_length_can_be_set_and_the_statistics_stay():
    mine = encoder(standardize=TEXTS)
    host = mine.as_sentence_transformer()
    host.max_seq_length = 8
    assert host.max_seq_length == 8
    shorter = mine.variant(max_length=8, standardize=mine.statistics).encode(TEXTS)
    np.testing.assert_allclose(host.encode(TEXTS), shorter, atol=1e-5)
    assert mine.max_length == 64
    with pytest.raises(ValueError, match="max_length=65 is impossible"):
        host.max_seq_length = 65


def test_its_similarity_is_the_encoders():
    for mine in (encoder(HALF, "moee"), encoder(HALF, "moee", moee="sum", w=2)):
        host, vectors = mine.as_sentence_transformer(), mine.encode(TEXTS)
        assert host.similarity_fn_name == mine.similarity_name
        np.testing.assert_allclose(host.similarity(vectors, vectors), mine.similarity(vectors, vectors), atol=1e-5)


def test_a_fresh_process_loads_what_it_saved(tmp_path):
    mine = encoder(HALF, "moee", moee="sum", standardize=TEXTS)
    mine.as_sentence_transformer().save(str(tmp_path))
    code = (
        "import json, sys; from sentence_transformers import SentenceTransformer\n"
        "host = SentenceTransformer(sys.argv[1], trust_remote_code=True)\n"
        "print(json.dumps([host.similarity_fn_name, host.encode(json.loads(sys.argv[2])).tolist()]))"
    )
    said = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path), json.dumps(TEXTS)],
        capture_output=True, text=True, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    name, vectors = json.loads(said.stdout)
    assert name == "dot"
    np.testing.assert_allclose(vectors, mine.encode(TEXTS), atol=1e-5)
    assert_to_rounding(Encoder.load(tmp_path).encode(TEXTS), mine.encode(TEXTS))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        sentence_transformers.SentenceTransformer(str(tmp_path))


def test_of_the_options_for_a_model_it_reads_the_dtype(tmp_path):
    encoder().as_sentence_transformer().save(str(tmp_path))

    def load(**options):
        return sentence_transformers.SentenceTransformer(
            str(tmp_path), trust_remote_code=True, device="cpu", model_kwargs=options
        )

    assert load(dtype=torch.bfloat16).dtype == load(torch_dtype="bfloat16").dtype == torch.bfloat16
    assert load(dtype="auto").dtype == torch.float32
    with pytest.raises(ValueError, match="knows dtype alone"):
        load(attn_implementation="eager")


@pytest.mark.slow
def test_it_encodes_in_several_processes():
    mine = encoder(HALF, "moee")
    host = mine.as_sentence_transformer()
    pool = host.start_multi_process_pool(["cpu", "cpu"])
    try:
        np.testing.assert_allclose(host.encode(TEXTS * 3, pool=pool), mine.encode(TEXTS * 3), atol=1e-5)
    finally:
        host.stop_multi_process_pool(pool)


# In mteb.


def metadata(kind: str, score: str, prompt=None):
    from mteb.abstasks.task_metadata import TaskMetadata

    return TaskMetadata(
        name=f"Tiny{kind}", type=kind, main_score=score, prompt=prompt, description="", reference=None,
        dataset={"path": "nowhere/nothing", "revision": "1"}, eval_splits=["test"], eval_langs=["eng-Latn"],
        category=None, date=None, domains=None, task_subtypes=None, license=None, annotations_creators=None,
        dialect=None, sample_creation=None, bibtex_citation="", modalities=["text"],
    )  # fmt: skip


def sts(**said):
    from datasets import Dataset, DatasetDict
    from mteb.abstasks import AbsTaskSTS

    class Task(AbsTaskSTS):
        metadata = globals()["metadata"]("STS", "cosine_spearman", **said)
        min_score, max_score = 0, 5

        def load_data(self, **_):
            rows = {"sentence1": TEXTS[:5], "sentence2": TEXTS[1:], "score": [1.0, 0.0, 2.0, 3.0, 5.0]}
            self.dataset, self.data_loaded = DatasetDict(test=Dataset.from_dict(rows)), True

    return Task()


def classification():
    from datasets import Dataset, DatasetDict
    from mteb.abstasks import AbsTaskClassification

    class Task(AbsTaskClassification):
        metadata = globals()["metadata"]("Classification", "accuracy")
        n_experiments, samples_per_label = 2, 2

        def load_data(self, **_):
            rows = Dataset.from_dict({"text": ["aa", "ab", "zz", "zy"], "label": [0, 0, 1, 1]})
            self.dataset, self.data_loaded = DatasetDict(train=rows, test=rows), True

    return Task()


def run(model, task, folder):
    cache = mteb.ResultCache(folder)
    said = mteb.evaluate(model, task, cache=cache, co2_tracker=False, show_progress_bar=False)
    return said.task_results[0], cache.get_task_result_path(task.metadata.name, model.mteb_model_meta)


def batches(*texts):
    """As mteb's data loaders give them."""
    return [{"text": list(texts[at : at + 2])} for at in range(0, len(texts), 2)]


def test_mteb_scores_an_encoder_as_its_similarity_says(tmp_path):
    from mteb.models import EncoderProtocol
    from scipy.stats import spearmanr

    for mine in (encoder(HALF, "moee"), encoder(HALF, "moee", moee="sum", w=0.5)):
        model = mine.as_mteb()
        assert isinstance(model, EncoderProtocol)
        said, path = run(model, sts(), tmp_path)
        pairs = mine.similarity_pairwise(mine.encode(TEXTS[:5]), mine.encode(TEXTS[1:]))
        expected = spearmanr(pairs, [1, 0, 2, 3, 5]).statistic
        assert said.get_score() == pytest.approx(expected, abs=1e-6)
        assert said.scores["test"][0]["spearman"] == pytest.approx(expected, abs=1e-6)
        assert path.is_file()
        kept = json.loads((path.parent / "model_meta.json").read_text())
        assert kept["loader_kwargs"]["router"] == "usmoe(alpha=0.5)"
        assert (kept["embed_dim"], kept["max_tokens"]) == (48, 64)
    said, _ = run(mine.variant(moee="concat").as_mteb(), classification(), tmp_path)
    assert 0 <= said.get_score() <= 1


def test_the_sum_is_refused_where_vectors_are_read(tmp_path):
    model = encoder(HALF, "moee", moee="sum").as_mteb()
    with pytest.raises(ValueError, match=r"no meaning for Classification \(TinyClassification\).*moee='concat'"):
        run(model, classification(), tmp_path)


def settings():
    """Encoders of one model, no two of which make the same vectors."""
    shared, dtype = tiny(), tiny().to(torch.bfloat16)
    threshold = usmoe.ExpertChoice(pool="threshold", threshold=(0.5,) * 8)
    other = usmoe.ExpertChoice(pool="threshold", threshold=(0.5,) * 7 + (0.6,))
    routers = [None, HALF, usmoe.USMoE(k=2, alpha=0.5), EACH, EACH[::-1], threshold, other, positive]
    prompts = [
        "none",
        "prompteol",
        'a "{text}"',
        "a ?{text}?",
        "a _{text}_",
        "b" * 300 + "{text}",
        "c" * 300 + "{text}",
    ]
    for router in routers:
        for embedding in ("hidden", "router", "moee"):
            yield encoder(router, embedding, shared)
    for prompt in prompts[1:]:
        yield encoder(None, "hidden", shared, prompt=prompt, max_length=None)
    yield encoder(None, "hidden", shared, pooling="mean")
    yield encoder(None, "hidden", shared, max_length=10)
    yield encoder(None, "hidden", dtype)
    for sample in (TEXTS, TEXTS[:3], {"a/b": TEXTS[1:]}, {"a:b": TEXTS[2:]}, {"a:b": TEXTS[:2]}):
        yield encoder(None, "hidden", shared, standardize=sample)
    for w in (0, 0.5, 1, 2):
        yield encoder(None, "moee", shared, moee="sum", w=w)
    yield encoder(None, "moee", shared, router_features="probabilities")
    for layers in ([0], [1], [1, 0]):
        yield encoder(None, "router", shared, layers=layers)


def test_no_two_settings_share_a_folder_of_results(tmp_path, monkeypatch):
    monkeypatch.setattr(Encoder, "dimension", 1)  # no forward for each
    cache, seen = mteb.ResultCache(tmp_path), {}
    for one in settings():
        for model in (one.as_mteb(), one.as_mteb(instructions=True)):
            path = cache.get_task_result_path("Task", model.mteb_model_meta)
            assert path not in seen, (one.about(), seen[path])
            seen[path] = one.about()
            path.parent.mkdir(parents=True)  # short enough for the file system
            assert not set(path.parent.name) & set('<>:"|?*\\')
    assert cache.get_task_result_path("Task", encoder(HALF).as_mteb().mteb_model_meta) in seen


def test_a_folder_says_what_its_results_are_of():
    from usmoe.embed.mteb_model import MTEBModel

    meta = encoder(HALF, "moee", prompt="prompteol", moee="sum", w=0.5).as_mteb().mteb_model_meta
    assert meta.experiment_name == (
        "alpha_0.5__embedding_moee__moee_sum__prompt_prompteol__router_usmoe(alpha=0.5)__w_0.5"
    )
    assert encoder().as_mteb().mteb_model_meta.experiment_name == (
        "alpha_None__embedding_hidden__prompt_none__router_own_choice"
    )
    quantised = MTEBModel(encoder(), about={"quantize": "nf4"}).mteb_model_meta
    assert "quantize_nf4" in quantised.experiment_name


def test_a_model_is_named_by_its_hub_id_or_its_folder(tmp_path):
    from usmoe.embed.mteb_model import name_of

    (tmp_path / "my model").mkdir()
    named = {None: "usmoe/model", "shipped": "usmoe/novelist", "allenai/OLMoE-1B-7B-0924": "allenai/OLMoE-1B-7B-0924"}
    named |= {str(tmp_path / "my model"): "usmoe/my-model", "gpt2": "usmoe/gpt2", "./here": "usmoe/here"}
    assert {source: name_of(source) for source in named} == named


def test_instructions_are_the_tasks_own():
    from mteb.types import PromptType

    mine = encoder(HALF)
    model, without = mine.as_mteb(instructions=True), mine.as_mteb()
    for prompt, prompt_type, expected in (
        ("Do it.", None, "Do it."),
        ({"query": "Ask.", "document": "Tell."}, PromptType.query, "Ask."),
        ({"query": "Ask.", "document": "Tell."}, PromptType.document, "Tell."),
        ({"query": "Ask."}, PromptType.document, None),
        (None, None, None),
    ):
        task = metadata("Retrieval", "ndcg_at_10", prompt)
        said = model.encode(batches("a", "b", "c"), task_metadata=task, prompt_type=prompt_type)
        np.testing.assert_allclose(said, mine.encode(["a", "b", "c"], instruction=expected), atol=1e-5)
        said = without.encode(batches("a", "b", "c"), task_metadata=task, prompt_type=prompt_type)
        np.testing.assert_allclose(said, mine.encode(["a", "b", "c"]), atol=1e-5)


def test_similarities_are_tensors_of_what_mteb_gives():
    mine = encoder(HALF, "moee", moee="sum", w=0.5)
    model, vectors = mine.as_mteb(), mine.encode(TEXTS)
    expected = vectors @ vectors.T
    for given in (vectors, torch.from_numpy(vectors)):
        assert isinstance(model.similarity(given, given), torch.Tensor)
        np.testing.assert_allclose(model.similarity(given, given), expected, atol=1e-5)
        np.testing.assert_allclose(model.similarity_pairwise(given, given), expected.diagonal(), atol=1e-5)
        assert float(model.similarity(given[0], given[1])) == pytest.approx(expected[0, 1], abs=1e-5)
    with pytest.raises(ValueError, match="precision='int8' is impossible"):
        model.encode(batches("a"), task_metadata=metadata("STS", "spearman"), precision="int8")


def test_the_digest_is_of_the_weights_and_of_them_alone():
    model, tokenizer = tiny(), letters()
    before = digest(model, tokenizer)
    assert len(before) == 12
    assert digest(usmoe.patch(tiny(), HALF), tokenizer) == before
    assert digest(tiny(seed=1), tokenizer) != before
    assert digest(tiny().to(torch.bfloat16), tokenizer) != before
    tokenizer.add_tokens(["new"])
    assert digest(model, tokenizer) != before
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
    assert digest(model) != digest(tiny())
    model.register_buffer("correction", torch.zeros(8))
    before = digest(model)
    model.correction[0] = 1
    assert digest(model) != before


def test_the_digest_sees_weights_in_fewer_bits():
    pytest.importorskip("bitsandbytes")
    packed = [usmoe.quantize_experts(tiny(seed=seed)) for seed in (0, 0, 1)]
    first, second, third = map(digest, packed)
    assert first == second != third
    assert first != digest(tiny())


def test_a_text_that_stands_twice_is_run_once(monkeypatch):
    ran, features = [], Encoder.features
    monkeypatch.setattr(
        Encoder, "features", lambda self, texts, *a, **k: ran.extend(texts) or features(self, texts, *a, **k)
    )
    model = encoder(HALF).as_mteb()
    for _ in range(2):
        model.encode(batches("a", "a", "b"), task_metadata=metadata("STS", "spearman"))
    assert ran == ["a", "b"] * 2


@pytest.mark.parametrize(
    ("package", "module", "ask"),
    [
        ("sentence_transformers", "sentence_transformer", lambda one: one.as_sentence_transformer()),
        ("mteb", "mteb_model", lambda one: one.as_mteb()),
    ],
)
def test_a_missing_extra_is_named(package, module, ask, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, f"usmoe.embed.{module}", raising=False)
    with pytest.raises(ImportError, match=rf"needs {package}\. Install it: pip install 'usmoe\[embed\]'\.$"):
        ask(encoder())
