"""A file of texts becomes a file of vectors, chunk by chunk; a run that was interrupted is gone on with."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from usmoe.embed.part import Done, Part
from usmoe.embed.rows import texts_of
from usmoe.embed.writers import writer_of

if TYPE_CHECKING:
    from usmoe.embed.encoder import Encoder

BATCHES = 32
"""Batches in a chunk, for each process: texts are sorted by length within a chunk, and a chunk is what is lost at most
when a run is killed."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """What is in a file of vectors, and how it came there."""

    output: Path
    rows: int
    dimension: int
    """D: length of a vector."""
    empty: int
    """Texts without a visible character; each has a row, as any other."""
    cut: int
    """Texts that were longer than the model reads: their ends were left out."""
    kept: int
    """Rows that an earlier run had done."""
    seconds: float
    """Of this run, without loading the model."""
    settings: dict[str, Any]
    """All that the vectors depend on."""


def embed_file(
    encoder: Encoder,
    source: str | Path,
    output: str | Path,
    *,
    column: str | None = None,
    instruction: str | None = None,
    batch_size: int = 32,
    processes: int = 1,
    force: bool = False,
    progress: bool = True,
) -> Written:
    """Write one vector a text into a file: row i is the text i, counted from 0, be it empty or not.

    source, column  as in usmoe.embed.rows.texts_of: a text a line, .jsonl, .parquet, or - for stdin. A file is read
                    through before the work begins, so that what is wrong with its last line is said at once
    output          .npy: (n, D) in float32. .parquet and .jsonl: `row` and `embedding`
    instruction, batch_size, processes, progress   as in Encoder.encode; processes are started once
    force           overwrite the output, and begin anew what cannot be gone on with (from stdin: in any case)

    In memory is one chunk: BATCHES batches a process. Until all is done the vectors lie in OUTPUT.part, 4 bytes a
    number, and OUTPUT.part.json says what they are. Whatever stops a run, the same call goes on after the last whole
    chunk, given the same texts up to there; texts behind may have changed. Where vectors depend on their text alone,
    another batch size and another number of processes may go on, too.

    Raises ValueError where output or input are not as they should be, where other settings or other texts were begun
    with, and for a vector that is not finite.
    """
    begun = time.perf_counter()
    source, output = str(source), Path(output)
    write = writer_of(output)
    if output.exists() and not force:
        raise ValueError(f"{output} is already there. Give --force to overwrite it, or another --output.")
    options: dict[str, Any] = {"batch_size": batch_size, "instruction": instruction, "progress": False}
    dimension = encoder.encode([], processes=processes, **options).shape[1]  # refuses options, too
    settings = _settings(encoder, instruction, batch_size, processes)
    with Part(output, settings, dimension, force=force, anew=force and source == "-") as part:
        total = None if source == "-" else _count(texts_of(source, column), encoder, instruction)
        texts, digest = _rest(part, source, column, force)
        kept = part.done.rows
        bar = tqdm(total=total, initial=kept, desc="encoding", unit="text", disable=None if progress else True)
        try:
            with bar, encoder.working(processes):
                while chunk := list(islice(texts, BATCHES * batch_size * processes)):
                    features = encoder.features(chunk, **options)
                    _append(part, chunk, encoder.combine(features), features.cut, digest)
                    bar.update(len(chunk))
            part.finish(write, progress)
        except BaseException as error:
            if part.done.rows:
                error.add_note(f"{part.done.rows:,} rows are kept: the same command goes on from there.")
            raise
    return Written(
        output=output,
        rows=part.done.rows,
        dimension=dimension,
        empty=part.done.empty,
        cut=part.done.cut,
        kept=kept,
        seconds=time.perf_counter() - begun,
        settings=settings,
    )


def _settings(encoder: Encoder, instruction: str | None, batch_size: int, processes: int) -> dict[str, Any]:
    """All that the vectors depend on beside the texts."""
    from usmoe.embed.digest import digest

    settings = encoder.about() | {"instruction": instruction, "model": digest(encoder.model, encoder.tokenizer)}
    if encoder.statistics is not None:
        settings["statistics"] = encoder.statistics.digest[:16]
    return settings if encoder.text_alone else settings | {"batch_size": batch_size, "processes": processes}


def _count(texts: Iterable[str], encoder: Encoder, instruction: str | None) -> int:
    """How many there are. What the encoder has against an empty one, it says now."""
    total, empty = 0, 0
    for text in texts:
        total += 1
        empty += not text
    if empty:
        encoder.features([""], progress=False, instruction=instruction)
    return total


def _rest(part: Part, source: str, column: str | None, force: bool) -> tuple[Iterator[str], Any]:
    """The texts that are still to be done, and the digest of those before them."""
    texts = texts_of(source, column)
    digest = hashlib.sha256()
    _digest(digest, islice(texts, part.done.rows))
    if digest.hexdigest() == part.done.digest:
        return texts, digest
    if not force:
        raise ValueError(
            f"{part.path} was begun with other texts: the first {part.done.rows:,} of {source} are not the same. Give "
            "--force to begin anew, or another --output."
        )
    part.begin()
    return texts_of(source, column), hashlib.sha256()


def _digest(digest: Any, texts: Iterable[str]) -> None:
    for text in texts:
        raw = text.encode()
        digest.update(len(raw).to_bytes(8) + raw)


def _append(part: Part, texts: Sequence[str], vectors: np.ndarray, cut: Any, digest: Any) -> None:
    """Add the vectors of texts (m, D); digest: of all texts before them, and then of these, too."""
    done = part.done
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise ValueError(f"The vector of row {done.rows + int(finite.argmin())} is not finite. Try --dtype float32.")
    _digest(digest, texts)
    part.append(
        vectors,
        Done(
            rows=done.rows + len(texts),
            empty=done.empty + sum(not text.strip() for text in texts),
            cut=done.cut + int(cut.sum()),
            digest=digest.hexdigest(),
        ),
    )
