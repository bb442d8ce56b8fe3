"""The experiments on sentence embeddings (Tables 5 to 11, Figures 3, 4, 7 and 8) as settings.

What the paper leaves open is decided here, and said in the sentences that are printed under each table:

- A row "None" is, at paper scale, instruction and text in quotation marks, as the released code has it unless
  --no_instruction is given; the instruction stands within PromptEOL, too. At small scale "None" is the text as it is,
  and PromptEOL has no instruction.
- Router embeddings and MoEE are standardised by a named sample, where MoEE and the released code take the mini-batch,
  by which an embedding would depend on its neighbours.
- DeepSeekMoE's router embedding holds probabilities, the other models' logits, as in MoEE.
- k is the model's own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from usmoe.reproduce.experiment import Scale

if TYPE_CHECKING:
    from usmoe.evaluate.setting import Setting

Prompt = Literal["None", "Prompt"]
STANDARDIZED_BY = "novels"
"""The sample that ships with usmoe (usmoe.embed.standardize)."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A pretrained model of the paper."""

    hub: str
    paper: str
    """The paper's name for it."""
    parameters: float
    features: Literal["logits", "probabilities"] = "logits"
    """What MoEE takes for its router embedding."""

    @property
    def bytes(self) -> float:
        """Of the download: two a parameter, in bfloat16."""
        return 2 * self.parameters


OLMOE = Checkpoint(hub="allenai/OLMoE-1B-7B-0924", paper="OLMoE-1B-7B", parameters=6.92e9)
QWEN = Checkpoint(hub="Qwen/Qwen1.5-MoE-A2.7B", paper="Qwen1.5-MoE-A2.7B", parameters=14.3e9)
DEEPSEEK = Checkpoint(
    hub="deepseek-ai/deepseek-moe-16b-base", paper="DeepSeekMoE-16B", parameters=16.4e9, features="probabilities"
)
CHECKPOINTS: dict[str, Checkpoint] = {one.hub: one for one in (OLMOE, QWEN, DEEPSEEK)}
"""The paper's models by their names on the hub."""

TASKS: dict[str, tuple[str, str]] = {
    "EmotionClassification": ("Classification", "Emotion"),
    "ToxicConversationsClassification": ("Classification", "Toxic"),
    "TweetSentimentExtractionClassification": ("Classification", "Tweet"),
    "MedrxivClusteringS2S": ("Clustering", "Medrxiv"),
    "TwentyNewsgroupsClustering": ("Clustering", "20Groups"),
    "TwitterSemEval2015": ("PairClassification", "SemEval"),
    "TwitterURLCorpus": ("PairClassification", "URLCorpus"),
    "AskUbuntuDupQuestions": ("Reranking", "Ask"),
    "SciDocsRR": ("Reranking", "SciDocs"),
    "StackOverflowDupQuestions": ("Reranking", "StackOver"),
    "BIOSSES": ("STS", "Biosses"),
    "SICK-R": ("STS", "SickR"),
    "STS12": ("STS", "STS12"),
    "STS13": ("STS", "STS13"),
    "STS14": ("STS", "STS14"),
    "STS15": ("STS", "STS15"),
    "STS16": ("STS", "STS16"),
    "STSBenchmark": ("STS", "STSBen"),
    "SummEval": ("Summarization", "Medrxiv"),
}
"""mteb's name -> the type of task and the paper's name, in the order of Tables 7 to 9."""

CLASSIFICATION = tuple(name for name, (kind, _) in TASKS.items() if kind == "Classification")


@dataclass(frozen=True, kw_only=True)
class Method:
    """One column of a table."""

    label: str
    """What we call it."""
    paper: str | None
    """The paper's column that stands beside it; None where it has none."""
    router: str = "own"
    """As typed, without a k: the model's own."""
    embedding: Literal["hidden", "router", "moee"] = "hidden"


@dataclass(frozen=True, kw_only=True)
class Study:
    """One experiment: its columns, its rows, and what is to be said of them."""

    methods: tuple[Method, ...]
    prompts: tuple[Prompt, ...]
    """The paper's "setting"."""
    rows: Literal["type", "task"]
    """A row a type of task, with an average, or a row a task."""
    models: tuple[Checkpoint, ...]
    """At paper scale."""
    tasks: tuple[str, ...] = tuple(TASKS)
    figures: str | None = None
    """Which table of the paper holds its means by type; None: those of Tables 7 to 9 are taken."""
    pictured: bool = False
    """Whether there is something to draw."""
    spread: bool = False
    """Whether the spread over tasks is shown, too."""
    says: tuple[str, ...] = ()
    """Sentences that belong under it."""


UNIFIED = "usmoe(alpha=0.5)"
ROUTER = Method(label="Router", paper="Router", embedding="router")
TOKEN = Method(label="TC", paper="TC")
EXPERT = Method(label="EC", paper="EC", router="expert_choice")
MOEE = Method(label="MoEE", paper="MoEE", embedding="moee")
USMOE_HIDDEN = Method(label="USMoE hidden", paper="USMoE", router=UNIFIED)
USMOE_MOEE = Method(label="USMoE MoEE", paper="USMoE", router=UNIFIED, embedding="moee")

