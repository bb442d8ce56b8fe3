"""Zero-shot language tasks by lm-eval: the likelihood of an answer, honest unless asked otherwise, under any router."""

import json
import warnings

import pytest
import torch

pytest.importorskip("lm_eval")

import datasets
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import usmoe
from tiny import tiny
from usmoe.evaluate import language_data, language_runs
from usmoe.evaluate.language import language_tasks
from usmoe.evaluate.language_data import find_language_tasks
from usmoe.evaluate.language_model import LanguageModel
from usmoe.evaluate.language_runs import compare_routers
from usmoe.hf.continuation import forwards, likelihoods
from usmoe.models import SHIPPED

pytestmark = pytest.mark.usefixtures("quiet_transformers")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture
def model():
    return tiny(vocab_size=4096, max_position_embeddings=48)


def own_router(logits, valid, host, **_):
    """A router of one's own, without promises: the experts above the mean of all tokens, padding included."""
    scores = logits.softmax(-1)
    return usmoe.Routing.from_dense(scores, scores > scores.mean((0, 1)))


THRESHOLD = usmoe.USMoE(pool="threshold", threshold=0.15)
CAUSAL = [usmoe.OwnChoice(k=2), THRESHOLD, usmoe.USMoE(pool="prefix"), usmoe.USMoE(pool="time_step")]
LOOK_AHEAD = [
    usmoe.USMoE(),
    usmoe.USMoE(pool="batch"),
    usmoe.USMoE(k=1.5, mask_padding=False),
    usmoe.ExpertChoice(score="softmax_tokens"),
    usmoe.BoundedChoice(k=2),
    own_router,
]


def name(router):
    return getattr(router, "__name__", str(router))


REQUESTS = [  # of several lengths, two that begin alike, two that are the same, one of one token
    ([5, 9, 300, 7], [11, 12, 13]),
    ([5, 9, 300, 7], [11, 14]),
    ([5, 9, 300, 7], [11, 14]),
    ([2, 3, 4, 5, 6, 7, 8, 9, 10], [2000]),
    ([77], [5, 4, 3, 2, 1, 88, 99]),
]


@torch.no_grad()
def by_loop(model, context, continuation, scoring):
    """Nats and greedy, one forward a token (honest) or one in all, each by itself."""
    tokens, nats, greedy = [*context, *continuation], 0.0, True
    for place in range(len(context), len(tokens)):
        end = place if scoring == "honest" else len(tokens) - 1
        said = model(torch.tensor([tokens[:end]])).logits[0, place - 1].log_softmax(-1)
        nats += said[tokens[place]].item()
        greedy = greedy and said.argmax().item() == tokens[place]
    return nats, greedy


def scored(model, scoring, requests=REQUESTS, batch_size=3):
    said = likelihoods(model, forwards(model, requests, scoring), batch_size=batch_size)
    return [(one.nats, one.greedy) for one in said]


