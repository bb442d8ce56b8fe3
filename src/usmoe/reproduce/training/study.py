"""Tables 2, 12 and 14 and Figures 6 and 12b as settings: their rows, and what is to be said of them.

What the paper leaves open is decided here:

- EC without a score is expert choice by sigmoid, which section A.4.1 recommends.
- The large model is trained as the base one (Table 15 does not name it).
- "Corrupt": 4 % of the words of the test split are replaced by AAA; the paper states neither rate nor split.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch

from usmoe.reproduce.experiment import Scale
from usmoe.reproduce.given import digest_of
from usmoe.reproduce.training.runs import CORPORA, SMALL, SWEEP_STEPS, Run
from usmoe.routing.host import ROUTE
from usmoe.routing.router import Router, experts_per_token
from usmoe.routing.source import source_of
from usmoe.routing.text import ROUTERS, parse_router
from usmoe.train.config import TrainConfig
from usmoe.train.methods import METHODS, Method
from usmoe.train.presets import PRESETS

Text = Literal["clean", "corrupt"]
PAPER_CORPORA: dict[str, str] = {
    "enwik8": "Enwik8",
    "text8": "Text8",
    "wikitext103": "WikiText-103",
    "lm1b": "lm1b",
}
"""Ours -> as the paper writes it."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method in a table."""

    name: str
    """In names of folders, and behind --row: usmoe, token_choice-k4."""
    method: Method
    paper: str | None = None
    """The paper's column for it; None where it has none."""
    k: float | None = None
    """Experts a token in place of the method's own."""

    @property
    def label(self) -> str:
        """In a table."""
        return self.method.title if self.k is None else f"{self.method.title.removesuffix(' k=2')}, k={self.k:g}"

    def run(self, corpus: str, base: TrainConfig, seed: int) -> Run:
        """The model of this row that is trained on a corpus, from what all rows share."""
        return Run(corpus=corpus, row=self.name, config=self.method.apply(base, self.k).replace(seed=seed))


def named(method: str, paper: str | None = None, k: float | None = None) -> Row:
    """A row of a named method."""
    return Row(name=method if k is None else f"{method}-k{k:g}", method=METHODS[method], paper=paper, k=k)


def own(router: str, base: TrainConfig) -> Row:
    """A row of a router as typed; no balance loss.

    Its name has a digest of the router, and of its source where it is one's own, with the files of one's own that it
    imports: when one of them changes, it is another row, and other models.

    base  of the experiment. Raises ValueError for a router that cannot be had, or cannot route in its model
    """
    made = parse_router(router)
    said = str(made) if isinstance(made, Router) else router
    try:
        if isinstance(made, Router):
            made(torch.linspace(-1, 1, base.segment * base.model.num_experts).view(1, base.segment, -1))
        elif isinstance(k := getattr(made, "k", None), int | float):
            experts_per_token(k, ROUTE, base.model.num_experts)
    except ValueError as error:
        raise ValueError(f"--router {router}: {error}") from error
    found = None if type(made) in ROUTERS.values() else source_of(made, router)
    source = None if found is None else found.digest
    slug = re.sub(r"[^\w.]+", "-", said).strip("-")
    return Row(
        name=f"{slug}-{digest_of([said, source])}",
        method=Method(title=router, router=router, note="Without a balance loss."),
    )


