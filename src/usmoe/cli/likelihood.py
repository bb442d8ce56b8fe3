"""`usmoe eval RUN`: how well a model that `usmoe train` made predicts a text, every way it is read side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usmoe.cli import options
from usmoe.reproduce.view import View

if TYPE_CHECKING:
    from usmoe.data.array import Tokens
    from usmoe.data.corpus import Corpus
    from usmoe.data.prepare import Prepared
    from usmoe.report.estimate import Honest
    from usmoe.train.config import Evaluation
    from usmoe.train.figures import Figures, Measured
    from usmoe.train.folder import Trained

_PARTS = ("vocabulary.json", "best.safetensors", "last.safetensors", "checkpoint.pt", "log.jsonl")


def is_run(folder: Path) -> bool:
    """Whether a folder holds anything that only a run of `usmoe train` or `usmoe finetune` leaves."""
    return any((folder / name).is_file() for name in _PARTS)


def figures_of_run(
    folder: Path,
    *,
    text: Path | None,
    split: str,
    positions: int,
    k: float | None,
    tokens: int | None,
    segment: int | None,
    memory: int | None,
    routers: Sequence[str],
    edited: bool,
    data: Path | None,
    cache: Path,
    seed: int,
    device: str,
    dtype: str,
    offline: bool,
) -> Figures:
    """The figures of a run's best model on a split of its corpus, or on another text.

    k        experts a token to serve by a threshold at, beside the model's own; found on the validation split
    tokens   of the split, from its beginning; None: all
    segment  tokens predicted at once, and memory: tokens remembered; None: as the run's configuration says
    routers  as text, beside "own", by which the model is always read
    edited   read it although the source of its router of one's own was edited, and say so
    cache    where training prepared the corpus
    dtype    other than float32: of the matrices' products, by autocast, as a run of that precision was trained

    Raises ValueError where the folder holds no run, where the text is missing or cannot be read by the model's
    vocabulary, and for a router or a k that the model cannot have.
    """
    from usmoe.data.vocabulary import share_unknown
    from usmoe.routing.text import parse_router
    from usmoe.train.evaluation import evaluate_model
    from usmoe.train.figures import Serving
    from usmoe.train.folder import load_run

    learned = _text_of(folder)
    _refuse_dtype(dtype)
    files = [one for one in routers if one.endswith(".json")]
    if files:
        raise ValueError(f"{files[0]} names layers of a pretrained model, which a run has not. Name a router.")
    under = {one: parse_router(one) for one in routers if one != "own"}
    trained = load_run(folder, device=device, edited=edited, tell=options.tell)
    _refuse_k(trained, k)
    setting = _setting(trained.config.evaluation, tokens, segment, memory)
    _refuse_split(split)
    served = [Serving(how="threshold"), Serving(how="prefix")]
    wanted = {split} if text is None else set()
    if k is not None:
        served.append(Serving(how="threshold", k=k, calibrated=True))
        wanted.add("validation")
    given = _corpus(folder, trained, learned, cache, data, offline) if wanted else None
    read = _tokens_of(text, trained) if text is not None or given is None else given.tokens[split]
    read_until = read if setting.tokens is None else read[: setting.tokens]
    if not len(read):
        raise ValueError(f"{text or split} holds no text. Give some.")
    unknown = share_unknown(trained.vocabulary, read_until)
    if unknown == 1:
        raise ValueError(
            f"Every token of {text or split} is unknown to the model, whose vocabulary is of another text. Give one "
            "that it can read."
        )
    with _precision(device, dtype):
        figures = evaluate_model(
            trained,
            read,
            setting,
            positions=positions,
            served=served,
            calibration=None if k is None or given is None else given.validation[: trained.config.evaluation.tokens],
            under=under,
            seed=seed,
            progress=True,
        )
    for sentence in _off_budget(figures):
        sys.stderr.write(f"{sentence}\n")
    name = f"{text}" if text is not None else _name_of(trained.config.corpus, split)
    return dataclasses.replace(figures, text=name, unknown=unknown)


def _off_budget(figures: Figures) -> list[str]:
    """A sentence for each reading that spends more or fewer experts a token than asked for, by more than a tenth."""
    readings = {"Teacher-forced": figures.forced}
    readings |= {f"Served by {name}": one for name, one in figures.served.items()}
    readings |= {f"Under {name}": one.forced for name, one in figures.under.items()}
    return [
        f"{name}: {one.experts:.2f} experts a token are spent, and {one.asked:g} are asked for. Thresholds that spend "
        f"them on the validation split: --serve-k {one.asked:g}."
        for name, one in readings.items()
        if one.off_budget
    ]


def _name_of(corpus: Corpus, split: str) -> str:
    """A split and its corruption: enwik8, test, 4 % of the words replaced by AAA."""
    words = f"{corpus.source}, {split}"
    if corpus.corrupt_mode is None or split not in corpus.corrupt_splits:
        return words
    how = {"replace": "replaced by AAA", "insert": "with AAA before them"}[corpus.corrupt_mode]
    return f"{words}, {100 * corpus.corrupt_rate:g} % of the words {how}"


def _text_of(folder: Path) -> str | None:
    """The digest of the prepared text that a run was trained on; None where an earlier version wrote none.

    Raises ValueError, naming the file, for a run of `usmoe finetune`, and for one that is not whole."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing, without which {folder} is no run. Give the folder of a whole one.")
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}). Give the folder of a run that is whole.") from error
    if isinstance(said, dict) and "start" in said:
        raise ValueError(
            f"{path} is of a run of usmoe finetune, whose figures usmoe finetune itself gives. Give the folder of a "
            "run of usmoe train."
        )
    if not isinstance(said, dict) or "corpus" not in said:
        raise ValueError(f"{path} holds no configuration of usmoe train. Give the folder of a run that is whole.")
    if not (folder / "vocabulary.json").is_file():
        raise ValueError(
            f"{folder / 'vocabulary.json'} is missing, without which no text can be read. Put it back, or give another "
            "run."
        )
    return said.get("text")