def assert_same(ours, theirs):
    assert [nats for nats, _ in ours] == pytest.approx([nats for nats, _ in theirs], abs=2e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


# The likelihood of a continuation


@pytest.mark.parametrize("scoring", ["honest", "teacher-forced"])
@pytest.mark.parametrize("router", CAUSAL + LOOK_AHEAD, ids=name)
def test_every_router_equals_a_plain_loop(model, router, scoring):
    with usmoe.patched(model, router):
        ours = scored(model, scoring)
        assert_same(ours, [by_loop(model, *request, scoring) for request in REQUESTS])
        assert_same(scored(model, scoring, batch_size=1), ours)


@pytest.mark.parametrize("router", LOOK_AHEAD, ids=name)
def test_under_a_router_that_looks_ahead_the_two_scorings_differ(model, router):
    with usmoe.patched(model, router):
        honest, forced = scored(model, "honest"), scored(model, "teacher-forced")
    assert max(abs(one - two) for (one, _), (two, _) in zip(honest, forced, strict=True)) > 1e-3
    assert honest[3] == pytest.approx(forced[3])  # an answer of one token: no token to come but padding


def test_without_one_they_are_the_same_forwards(model):
    for router in CAUSAL:
        with usmoe.patched(model, router):
            assert forwards(model, REQUESTS, "honest") == forwards(model, REQUESTS, "teacher-forced")
    assert len(forwards(model, REQUESTS, "honest")) == 4  # five requests, two of them the same


def test_what_prefixes_have_in_common_is_run_once(model):
    usmoe.patch(model, usmoe.USMoE())
    todo = forwards(model, REQUESTS, "honest")
    assert [one.length for one in todo] == [9, 7, 6, 6, 5, 5, 4, 4, 3, 2, 1]  # 4: once for three requests
    ran = []
    model.register_forward_pre_hook(lambda _, args, kwargs: ran.append(kwargs["input_ids"].shape), with_kwargs=True)
    likelihoods(model, todo, batch_size=4)
    assert ran == [(4, 9), (4, 5), (3, 3)]


def test_greedy_is_said_of_the_same_forwards(model):
    """A continuation that the model would write, token by token, each after a forward over all that is there."""
    usmoe.patch(model, usmoe.ExpertChoice(score="softmax_tokens"))
    tokens = [5, 9, 300]
    for _ in range(12):
        with torch.no_grad():
            tokens.append(model(torch.tensor([tokens])).logits[0, -1].argmax().item())
    requests = [(tokens[:3], tokens[3:]), (tokens[:3], [*tokens[3:-1], (tokens[-1] + 1) % 4096])]
    assert [greedy for _, greedy in scored(model, "honest", requests)] == [True, False]
    assert [greedy for _, greedy in scored(model, "teacher-forced", requests)] == [False, False]


def test_what_cannot_be_scored_is_refused(model):
    with pytest.raises(ValueError, match="Request 1 has a continuation without tokens"):
        forwards(model, [([1], [2]), ([1], [])], "honest")
    with pytest.raises(ValueError, match="Request 0 has a context without tokens"):
        forwards(model, [([], [2])], "honest")
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ValueError, match="hold NaN"):
        scored(model, "honest")


# As lm-eval's model


PAIRS = [
    ("The old man", " went to the sea"),
    ("The old man", " went home"),
    ("", "Once upon a time"),  # no context: the prefix token
    ("A trailing space ", "moves over"),
    ("one " * 60, "more"),  # longer than the model reads
    ("Yes or", " no"),
]


def instances(kind, pairs):
    return [Instance(request_type=kind, doc={}, arguments=pair, idx=place) for place, pair in enumerate(pairs)]


@pytest.mark.parametrize("scoring", ["honest", "teacher-forced"])
def test_an_unpatched_model_is_scored_as_by_lm_eval_itself(model, tokenizer, scoring):
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    ours = LanguageModel(model, tokenizer, scoring=scoring, batch_size=2)
    requests = instances("loglikelihood", PAIRS)
    assert_same(ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True))
    assert ours.truncated == 1
    texts = instances("loglikelihood_rolling", [("It was a dark night. " * 40,), ("Short.",), ("",)])
    rolled = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(rolled, abs=1e-4)


def test_a_text_is_rolled_over_honestly(model, tokenizer):
    text = "It was a dark and stormy night, and the rain fell in torrents. " * 3
    tokens = tokenizer.encode(text)
    assert 48 < len(tokens) <= 95  # two windows
    usmoe.patch(model, usmoe.USMoE())
    first = by_loop(model, [tokenizer.eos_token_id], tokens[:48], "honest")[0]
    context, rest = tokens[len(tokens) - 49 : 48], tokens[48:]
    expected = first + by_loop(model, context, rest, "honest")[0]
    requests = instances("loglikelihood_rolling", [(text,)])
    assert LanguageModel(model, tokenizer).loglikelihood_rolling(requests) == [pytest.approx(expected, abs=1e-4)]
    forced = LanguageModel(model, tokenizer, scoring="teacher-forced").loglikelihood_rolling(requests)
    assert abs(forced[0] - expected) > 1e-2


