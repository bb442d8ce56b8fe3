"""The named corpora where they are published: two archives, and two data sets of the hub."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from usmoe.data.text import FilePart, Part


@dataclass(frozen=True, kw_only=True)
class Published:
    """Where a corpus is to be had."""

    place: str
    """A repository of data sets on the hub, or the URL of an archive with one file."""
    configuration: str = ""
    """Of the data set."""
    files: Mapping[str, str] = field(default_factory=dict)
    """The files of each split in the repository, where it has no configuration."""
    revision: str = "main"
    splits: tuple[str, ...] = ()
    """None: one file without splits."""
    size: str
    """What is downloaded, about; as an announcement says it."""
    also: tuple[str, ...] = ()
    """Names of folders that hold a copy."""

    @property
    def names(self) -> tuple[str, ...]:
        """As a manifest.json may name it."""
        whole = f"{self.place}:{self.configuration}" if self.configuration else self.place
        return tuple(dict.fromkeys((whole, self.place)))


PUBLISHED: Mapping[str, Published] = {
    # https://mattmahoney.net/dc/textdata.html; the hub has no copy of enwik8 but a loading script
    "enwik8": Published(place="http://mattmahoney.net/dc/enwik8.zip", size="36 MB"),
    "text8": Published(place="http://mattmahoney.net/dc/text8.zip", size="31 MB"),
    # Merity et al. 2016, arXiv 1609.07843
    "wikitext103": Published(
        place="Salesforce/wikitext",
        configuration="wikitext-103-v1",
        splits=("train", "validation", "test"),
        size="0.3 GB",
        also=("wikitext-103-v1", "wikitext-103"),
    ),
    # Chelba et al. 2013, arXiv 1312.3005; the hub's own conversion, since the repository holds a loading script
    "lm1b": Published(
        place="billion-word-benchmark/lm1b",
        files={"train": "plain_text/train/*.parquet", "test": "plain_text/test/*.parquet"},
        revision="refs/convert/parquet",
        splits=("train", "test"),
        size="2 GB",
        also=("1-billion-word-language-modeling-benchmark-r13output",),
    ),
}


@dataclass(frozen=True)
class HubPart:
    """A split of a published corpus, downloaded when it is first read."""

    corpus: str
    split: str
    """ "whole" for an archive."""

    @property
    def name(self) -> str:
        return f"{PUBLISHED[self.corpus].place} ({self.split})"

    def blocks(self) -> Iterator[bytes]:
        """Raises ValueError, with what to do, where it is not to be had."""
        import datasets

        from usmoe.data.rows import joined

        there = PUBLISHED[self.corpus]
        try:
            if self.split == "whole":
                archive = datasets.DownloadManager().download(there.place)
                yield from FilePart(Path(str(archive))).blocks()
                return
            rows = datasets.load_dataset(
                there.place,
                there.configuration or None,
                data_files=dict(there.files) or None,
                revision=there.revision,
                split=self.split,
            )
        except Exception as error:  # a network, a hub and a format of files have too many kinds of failure to name
            raise not_to_be_had(self.corpus, there.place, error) from error
        for batch in rows.iter(batch_size=1000):  # pyright: ignore[reportAttributeAccessIssue]
            yield joined(batch["text"])  # pyright: ignore[reportArgumentType, reportCallIssue, reportIndexIssue]


def hub_parts(corpus: str) -> dict[str, tuple[Part, ...]]:
    """Each split of a named corpus, or its "whole", not yet downloaded."""
    return {split: (HubPart(corpus, split),) for split in PUBLISHED[corpus].splits or ("whole",)}


def not_to_be_had(name: str, place: str, error: Exception) -> ValueError:
    """What to say where a named set could not be downloaded, or not be read."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    if reason == place:  # all that datasets says where an archive is not reached
        reason = "it is not there, or there is no way to it"
    return ValueError(
        f"{name} cannot be had from {place}: {reason}. Get a connection, or give a folder that holds it (--data DIR)."
    )


def announce(corpus: str) -> None:
    """Say on stderr what is about to be downloaded, and how large it is."""
    there = PUBLISHED[corpus]
    place = f"{there.place} {there.configuration}".rstrip()
    print(f"{corpus}: downloading {place}, about {there.size}.", file=sys.stderr)  # noqa: T201