def _refuse_dtype(dtype: str) -> None:
    from usmoe.hf.load import DTYPES

    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown. Choose one of: {', '.join(DTYPES)}.")


def _refuse_k(trained: Trained, k: float | None) -> None:
    experts = trained.model.config.num_experts
    if k is not None and not experts:
        raise ValueError(f"--serve-k {k:g} is of experts, and the model has none. Leave it out.")
    if k is not None and not 0 < k <= experts:
        raise ValueError(f"--serve-k {k:g} is impossible with {experts} experts. Choose 0 < k <= {experts}.")


def _setting(own: Evaluation, tokens: int | None, segment: int | None, memory: int | None) -> Evaluation:
    changes = {"segment": segment, "memory": memory}
    return dataclasses.replace(
        own, tokens=tokens, **{name: value for name, value in changes.items() if value is not None}
    )


def _refuse_split(split: str) -> None:
    from usmoe.data.corpus import SPLITS

    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}. Choose from {', '.join(SPLITS)}.")


def _corpus(
    folder: Path, trained: Trained, learned: str | None, cache: Path, data: Path | None, offline: bool
) -> Prepared:
    """The run's own corpus, as training prepared it; made again only where it is not in the cache.

    Raises ValueError where it is not to be had, and where its vocabulary is another one than the run's."""
    from usmoe.data.prepare import prepare, prepared_before

    own = trained.config.corpus
    found = None if data is not None or learned is None else prepared_before(own, cache, learned)
    if found is None:
        if data is None and not own.name and not Path(own.source).exists():
            raise ValueError(
                f"What {folder} was trained on, {own.source}, is not here, and not in {cache} as it was prepared. Give "
                "the folder that holds it (--data DIR), the cache of the training (--cache DIR), or another text "
                "(--text FILE)."
            )
        found = prepare(own, cache, data=data, offline=offline)
    if found.vocabulary != trained.vocabulary:
        raise ValueError(
            f"{found.source}: its vocabulary is not that of {folder}, so that it is not the text that the run was "
            "trained on. Give that one (--data DIR), or read this one as another text (--text FILE)."
        )
    if learned is not None and found.digest != learned:
        sys.stderr.write(f"{found.source}: not the very text that {folder} was trained on. The figures are of this.\n")
    return found


