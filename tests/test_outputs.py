"""What cannot be written is found out before the work, and figures are shown whatever becomes of their file."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from usmoe.cli import main
from usmoe.models import SAMPLE
from usmoe.report.whole import PICTURES, refuse_unwritable, whole, whole_folder, whole_json, whole_picture

CODES = {
    errno.ENOSPC: "the disk is full. Make room, or give",
    errno.EDQUOT: "your quota is used up. Make room, or give",
    errno.EROFS: "the disk is read-only. Make it writable, or give",
    errno.EACCES: "you may not write there. Change its permissions, or give",
}


@pytest.fixture
def refusing(monkeypatch):
    """refusing(code): from now on no file can be made whose name begins with a dot, as those of probes and parts do."""
    made = Path.open

    def go(code: int) -> None:
        def refuse(path: Path, mode: str = "r", *rest, **named):
            if path.name.startswith(".") and set(mode) & set("wax"):
                raise OSError(code, os.strerror(code), str(path))
            return made(path, mode, *rest, **named)

        monkeypatch.setattr(Path, "open", refuse)

    return go


@pytest.fixture
def typed(monkeypatch, capsys, tmp_path):
    """typed("demo", ...) -> (exit status, stdout, last line of stderr), in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["usmoe", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, (err.strip().splitlines() or [""])[-1]

    return run


# ------------------------------------------------------------------------------------------------- before the work


@pytest.mark.parametrize("code", CODES)
def test_a_place_that_refuses_is_named_with_what_to_do(tmp_path, refusing, code):
    refuse_unwritable(tmp_path / "x.json")  # and leaves nothing
    refusing(code)
    for path in (tmp_path / "x.json", tmp_path, tmp_path / "new" / "folder"):
        with pytest.raises(OSError, match=f"{path.name} cannot be written: {CODES[code]} another --output"):
            refuse_unwritable(path, "another --output")
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_and_a_name_too_long(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="a part of that path is a file"):
        refuse_unwritable(tmp_path / "file" / "x" / "y.json")
    with pytest.raises(OSError, match="the name is too long"):
        refuse_unwritable(tmp_path / ("x" * 300))


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder of the kernel's, where nothing can be made")
def test_a_folder_where_even_the_superuser_makes_nothing():
    assert os.access("/proc", os.W_OK) == (os.geteuid() == 0)  # what permission bits say
    with pytest.raises(OSError, match="/proc/x cannot be written"):
        refuse_unwritable(Path("/proc/x"))


def test_a_disk_that_fills_up_with_the_last_block_is_full(tmp_path, monkeypatch):
    """The probe goes down to the disk, where delayed allocation says what write() does not."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="the disk is full"):
        refuse_unwritable(tmp_path / "x")
    assert not list(tmp_path.iterdir())


RUN = {"config.json": '{"corpus": {}}', "vocabulary.json": "{}", "log.jsonl": ""}
TRAIN = ("train", "--data", SAMPLE, "--steps", 2)
COMMANDS = {
    "demo": ("demo", "--output", "x.png"),
    "demo, here": ("demo",),
    "tune --output": ("tune", "shipped", "--output", "x.json"),
    "tune --plot": ("tune", "shipped", "--plot", "x.svg"),
    "tune --save": ("tune", "shipped", "--save", "x"),
    "patch": ("patch", "shipped", "--router", "usmoe(k=2)", "--save", "x"),
    "embed": ("embed", "shipped", "texts.txt", "-o", "x.npy"),
    "eval --results": ("eval", "shipped", "--tasks", "STS12"),
    "eval --markdown": ("eval", "shipped", "--tasks", "STS12", "--markdown", "x.md"),
    "eval --lm-eval": ("eval", "shipped", "--lm-eval", "arc_easy", "--results", "x/y"),
    "eval RUN": ("eval", "run", "--markdown", "x.md"),
    "train": TRAIN,
    "train --run": (*TRAIN, "--run", "x/y/z"),
    "train --minutes": (*TRAIN[:3], "--minutes", 5),
    "finetune": ("finetune", "run", "rows.csv"),
    "finetune, seeds": ("finetune", "run", "rows.csv", "--seeds", 2, "--run", "x"),
    "reproduce": ("reproduce", "table5", "--tasks", "STS12"),
    "reproduce --plot": ("reproduce", "figure3", "--tasks", "STS12", "--plot", "x.pdf"),
    "reproduce --markdown": ("reproduce", "table14", "--data", ".", "--markdown", "x.md"),
}


@pytest.fixture
def no_work(monkeypatch, tmp_path):
    """Whoever begins to work, by loading a model or preparing a text, fails the test."""
    import usmoe.cli.likelihood
    import usmoe.data.prepare
    import usmoe.evaluate.run
    import usmoe.hf.load
    import usmoe.train.finetune
    import usmoe.train.loop

    def worked(*_, **__):
        raise AssertionError("It has begun to work.")

    places = [(usmoe.hf.load, "load"), (usmoe.hf.load, "load_model"), (usmoe.hf.load, "load_as_saved")]
    places += [(usmoe.train.loop, "train"), (usmoe.train.finetune, "finetune"), (usmoe.data.prepare, "prepare")]
    places += [(usmoe.cli.likelihood, "figures_of_run"), (usmoe.evaluate.run, "evaluate")]
    for module, name in places:
        monkeypatch.setattr(module, name, worked)
    (tmp_path / "run").mkdir()
    for name, said in RUN.items():
        (tmp_path / "run" / name).write_text(said)
    (tmp_path / "texts.txt").write_text("a text\n")
    (tmp_path / "rows.csv").write_text("text,label\na,0\nb,1\n")


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_every_command_finds_out_before_the_work(typed, no_work, refusing, words, tmp_path):
    before = {path.name for path in tmp_path.iterdir()}
    refusing(errno.EROFS)
    status, out, said = typed(*words)
    assert (status, out) == (1, "")
    assert "cannot be written: the disk is read-only. Make it writable, or give another --" in said
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("demo", "--output", "run"), "run is a folder. Give the name of a file in it."),
        (("demo", "--output", "texts.txt"), "texts.txt is already there. Give --force"),
        (
            ("demo", "--output", "texts.txt/x.png"),
            "x.png cannot be written: a part of that path is a file. Move that file",
        ),
        (("demo", "--output", "none/x.png"), "There is no folder none"),
        (("patch", "shipped", "--router", "usmoe(k=2)", "--save", "texts.txt"), "texts.txt is a file."),
        (("tune", "shipped", "--save", "none/x"), "There is no folder none to make x in. Make it first."),
        (("train", "--data", SAMPLE, "--run", "texts.txt"), "texts.txt is a file, and --run is a folder."),
        (("train", "--data", SAMPLE, "--run", "texts.txt/x"), "a part of that path is a file"),
        (("eval", "shipped", "--tasks", "STS12", "--results", "texts.txt"), "and --results is a folder."),
        (("reproduce", "table5", "--tasks", "STS12", "--results", "texts.txt"), "and --results is a folder."),
        (("finetune", "run", "rows.csv", "--run", "texts.txt"), "and --run is a folder."),
    ],
)
def test_what_stands_where_it_is_to_be_written(typed, no_work, words, sentence):
    status, out, said = typed(*words)
    assert (status, out) == (1, "")
    assert sentence in said


@pytest.mark.parametrize(
    "words", [("demo", "--output"), ("tune", "shipped", "--plot"), ("reproduce", "figure3", "--plot")]
)
@pytest.mark.parametrize("name", ["x.jpg", "x", "x.pdf.gz"])
def test_a_picture_of_no_known_kind_is_refused(typed, no_work, words, name):
    status, out, said = typed(*words, name)
    assert (status, out) == (1, "")
    assert f"{name} does not say what kind of picture it is to be. Give a name that ends in .png, .svg or .pdf." in said


@pytest.mark.parametrize(("ending", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")])
def test_the_end_of_a_name_decides_what_is_drawn(tmp_path, ending, begins):
    from matplotlib.figure import Figure

    assert ending.lower() in PICTURES
    path = tmp_path / f"x{ending}"
    whole_picture(Figure(), path)
    assert path.read_bytes().startswith(begins)


# ------------------------------------------------------------------------------------------------- a disk that fills up


def test_whole_files_and_folders_say_it_and_leave_nothing(tmp_path, refusing):
    refusing(errno.ENOSPC)
    with pytest.raises(OSError, match=r"x\.json cannot be written: the disk is full\. Make room") as told:
        whole_json({}, tmp_path / "x.json")
    assert told.value.errno == errno.ENOSPC
    with (
        pytest.raises(OSError, match="folder cannot be written: the disk is full"),
        whole_folder(tmp_path / "folder") as part,
    ):
        (part / ".file").open("w")
    assert not list(tmp_path.iterdir())


def test_what_is_read_to_write_a_file_is_not_taken_for_it(tmp_path):
    """The positive control: an error of another file stays what it is."""
    with pytest.raises(FileNotFoundError, match="none"), whole(tmp_path / "x"):
        Path("/none/of/this").read_bytes()


SMALL = ("--tokens", 64, "--length", 32)


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["table", "json"])
def test_the_demo_shows_its_figures_and_then_says_what_was_not_written(typed, monkeypatch, form):
    import usmoe.report.maps

    def full(path: Path, *_) -> None:
        with whole(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(usmoe.report.maps, "router_maps", full)
    status, out, said = typed("demo", *SMALL, "--positions", 0, "--output", "x.png", *form)
    assert status == 1
    assert "x.png cannot be written: the disk is full" in said
    if form:
        assert len(json.loads(out)["rows"]) == 9
        assert json.loads(out)["picture"] is None
    else:
        assert out.count("USMoE") >= 4
        assert "x.png" not in out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device on which every write says that it is full")
@pytest.mark.parametrize("words", [("info",), ("info", "--json"), ("reproduce", "--list"), ("route", "--tokens", "3")])
def test_where_stdout_is_full_it_is_said_in_a_sentence(words):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-m", "usmoe", *words], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "usmoe: The output cannot be written: the disk is full. Make room, or send it elsewhere."
    )


def test_tables_of_the_paper_are_shown_and_then_it_is_said_that_they_were_not_saved(typed, monkeypatch):
    import usmoe.reproduce.saved

    def full(_, path: Path) -> None:
        with whole(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(usmoe.reproduce.saved, "save", full)
    status, out, said = typed("reproduce", "table15", "--results", "r")
    assert status == 1
    assert "2.5e-4" in out or "0.00025" in out
    assert "Not saved: r/table15-small.json" in out
    assert "table15-small.json cannot be written: the disk is full" in said


def test_a_score_is_said_although_it_cannot_be_kept(tmp_path, monkeypatch):
    """Of mteb: the score reaches whoever asked before the error does."""
    from usmoe.evaluate import run

    class Task:
        rng_state = np_rng = None
        prediction_file_name = "p.json"

        def load_data(self) -> None: ...

        def unload_data(self) -> None: ...

    class Score:
        def to_dict(self) -> dict:
            return {}

    def full(_, path: Path) -> None:
        raise OSError(errno.ENOSPC, "full", str(path))

    monkeypatch.setattr(run, "_place", lambda results, *_: results / "scores" / "a" / "b.json")
    monkeypatch.setattr(run, "_score", lambda *_: Score())
    monkeypatch.setattr(run, "whole_json", full)
    monkeypatch.setattr(run.mteb, "evaluate", lambda *_, **__: type("Said", (), {"task_results": [None]}))
    scores = iter(run._run(Task(), {None: None}, None, tmp_path, 1, 0, False))  # pyright: ignore
    assert isinstance(next(scores), Score)
    with pytest.raises(OSError, match="full"):
        next(scores)
