"""The options that every command shares, and how text comes in and results go out."""

from __future__ import annotations

import codecs
import importlib.util
import json
import math
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from usmoe.report.whole import refuse_format, refuse_unwritable

Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Offline = Annotated[bool, typer.Option("--offline", help="Use only what is already on this machine.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of a table.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the output file.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Model = Annotated[
    str | None,
    typer.Option("--model", help="A folder or a hub id; without it, or as shipped, the model that ships with usmoe."),
]
Text = Annotated[
    str | None, typer.Option("--text", help="A file of UTF-8 text, or - for stdin; without it the shipped sample.")
]


def read_text(source: str) -> str:
    """The text of a file, or of stdin for "-"; `text_pieces` says more."""
    return "".join(text_pieces(source))


def text_pieces(source: str) -> Iterator[str]:
    """The text of a file, or of stdin for "-", a few megabytes at a time.

    A file is read as training reads one: without its byte order mark, after decompression, and, of .parquet, .jsonl,
    .json, .csv and .tsv, the column text, a row a line.

    Raises ValueError where it is missing, empty, cut short or not UTF-8.
    """
    from usmoe.data.text import FilePart

    if source != "-" and not Path(source).is_file():
        raise ValueError(f"There is no text file {source}. Give a file of UTF-8 text, or - for stdin.")
    return _pieces(_Stdin() if source == "-" else FilePart(Path(source)))


def _pieces(part: Any) -> Iterator[str]:
    from usmoe.data.text import NotUTF8Error, Text, decoded

    blank = True
    try:
        for piece in decoded(Text(parts=(part,))):
            blank = blank and not piece.strip()
            yield piece
    except NotUTF8Error as error:
        raise ValueError(
            f"{part.name} is not UTF-8: line {error.line} holds byte 0x{error.byte:02x}. Convert it."
        ) from error
    if blank:
        raise ValueError(f"{part.name} holds no text. Give some.")


class _Stdin:
    """Standard input as a part of a text."""

    name = "stdin"

    def blocks(self) -> Iterator[bytes]:
        first = True
        while block := sys.stdin.buffer.read(1 << 21):
            yield block.removeprefix(codecs.BOM_UTF8) if first else block
            first = False


def output_path(path: Path | None, force: bool, flag: str = "--output") -> Path | None:
    """The path that an option (`flag`) gives, once it is known that it can be written: asked before the work, not after
    it. What is there already is overwritten with `force` alone."""
    if path is None:
        return None
    if path.is_dir():
        raise ValueError(f"{path} is a folder. Give the name of a file in it.")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file. Give the name of one, or leave {flag} out.")
    if path.exists() and not force:
        raise ValueError(f"{path} is already there. Give --force to overwrite it, or another {flag}.")
    target = path.resolve()  # what a link points to, not the link
    if not target.parent.exists():
        raise ValueError(f"There is no folder {path.parent} to write {path.name} into. Make it first.")
    refuse_unwritable(target, f"another {flag}")
    return target


def picture_path(path: Path | None, force: bool, flag: str = "--plot") -> Path | None:
    """As `output_path`, for a picture: what its name ends in can be drawn, and there is what draws it."""
    target = output_path(path, force, flag)
    if path is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"{flag} needs matplotlib for the picture. Install it: pip install 'usmoe[viz]'.")
    if path is not None:
        refuse_format(path)
    return target


def output_folder(path: Path | None, force: bool, flag: str = "--save") -> Path | None:
    """The folder, once it is known that it can be written and that nothing in it would be overwritten."""
    if path is None:
        return None
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file. Give the name of a folder.")
    if path.is_dir() and any(path.iterdir()) and not force:
        raise ValueError(f"{path} is not empty. Give --force to overwrite what is there, or another folder.")
    if not path.resolve().parent.exists():
        raise ValueError(f"There is no folder {path.parent} to make {path.name} in. Make it first.")
    return work_folder(path, flag)


def work_folder(path: Path, flag: str) -> Path:
    """The folder in which work is kept while it goes on, once it is known that it is there, or can be made, and can be
    written into."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, and {flag} is a folder. Give another {flag}.")
    refuse_unwritable(path, f"another {flag}")
    return path


def was_typed(context: typer.Context, name: str) -> bool:
    """Whether an option was given, be it at its default."""
    return getattr(context.get_parameter_source(name), "name", "DEFAULT") != "DEFAULT"


def refuse_unread(context: typer.Context, *rules: tuple[bool, Collection[str], str]) -> None:
    """Refuse, in one sentence, what was typed and is not read where it stands, be it at its default.

    rules  (whether that is so, names of parameters, why: "of runs, and shipped is none")

    --seed and --offline are never among them: nothing that is drawn or fetched is a promise that holds.
    """
    flags = {one.name: max(one.opts, key=len) if one.opts else "" for one in context.command.params}
    for unread, names, why in rules:
        called = {name: flags[name] for name in names}  # also of a rule that does not apply: a wrong name is found
        typed = [
            flag if flag.startswith("-") else flag.upper() for name, flag in called.items() if was_typed(context, name)
        ]
        if unread and typed:
            verb, them = ("is", "it") if len(typed) == 1 else ("are", "them")
            raise typer.BadParameter(f"{', '.join(typed)} {verb} {why}. Leave {them} out")


def listed(given: Sequence[str]) -> list[str]:
    """What an option lists with commas between, and what it lists when it is given again; a comma within brackets
    belongs to the item: usmoe(k=2, alpha=0.5)."""
    found, depth = [""], 0
    for one in given:
        for character in one:
            depth += (character in "([{") - (character in ")]}")
            if character == "," and depth == 0:
                found.append("")
            else:
                found[-1] += character
        found.append("")
        depth = 0
    return list(dict.fromkeys(item.strip() for item in found if item.strip()))


def tell(sentence: str) -> None:
    """Say something on stderr, beside the result."""
    sys.stderr.write(f"usmoe: {sentence}\n")


def write_json(said: Any) -> None:
    """Print a result as JSON on stdout; what is not finite becomes null."""
    sys.stdout.write(json.dumps(_finite(said), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def console() -> Console:
    """Where tables go: as wide as the terminal, and wide enough for every column where stdout is none."""
    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=120 if wide else None)


def fresh_path(name: str) -> Path:
    """name in the working folder, or name-2, name-3, ... where it is taken."""
    first = Path(name)
    number, path = 1, first
    while path.exists():
        number += 1
        path = first.with_stem(f"{first.stem}-{number}")
    return path
