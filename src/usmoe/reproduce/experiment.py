"""Every table and figure of the paper as a named experiment, built or not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Scale = Literal["small", "paper"]
SCALES: tuple[Scale, ...] = ("small", "paper")
KindName = Literal["embeddings", "training", "finetuning", "settings"]

_VISION = "training on images"
_TUNING = "supervised fine-tuning"
_MAPS = "analysis of pretrained models"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One table or figure of the paper."""

    name: str
    """As typed behind `usmoe reproduce`: table5, figure12 --part a."""
    title: str
    shows: str
    """What can be read from it, in a sentence."""
    kind: KindName | None = None
    """What is run (usmoe.reproduce.kind); None where it is not built yet."""
    waits_for: str | None = None
    """What it comes with, where it is not built yet."""

    def __post_init__(self) -> None:
        if bool(self.kind) == bool(self.waits_for):
            raise ValueError(f"{self.name} has kind={self.kind} and waits_for={self.waits_for!r}. Give one of them.")

    @property
    def built(self) -> bool:
        """Whether it can be run."""
        return self.kind is not None

    @property
    def scales(self) -> tuple[Scale, ...]:
        """At which it can be run; none where it is not built yet."""
        return SCALES if self.built else ()

    @property
    def slug(self) -> str:
        """The name in names of files: table5, figure12-a."""
        return self.name.replace(" --part ", "-")

    def path(self, folder: Path, scale: Scale) -> Path:
        """Where its result lies in a folder of results."""
        return folder / f"{self.slug}-{scale}.json"

    def paths(self, folder: Path, scale: Scale) -> list[Path]:
        """The results that lie in a folder: that of the experiment as it is, then those of options, by name."""
        path = self.path(folder, scale)
        others = sorted(folder.glob(f"{path.stem}-{'[0-9a-f]' * 8}{path.suffix}"))
        return [one for one in (path, *others) if one.is_file()]

    def scales_run(self, folders: Iterable[Path]) -> tuple[Scale, ...]:
        """The scales of which one of the folders holds a result."""
        folders = tuple(folders)
        return tuple(scale for scale in self.scales if any(self.path(folder, scale).is_file() for folder in folders))

    def with_options(self, folders: Iterable[Path]) -> int:
        """How many results of options lie in the folders, of all scales."""
        found = [
            path != self.path(folder, scale)
            for folder in folders
            for scale in self.scales
            for path in self.paths(folder, scale)
        ]
        return sum(found)


def _built(name: str, title: str, shows: str, kind: KindName = "embeddings") -> Experiment:
    return Experiment(name=name, title=title, shows=shows, kind=kind)


def _later(name: str, title: str, shows: str, waits_for: str) -> Experiment:
    return Experiment(name=name, title=title, shows=shows, waits_for=waits_for)


_ALL = (
    _later("table1", "benefits by method", "what each rule promises: load, leak, dropping, collapse", _MAPS),
    _built("table2", "pre-training, clean and corrupted text", "which rule learns best, also from noise", "training"),
    _later("table3", "images: accuracy of two sizes", "which rule learns best from images", _VISION),
    _later("table4", "images under attack", "which rule withstands attacks", _VISION),
    _built("table5", "MTEB with PromptEOL, by task type", "which embedding is best, with a prompt"),
    _built("table6", "MTEB without prompts, by task type", "which embedding is best, without a prompt"),
    _built("table7", "MTEB by data set: OLMoE-1B-7B", "Tables 5 and 6, data set by data set"),
    _built("table8", "MTEB by data set: Qwen1.5-MoE-A2.7B", "Tables 5 and 6, data set by data set"),
    _built("table9", "MTEB by data set: DeepSeekMoE-16B", "Tables 5 and 6, data set by data set"),
    _built("table10", "a pool of a sequence or of a batch", "whether sequences should compete with one another"),
    _built("table11", "the share alpha of the expert score", "what the expert score adds"),
    _built("table12", "pre-training of large models", "whether the order stays at 420M parameters", "training"),
    _built("table13", "fine-tuning for classification", "what pre-training by each rule is worth", "finetuning"),
    _built("table14", "pre-training against five baselines", "Table 2 against more token-choice rules", "training"),
    _built("table15", "settings of pre-training", "the presets of Tables 2, 12 and 14", "settings"),
    _built("table16", "settings of fine-tuning", "the presets of Table 13", "settings"),
    _later("figure1", "images: patches coloured by expert", "what each rule tells apart in an image", _VISION),
    _later("figure2", "drawing of the three selections", "nothing measured; `usmoe route` draws it", _MAPS),
    _built("figure3", "unified score, softmax and sigmoid on MTEB", "which score does best, with and without prompts"),
    _built("figure4", "MTEB without prompts: gain over token choice", "Table 6 as a picture"),
    _later("figure5", "supervised fine-tuning, clean and corrupted", "perplexity step by step", _TUNING),
    _built("figure6", "expert choice by sigmoid and by softmax", "bits a character, and dropped tokens", "training"),
    _built("figure7", "MTEB with PromptEOL: gain over token choice", "Table 5 as a picture"),
    _built("figure8", "spread over runs and over tasks", "how far figures vary from run to run, task to task"),
    _later("figure9", "router map: token choice", "which token goes to which expert, layer by layer", _MAPS),
    _later("figure10", "router map: expert choice", "which token goes to which expert, layer by layer", _MAPS),
    _later("figure11", "router map: USMoE", "which token goes to which expert, layer by layer", _MAPS),
    _later("figure12 --part a", "experts a sequence", "how many experts a sequence meets", _MAPS),
    _built("figure12 --part b", "dropped tokens in pre-training", "how many tokens get no expert", "training"),
)

EXPERIMENTS: dict[str, Experiment] = {one.name: one for one in _ALL}
"""Every table and figure by its name as typed, in the paper's order: tables, then figures."""


def find(name: str, part: str | None = None) -> Experiment:
    """The experiment of that name, and of that part where it has parts.

    Raises ValueError for a name that is unknown (with the nearest), and for a part that is missing or is not there.
    """
    typed = name.strip().lower()
    whole = typed if part is None else f"{typed} --part {part.strip().lower()}"
    if whole in EXPERIMENTS:
        return EXPERIMENTS[whole]
    parts = [one for one in EXPERIMENTS if one.startswith(f"{typed} --part ")]
    if parts:
        raise ValueError(f"{typed} has parts of its own. Ask for {' or for '.join(parts)}.")
    if typed in EXPERIMENTS:
        raise ValueError(f"{typed} has no parts that run alone. Leave --part {part} out.")
    near = difflib.get_close_matches(typed, dict.fromkeys(one.split()[0] for one in EXPERIMENTS), 3)
    raise ValueError(
        f"There is no experiment {name!r}."
        + (f" Did you mean {' or '.join(near)}?" if near else "")
        + " Known: table1 to table16, figure1 to figure12; `usmoe reproduce --list` shows them."
    )
