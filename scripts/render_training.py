"""Render the results of the experiments on training and fine-tuning in results/ into docs/training-results.md, and
their figures into docs/.

usmoe reproduce table14 --data DATA --results RESULTS      # and table2, table12, table13, figure6, figure12 --part b
cp RESULTS/*.json results/
python scripts/render_training.py
"""

from __future__ import annotations

from pathlib import Path

from usmoe.reproduce import EXPERIMENTS, kind_of, load, markdown
from usmoe.reproduce.experiment import SCALES, Experiment

ROOT = Path(__file__).parent.parent
KINDS = ("training", "finetuning")
ABOUT = (
    "Rendered by `python scripts/render_training.py` from `results/`; not edited by hand. A table is had by the "
    "command above it with `--data DIR`; it goes on where it was stopped, and tables share their trained models. The "
    "settings of the paper are `usmoe reproduce table15 --scale paper` and `table16`."
)


def main() -> None:
    (ROOT / "docs/training-results.md").write_text(page(ROOT / "results", ROOT / "docs"), encoding="utf-8")


def page(results: Path, pictures: Path) -> str:
    """The page of all results that are there; what is drawn is written to the folder of pictures."""
    parts = ["# Training: results", "", ABOUT, ""]
    for experiment in EXPERIMENTS.values():
        for scale in SCALES if experiment.kind in KINDS else ():
            found = experiment.paths(results, scale)
            for path in found:
                parts += section(experiment, path, pictures)
            if not found:
                parts += [f"## {experiment.name}, {scale} scale: not run", ""]
    return "\n".join(parts)


def section(experiment: Experiment, path: Path, pictures: Path) -> list[str]:
    """The tables of a result, and its picture where it has one."""
    result, kind = load(path), kind_of(experiment)
    try:
        kind.refuse_picture(experiment)
    except ValueError:
        return [markdown(result)]
    picture = f"{path.stem}.png"
    kind.plot(result, pictures / picture)
    return [markdown(result), f"![{experiment.title}]({picture})", ""]


if __name__ == "__main__":
    main()