@dataclass(frozen=True, kw_only=True)
class Study:
    """One experiment."""

    rows: tuple[Row, ...]
    texts: tuple[Text, ...]
    """On what the models are measured."""
    figures: str | None
    """Which table of the paper stands beside it."""
    corpora: tuple[str, ...] = tuple(CORPORA)
    """At small scale."""
    paper_corpora: tuple[str, ...] = tuple(PAPER_CORPORA)
    large: bool = False
    """Whether the paper's model is the large one."""
    steps: int = SMALL.steps
    """At small scale."""
    curves: tuple[str, ...] = ()
    """What of the log is drawn, step by step: bits | dropped."""
    says: tuple[str, ...] = ()
    """Sentences that belong under it."""

    def base(self, corpus: str, scale: Scale, steps: int | None) -> TrainConfig:
        """What all rows share on a corpus.

        steps  in place of the scale's own
        """
        if scale == "small":
            steps = steps or self.steps
            return SMALL.replace(corpus=CORPORA[corpus], steps=steps, warmup=min(SMALL.warmup, steps // 10))
        preset = PRESETS[f"{corpus}-large" if self.large else corpus]
        return preset if steps is None else preset.replace(steps=steps)

    def corpora_at(self, scale: Scale) -> tuple[str, ...]:
        return self.corpora if scale == "small" else self.paper_corpora


_NO_BALANCE = (
    "SMoE, XMoE and StableMoE have the balance loss (0.01) that the paper states and its released code switches off by "
    "accident; expert choice and USMoE have none."
)
_LEAK = (
    "Teacher-forced figures of look-ahead routers (expert choice, USMoE by sequence) are not those of an "
    "autoregressive model: later tokens have a say in earlier ones' experts. The honest figure routes each prefix anew."
)
_STABLE = (
    "EC softmax over tokens and EC sigmoid choose the same pairs at equal logits; they can differ by training alone."
)
_WEIGHTS = (
    "Methods differ in two things, who is chosen and how much a choice weighs: a token's weights sum to 1 in SMoE and "
    "XMoE, and to far less in USMoE. The two controls change the weights alone, and do not settle which of the two "
    "counts; multiplying USMoE's weights by 4, and nothing else, does: it then has SMoE's bits (LOG.md). What puts it "
    "behind is how much a choice weighs, not who is chosen."
)
_CANNOT_LEARN = (
    "What is ahead of SMoE at k = 1 is ahead of a gate that cannot learn: its softmax over one logit is 1 whatever the "
    "logit, so that no gradient of the text reaches it. That says nothing of one selection against another."
)
_EC = "expert_choice_sigmoid"
_ECS = (_EC, "expert_choice_softmax_tokens", "expert_choice_softmax_experts")

STUDIES: dict[str, Study] = {
    "table2": Study(
        rows=(
            named("usmoe", "USMoE k=2"),
            named("usmoe-1.5", "USMoE k=1.5"),
            named("token_choice", "TC k=2"),
            named(_EC, "EC k=2"),
        ),
        texts=("clean", "corrupt"),
        figures="table2",
        says=(_NO_BALANCE, _LEAK),
    ),
    "table12": Study(
        rows=tuple(
            named(method, paper, k)
            for k in (1, 2, 4, 8)
            for method, paper in (("token_choice", "TC"), (_EC, "EC"), ("usmoe", "USMoE"))
        ),
        texts=("clean",),
        figures="table12",
        corpora=("novels",),
        paper_corpora=("wikitext103", "lm1b"),
        large=True,
        steps=SWEEP_STEPS,
        says=(_LEAK, _CANNOT_LEARN),
    ),
    "table14": Study(
        rows=(
            named("usmoe", "USMoE k=2"),
            named("usmoe-1.5", "USMoE k=1.5"),
            named("usmoe_time_step", "USMoE k=2"),
            named("token_choice", "SMoE"),
            named("usmoe_chosen"),
            named("token_choice_scores"),
            named("smoe_dropout", "SMoE-DR"),
            named("xmoe", "XMoE"),
            named("stablemoe", "StableMoE"),
            named(_EC, "EC"),
            named("expert_choice_softmax_tokens"),
            named("expert_choice_softmax_experts"),
        ),
        texts=("clean", "corrupt"),
        figures="table14",
        says=(_NO_BALANCE, _LEAK, _STABLE, _WEIGHTS),
    ),
    "figure6": Study(
        rows=tuple(map(named, _ECS)),
        texts=("clean",),
        figures=None,
        paper_corpora=("enwik8",),
        curves=("bits", "dropped"),
        says=(
            "The paper says that the sigmoid has the better bits a character and the lower share of dropped tokens; it "
            "does not say over what its softmax goes, so that both are here.",
            _STABLE,
            _LEAK,
        ),
    ),
    "figure12 --part b": Study(
        rows=(named("token_choice"), named(_EC), named("usmoe")),
        texts=("clean",),
        figures=None,
        paper_corpora=("lm1b",),
        large=True,
        curves=("dropped",),
        says=("The paper says that USMoE drops fewer than a tenth of the tokens, throughout.",),
    ),
}
"""The experiments on training by name."""