_TWO_RECIPES = (
    "The paper's one USMoE column stands beside two of ours, because the paper mixes two recipes: Tables 10 and 11 can "
    "be had from hidden states under USMoE, and Tables 5 to 9 cannot come from the same. USMoE hidden is the first, "
    "USMoE MoEE (hidden states and router logits, both under USMoE) our guess at the second."
)
_COLUMNS = (
    "Router: what the model's own routers say. TC: hidden states, the model's own choice. EC: hidden states, expert "
    "choice by sigmoid in each sequence. MoEE: both, the model's own choice. USMoE: alpha = 0.5, scaled sigmoid, "
    "the pool a sequence, padding left out. All with the model's own k."
)
_SIX = (ROUTER, TOKEN, EXPERT, MOEE, USMOE_HIDDEN, USMOE_MOEE)
_THREE = (OLMOE, QWEN, DEEPSEEK)
_BOTH: tuple[Prompt, ...] = ("None", "Prompt")
_GAIN = (TOKEN, EXPERT, USMOE_HIDDEN, USMOE_MOEE)
_ALPHAS = tuple(
    Method(label=f"alpha {name}", paper=name, router=f"usmoe(alpha={name})")
    for name in ("0.0", "0.3", "0.5", "0.7", "0.9", "1.0")
)


def _by_data_set(model: Checkpoint) -> Study:
    return Study(methods=_SIX, prompts=_BOTH, rows="task", models=(model,), says=(_COLUMNS, _TWO_RECIPES))


STUDIES: dict[str, Study] = {
    "table5": Study(
        methods=_SIX, prompts=("Prompt",), rows="type", models=_THREE, figures="table5", says=(_COLUMNS, _TWO_RECIPES)
    ),
    "table6": Study(
        methods=_SIX, prompts=("None",), rows="type", models=_THREE, figures="table6", says=(_COLUMNS, _TWO_RECIPES)
    ),
    "table7": _by_data_set(OLMOE),
    "table8": _by_data_set(QWEN),
    "table9": _by_data_set(DEEPSEEK),
    "table10": Study(
        methods=(
            TOKEN,
            EXPERT,
            Method(label="USMoE sequence", paper="USMoE-Sequence", router=UNIFIED),
            Method(label="USMoE batch", paper="USMoE-Batch", router="usmoe(alpha=0.5, pool=batch)"),
            Method(
                label="sequence, as released",
                paper="USMoE-Sequence",
                router="usmoe(alpha=0.5, mask_padding=False)",
            ),
            Method(
                label="batch, as released",
                paper="USMoE-Batch",
                router="usmoe(alpha=0.5, pool=batch, mask_padding=False)",
            ),
        ),
        prompts=("None",),
        rows="task",
        models=(DEEPSEEK,),
        tasks=CLASSIFICATION,
        says=(
            "As released: padding competes for experts and adds to the budget (mask_padding=False), so a text's "
            "embedding depends on how long its batch-mates are. Texts are sorted by length here, so there is less "
            "padding than in the released code's batches. With a pool of the batch an embedding depends on its "
            "batch-mates' words, too, and on the size of the batch.",
        ),
    ),
    "table11": Study(
        methods=(TOKEN, *_ALPHAS, EXPERT),
        prompts=("None",),
        rows="task",
        models=(DEEPSEEK,),
        tasks=CLASSIFICATION,
        says=(
            "alpha = 0 is not token choice and alpha = 1 is not expert choice: the pool still has no quota for a token "
            "or an expert. The paper prints the token-choice and expert-choice figures of Table 10 in those two "
            "columns.",
        ),
    ),
    "figure3": Study(
        methods=(
            Method(label="softmax", paper=None, router="usmoe(alpha=0.0)"),
            Method(label="sigmoid", paper=None, router="usmoe(alpha=1.0, expert_score=sigmoid)"),
            Method(label="unified", paper=None, router=UNIFIED),
        ),
        prompts=_BOTH,
        rows="type",
        models=_THREE,
        pictured=True,
        says=(
            "One mechanism, three scores: the best pairs of a sequence, ranked and weighed by the softmax over a "
            "token's experts, by the plain sigmoid, or by the unified score with alpha = 0.5 (half softmax, half "
            "2*sigmoid/E). The paper's caption calls the first TC and the second EC without naming the mechanism; with "
            "quotas for tokens or experts they are the columns TC and EC of Tables 5 to 9.",
        ),
    ),
    "figure4": Study(
        methods=_GAIN,
        prompts=("None",),
        rows="type",
        models=_THREE,
        figures="figure4",
        pictured=True,
        says=(_TWO_RECIPES,),
    ),
    "figure7": Study(
        methods=_GAIN,
        prompts=("Prompt",),
        rows="type",
        models=_THREE,
        figures="figure7",
        pictured=True,
        says=(_TWO_RECIPES,),
    ),
    "figure8": Study(
        methods=_SIX,
        prompts=_BOTH,
        rows="type",
        models=_THREE,
        pictured=True,
        spread=True,
        says=(
            "Deviations are over mteb's ten draws of training samples of a classification task (or the sets of a "
            "clustering). The model does the same in all of them, so they say nothing of other seeds of training.",
            _TWO_RECIPES,
        ),
    ),
}
"""The experiments on embeddings by name."""


def one_run(name: str) -> tuple[str, ...]:
    """The experiments that are one run where another model stands in for the paper's, as at small scale: they differ in
    the paper's models alone. Of table8: table7, table8, table9."""
    alike = dataclasses.replace(STUDIES[name], models=())
    return tuple(other for other, study in STUDIES.items() if dataclasses.replace(study, models=()) == alike)


def setting_of(method: Method, prompt: Prompt, scale: Scale, features: str = "logits") -> Setting:
    """The setting of one column: see the top of this file.

    features  what the router embedding holds, where there is one
    """
    from usmoe.evaluate.setting import Setting

    of_routers = method.embedding != "hidden"
    released = scale == "paper"
    return Setting(
        router=method.router,
        embedding=method.embedding,
        prompt="prompteol" if prompt == "Prompt" else "quoted" if released else "none",
        instruction=released,
        features="probabilities" if of_routers and features == "probabilities" else "logits",
        standardize=STANDARDIZED_BY if of_routers else None,
    )