def _tokens_of(text: Path | None, trained: Trained) -> Tokens:
    """Of a file as training reads one (.gz, .zip and .parquet too), or of stdin for "-": any bytes, or UTF-8 where a
    token is more than a byte."""
    from usmoe.data.text import FilePart, Text, decoded

    bytewise = trained.vocabulary.level == "byte"
    if str(text) == "-":
        return trained.vocabulary.encode(sys.stdin.buffer.read() if bytewise else options.read_text("-"))
    if text is None or not text.is_file():
        raise ValueError(f"There is no file {text}. Give one to read, or - for stdin.")
    whole = Text(parts=(FilePart(text),))
    return trained.vocabulary.encode(b"".join(whole.blocks()) if bytewise else "".join(decoded(whole)))


def _precision(device: str, dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast, or nothing for float32."""
    import torch

    from usmoe.hf.load import DTYPES

    kind = torch.device(device).type
    return contextlib.nullcontext() if dtype == "float32" else torch.autocast(kind, DTYPES[dtype])


def view_of(figures: Figures, folder: Path, dtype: str = "float32") -> View:
    """A table: one row a way to read the text."""
    unit = {"character": "bits a character", "byte": "bits a byte", "word": "perplexity a word"}[figures.unit]
    rows = [_row("teacher-forced", figures, figures.forced), _honest_row("honest", figures, figures.honest)]
    for name, one in (("memory reset", figures.reset), ("batch of one", figures.alone)):
        if one is not None:
            rows.append(_row(name, figures, one))
    rows += [_row(f"served by {name}", figures, one) for name, one in figures.served.items()]
    for name, read in figures.under.items():
        rows += [_row(name, figures, read.forced), _honest_row(f"{name}, honest", figures, read.honest)]
    setting = figures.setting
    says = [
        f"{figures.text}: {figures.tokens:,} tokens.",
        f"{', '.join(figures.routers) or 'dense'}; step {figures.step} of {folder}.",
        f"Read in segments of {setting.segment} after {setting.memory} remembered tokens, in {dtype}.",
    ]
    if figures.unknown:
        says.append(f"{100 * figures.unknown:.1f} % of the tokens are unknown to the model's vocabulary.")
    sampled = max(one.positions for one in (figures.honest, *(read.honest for read in figures.under.values())))
    if sampled:
        says.append(f"Honest: each token from those before it alone, {sampled} positions.")
        if dtype != "float32":
            says.append(f"{dtype} rounds, which alone moves the honest figure: read it in float32 to see by how much.")
    if figures.routers and not figures.honest.positions:
        says.append("The router looks neither ahead nor across the batch: teacher-forced is honest.")
    says += [f"Not served by {name}: {why}" for name, why in figures.unserved.items()]
    head = ("", unit, "experts\na token", "dropped", "load CV", "MFLOPs\na token", "of two\nexperts")
    return View(title=f"{folder}", head=head, labels=1, rows=tuple(rows), bold=(), says=tuple(says))


def _row(name: str, figures: Figures, one: Measured) -> tuple[str, ...]:
    routed = (one.experts, one.dropped, one.load_cv)
    words = ["" if value is None else f"{value:.3f}" for value in routed]
    share = "" if one.relative is None else f"{one.relative:.3f}"
    return (name, f"{figures.stated(one.nats):.4f}", *words, f"{one.flops / 1e6:.3f}", share)


def _honest_row(name: str, figures: Figures, one: Honest) -> tuple[str, ...]:
    low, high = (figures.stated(one.nats + sign * one.interval) for sign in (-1, 1))
    within = f" ± {(high - low) / 2:.4f}" if one.positions else ""
    return (name, f"{figures.stated(one.nats):.4f}{within}", "", "", "", "", "")