def test_the_tokenizer_stays_as_it_was(model, tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    assert LanguageModel(model, bare).tokenizer.pad_token is not None
    assert bare.pad_token is None


def test_what_lm_eval_says_of_loaded_models_is_not_said(model, tokenizer, caplog):
    LanguageModel(model, tokenizer)
    assert not caplog.records
    HFLM(pretrained=model, tokenizer=tokenizer)
    assert len(caplog.records) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [({"scoring": "fair"}, "Choose one of: honest, teacher-forced"), ({"batch_size": 0}, "batch_size >= 1")],
)
def test_a_model_is_refused_in_a_sentence(model, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        LanguageModel(model, tokenizer, **options)


# Whole tasks

QUESTIONS = [
    ("Which is the largest?", ["A drop", "A pond", "The sea", "A cup of tea"], "C"),
    ("What do plants need?", ["Light", "Noise", "Iron ships", "A good night"], "A"),
    ("Which of these burns?", ["Water", "Stone", "Old dry wood", "Ice"], "3"),
    ("What is far away?", ["The moon", "My hand", "This room", "The door of the house"], "1"),
    ("Who was there?", ["Nobody", "The captain", "A ghost", "His old friend"], "B"),
]


def write_arc(folder, questions=QUESTIONS, hub="allenai/ai2_arc:ARC-Challenge"):
    """Made-up questions in the hub's columns."""
    rows = [
        {
            "id": f"made_{place}",
            "question": question,
            "choices": {"text": choices, "label": list("1234" if key.isdigit() else "ABCD")},
            "answerKey": key,
        }
        for place, (question, choices, key) in enumerate(questions)
    ]
    folder.mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(folder / "test.parquet")
    if hub:
        (folder / "manifest.json").write_text(json.dumps({"hub": hub}))
    return folder


@pytest.fixture(autouse=True)
def quiet_datasets(monkeypatch):
    """No bar, and no hub."""
    datasets.disable_progress_bars()

    def load_dataset(**_):
        raise ConnectionError("Couldn't reach the Hub\nat all")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def data(tmp_path):
    write_arc(tmp_path / "data" / "challenge")
    return tmp_path / "data"


TASK = """
task: {name}
dataset_path: allenai/ai2_arc
dataset_name: ARC-Challenge
output_type: {kind}
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: {target}
{more}
metadata:
  version: 3.0
"""


@pytest.fixture
def include(tmp_path):
    """Task files of one's own: a choice, a continuation, a text to write, and a group."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    files = {
        "choose": ("multiple_choice", '"{{choices.label.index(answerKey)}}"', 'doc_to_choice: "{{choices.text}}"'),
        "go_on": ("loglikelihood", '" {{choices.text[0]}}"', ""),
        "write": ("generate_until", '"{{choices.text[0]}}"', "generation_kwargs: {until: ['.'], max_gen_toks: 4}"),
    }
    for name, (kind, target, more) in files.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, target=target, more=more))
    group = "group: both\ntask: [choose, {task: go_on, task_alias: next}]\naggregate_metric_list: [{metric: acc}]\n"
    (folder / "both.yaml").write_text(group)
    return folder


def answers(model, tokenizer, scoring):
    """acc and acc_norm of the questions, by a loop over the choices."""
    right, right_by_length = 0, 0
    for question, choices, key in QUESTIONS:
        context = tokenizer.encode(f"Question: {question}\nAnswer:")
        nats = []
        for choice in choices:
            whole = tokenizer.encode(f"Question: {question}\nAnswer: {choice}")
            nats.append(by_loop(model, context, whole[len(context) :], scoring)[0])
        answer = "1234".find(key) if key.isdigit() else "ABCD".find(key)
        right += max(range(4), key=lambda one: nats[one]) == answer
        right_by_length += max(range(4), key=lambda one: nats[one] / len(choices[one])) == answer
    return right / len(QUESTIONS), right_by_length / len(QUESTIONS)


def test_arc_from_a_folder_in_the_hubs_columns(model, tokenizer, data, capsys, caplog):
    usmoe.patch(model, usmoe.ExpertChoice(score="softmax_tokens"))
    found = {}
    for scoring in ("honest", "teacher-forced"):
        scores = language_tasks(model, tokenizer, ["arc_challenge"], data=data, scoring=scoring)
        found[scoring] = {one.metric: one.value for one in scores}
        assert tuple(found[scoring].values()) == pytest.approx(answers(model, tokenizer, scoring))
    acc = scores[0]
    assert (acc.task, acc.metric, acc.filter, acc.version) == ("arc_challenge", "acc", "none", "1.0")
    assert (acc.samples, acc.available, acc.limit, acc.num_fewshot) == (5, 5, None, 0)
    assert acc.hub == "allenai/ai2_arc:ARC-Challenge"
    assert acc.revision.startswith("local-")
    assert acc.stderr == pytest.approx((acc.value * (1 - acc.value) / 4) ** 0.5)
    assert acc.higher_is_better
    assert type(acc).from_dict(json.loads(json.dumps(acc.to_dict()))) == acc
    assert capsys.readouterr() == ("", "")  # results alone belong on stdout, and bars on a terminal
    assert not caplog.records


def test_a_limit_takes_the_first_samples(model, tokenizer, data, include, capsys):
    options = {"data": data, "include": include}
    whole = language_tasks(model, tokenizer, ["go_on"], **options)
    few = language_tasks(model, tokenizer, ["go_on"], limit=2, **options)
    assert [(one.metric, one.samples, one.available, one.limit) for one in few] == [
        ("perplexity", 2, 5, 2),
        ("acc", 2, 5, 2),
    ]
    nats = []
    for question, choices, _ in QUESTIONS:
        context = tokenizer.encode(f"Question: {question}\nAnswer:")
        nats.append(by_loop(model, context, tokenizer.encode(f" {choices[0]}"), "honest")[0])
    for scores, count in ((whole, 5), (few, 2)):
        assert scores[0].value == pytest.approx(torch.tensor(nats[:count]).mean().neg().exp().item(), rel=1e-4)
    assert capsys.readouterr().out == ""  # where lm-eval prints that it takes a bootstrap of the perplexity


def test_a_group_is_scored_with_its_tasks(model, tokenizer, data, include):
    scores = language_tasks(model, tokenizer, ["both"], data=data, include=include)
    accs = {one.task: one for one in scores if one.metric == "acc"}
    assert list(accs) == ["choose", "go_on", "both"]
    assert accs["go_on"].alias == "next"
    assert accs["both"].value == pytest.approx((accs["choose"].value + accs["go_on"].value) / 2)
    assert accs["both"].stderr == pytest.approx((accs["choose"].stderr ** 2 + accs["go_on"].stderr ** 2) ** 0.5 / 2)
    assert (accs["both"].samples, accs["both"].group, accs["choose"].group) == (10, True, False)


def test_generation_is_refused_where_it_cannot_be_honest(model, tokenizer, data, include):
    options = {"data": data, "include": include, "limit": 1}
    with usmoe.patched(model, usmoe.USMoE()):
        with pytest.raises(ValueError, match=r"^write cannot be scored honestly under a router that looks ahead"):
            language_tasks(model, tokenizer, ["go_on", "write"], **options)
        asked = instances("generate_until", [("Once", {"until": ["."]})])
        with pytest.raises(ValueError, match="A task that generates text cannot be scored honestly"):
            LanguageModel(model, tokenizer).generate_until(asked)
        with pytest.warns(UserWarning, match="looks at tokens that are not generated yet"):
            scores = language_tasks(model, tokenizer, ["write"], scoring="teacher-forced", **options)
    with usmoe.patched(model, THRESHOLD):
        assert language_tasks(model, tokenizer, ["write"], **options)[0].metric == scores[0].metric == "exact_match"


def test_contexts_that_are_cut_are_counted(model, tokenizer, tmp_path, include):
    long = [(question * (9 if place == 1 else 1), *rest) for place, (question, *rest) in enumerate(QUESTIONS)]
    write_arc(tmp_path / "data", long)
    with pytest.warns(UserWarning, match="4 requests of choose are longer than what the model can read"):
        scores = language_tasks(model, tokenizer, ["choose"], data=tmp_path / "data", include=include)
    assert scores[0].truncated == 4


def test_examples_before_the_question(model, tokenizer, data, include):
    one = language_tasks(model, tokenizer, ["go_on"], data=data, include=include)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # with examples the tiny model's context is too short
        two = language_tasks(model, tokenizer, ["go_on"], data=data, include=include, num_fewshot=2)[0]
    assert (one.num_fewshot, two.num_fewshot) == (0, 2)
    assert one.value != two.value
    with pytest.raises(ValueError, match=r"takes its 1 examples from the split 'train', and .*challenge has none"):
        language_tasks(model, tokenizer, ["arc_challenge"], data=data, num_fewshot=1)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["arc_chalenge"], {}, "There is no task 'arc_chalenge'. Did you mean arc_challenge, "),
        ([], {}, "No task is named"),
        (["arc_challenge"], {"limit": 0}, "Choose limit >= 1"),
        (["arc_challenge"], {"num_fewshot": -1}, "num_fewshot=-1"),
        (["arc_challenge"], {}, r"the hub: Couldn't reach the Hub\. Give a folder that holds allenai/ai2_arc:ARC-Ch"),
        (["hellaswag"], {"data": True}, "nothing that stands for Rowan/hellaswag. It has: challenge"),
        (["squadv2"], {"data": True}, "squadv2 reads its data by code of its own"),
        (["humaneval"], {}, "humaneval runs code that the model writes"),
        (["mmmu_val_art"], {}, "is a task on images or sound"),
        (["arc_challenge"], {"include": True}, "is no folder with task files"),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_sentence(model, tokenizer, data, names, options, message):
    options = {name: data if value is True else value for name, value in options.items()}
    with pytest.raises(ValueError, match=message) as refused:
        language_tasks(model, tokenizer, names, **options)
    assert "\n" not in str(refused.value)


def test_data_of_another_configuration_split_or_shape_are_refused(model, tokenizer, tmp_path):
    folder = write_arc(tmp_path / "ai2_arc", hub="")
    with pytest.raises(ValueError, match=r"test.parquet would serve both allenai/ai2_arc:ARC-\w+ and"):
        find_language_tasks(["ai2_arc"], data=folder)
    (folder / "test.parquet").rename(folder / "train.parquet")
    with pytest.raises(ValueError, match=r"scored on the split 'test' of .* does not hold it. It has train"):
        find_language_tasks(["arc_easy"], data=folder)
    datasets.Dataset.from_list([{"text": "a"}]).to_parquet(folder / "test.parquet")
    with pytest.raises(ValueError, match="Give the files the columns that allenai/ai2_arc:ARC-Easy has on the hub"):
        language_tasks(model, tokenizer, ["arc_easy"], data=folder)


def test_a_data_set_as_it_lies_on_the_hub(tmp_path):
    """A folder a configuration; the files have the hub's names."""
    for name in ("ARC-Easy", "ARC-Challenge"):
        folder = write_arc(tmp_path / "ai2_arc" / name, hub="")
        (folder / "test.parquet").rename(folder / "test-00000-of-00001.parquet")
    for data in (tmp_path, tmp_path / "ai2_arc"):
        tasks, _ = find_language_tasks(["arc_challenge", "arc_easy"], data=data)
        assert [task.files["test"].parent.name for task in tasks] == ["ARC-Challenge", "ARC-Easy"]


# Many routers, kept

ROUTERS = {"own": None, "usmoe": usmoe.USMoE(), "mine": own_router, "threshold": THRESHOLD}


class StopError(Exception):
    pass


@pytest.fixture
def run(monkeypatch):
    """The names of the tasks that were run."""
    names, real = [], language_runs.task_scores

    def counted(scorer, task, *args, **options):
        names.append(task.name)
        return real(scorer, task, *args, **options)

    monkeypatch.setattr(language_runs, "task_scores", counted)
    return names


@pytest.fixture
def options(data, include):
    return {"data": data, "include": include, "limit": 3}


@pytest.fixture
def keep(tmp_path):
    return {"results": tmp_path / "results", "model_digest": "abc"}


def test_a_run_that_was_stopped_goes_on(model, tokenizer, options, keep, run):
    def stop(label, scores):
        if (scores[0].task, label) == ("choose", "mine"):
            raise StopError

    tasks = ["choose", "go_on"]
    with pytest.raises(StopError):
        compare_routers(model, tokenizer, ROUTERS, tasks, done=stop, **keep, **options)
    assert run == ["choose"] * 3
    assert len(list(keep["results"].rglob("*.json"))) == 3
    before = model(torch.arange(9).view(1, 9)).logits
    first = compare_routers(model, tokenizer, ROUTERS, tasks, **keep, **options)
    assert run == ["choose"] * 4 + ["go_on"] * 4
    assert torch.equal(model(torch.arange(9).view(1, 9)).logits, before)
    assert compare_routers(model, tokenizer, ROUTERS, tasks, **keep, **options) == first
    assert len(run) == 8
    assert compare_routers(model, tokenizer, ROUTERS, tasks, **options) == first
    with usmoe.patched(model, ROUTERS["usmoe"]):
        assert language_tasks(model, tokenizer, tasks, **options) == first["usmoe"]


def test_what_is_kept_answers_the_same_question_alone(model, tokenizer, options, keep, run, tmp_path):
    def runs(router=None, **changes):
        """How often the task is run, asked for twice."""
        run.clear()
        for _ in range(2):
            compare_routers(model, tokenizer, {"the same label": router}, ["go_on"], **(keep | options | changes))
        return len(run)

    assert runs() == 1
    for changes in ({"limit": 4}, {"scoring": "teacher-forced"}, {"model_digest": "abd"}, {"seed": 1}):
        assert runs(**changes) == 1
    for router in (usmoe.OwnChoice(k=2), usmoe.OwnChoice(k=1), own_router, [THRESHOLD, usmoe.OwnChoice()]):
        assert runs(router) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # with an example the tiny model's context is too short
        assert runs(num_fewshot=1) == 1
    assert runs() == 0
    for file in keep["results"].rglob("*.json"):
        file.write_text(file.read_text()[:-20])
    assert runs() == 1
    task = options["include"] / "go_on.yaml"
    task.write_text(task.read_text().replace("Answer:", "And:"))
    assert runs() == 1
    assert runs(data=write_arc(tmp_path / "other", QUESTIONS[::-1])) == 1

    def typed_in_a_shell(logits, valid, **given):
        return own_router(logits, valid, **given)

    typed_in_a_shell.__module__ = "__nowhere__"
    assert runs(typed_in_a_shell) == 2


def test_every_router_is_asked_the_same_questions(model, tokenizer, options):
    """With the same examples before them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        said = compare_routers(model, tokenizer, {"one": None, "two": None}, ["go_on"], num_fewshot=1, **options)
        other = compare_routers(model, tokenizer, {"one": None}, ["go_on"], num_fewshot=1, seed=3, **options)
    assert said["one"] == said["two"] != other["one"]


def test_what_cannot_be_compared_is_refused_before_anything_is_run(model, tokenizer, options, run, tmp_path):
    with pytest.raises(ValueError, match="Give model_digest, or leave results out"):
        compare_routers(model, tokenizer, ROUTERS, ["choose"], results=tmp_path, **options)
    for task, router, message in (("choose", usmoe.USMoE(k=9), "k=9"), ("write", usmoe.USMoE(), "write cannot be")):
        with pytest.raises(ValueError, match=message):
            compare_routers(model, tokenizer, {"own": None, "bad": router}, [task], **options)
    assert not run


def test_a_task_is_found_without_reading_them_all():
    for task in ("arc_challenge", "mmlu_abstract_algebra", "squadv2"):
        alone, among_all = language_data._declared(task), language_data._shipped()[task]
        assert (alone.name, alone.kind, alone.yaml_path) == (task, among_all.kind, among_all.yaml_path)
    assert language_data._declared("mmlu") is language_data._declared("ai2_arc") is None


def test_groups_and_tags_stand_for_their_tasks():
    assert [task.name for task in find_language_tasks(["ai2_arc"])[0]] == ["arc_challenge", "arc_easy"]
    tasks, groups = find_language_tasks(["mmlu", "mmlu_stem"])
    assert len(tasks) == 57
    parts = ["mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities"]
    assert [group.config.group for group in groups] == ["mmlu", *parts]
    assert len(groups[0].tasks) == 57 == sum(len(one.tasks) for one in groups[1:])
