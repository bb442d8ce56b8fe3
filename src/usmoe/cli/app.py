"""The application: its commands, and one place where errors become one line."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from usmoe.cli.demo import demo
from usmoe.cli.embed import embed
from usmoe.cli.eval import evaluate
from usmoe.cli.finetune import finetune
from usmoe.cli.info import info
from usmoe.cli.patch import patch
from usmoe.cli.reproduce import reproduce
from usmoe.cli.route import route
from usmoe.cli.train import train
from usmoe.cli.tune import tune
from usmoe.report.whole import why_not

app = typer.Typer(
    name="usmoe",
    help="Sparse mixture-of-experts routing: the best (token, expert) pairs under a budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (demo, info, route, patch, tune, embed, train, finetune):
    app.command()(command)
app.command("eval")(evaluate)
app.command()(reproduce)


def main() -> None:
    """Run the command line; exit with 0 only when it did what it says."""
    debug = "--debug" in sys.argv
    sys.path.append(str(Path.cwd()))  # for --router module:name of a file that lies here
    try:
        status = app(standalone_mode=False)
        if status == 130:  # what typer makes of Ctrl-C, without a word
            raise KeyboardInterrupt
        raise SystemExit(status if isinstance(status, int) else 0)
    except typer.TyperException as error:  # the command was not typed as it should be
        _say(f"{error.format_message().rstrip('. ')}. See --help.")
        raise SystemExit(2) from None
    except (KeyboardInterrupt, typer.Abort) as stop:
        if debug:
            raise
        _say(f"stopped; {str(stop) or 'nothing was half-written.'}")
        raise SystemExit(130) from None
    except ModuleNotFoundError as error:
        if debug or error.name is None or error.name.split(".")[0] == "usmoe":
            raise
        _say(f"this needs {error.name}. Install it: pip install 'usmoe[{_extra(error.name)}]'.")
        raise SystemExit(1) from None
    except Exception as error:  # a user sees one line, whatever went wrong; --debug shows the rest
        if debug:
            raise
        said = str(error)
        if isinstance(error, OSError) and error.filename is None and (why := why_not(error)):
            said = f"The output cannot be written: {why}, or send it elsewhere."  # stdout, mostly
        line = " ".join(" ".join([said, *getattr(error, "__notes__", ())]).split())
        ours = isinstance(error, ValueError | TypeError | OSError)  # a sentence of its own; else say what it is
        _say(f"{line if ours else f'{type(error).__name__}: {line}'}")
        raise SystemExit(1) from None


_EXTRAS = {"lm_eval": "lm-eval", "bitsandbytes": "quant", "matplotlib": "viz"}
_EXTRAS |= dict.fromkeys(("mteb", "sentence_transformers", "sklearn"), "embed")
_EXTRAS |= dict.fromkeys(("datasets", "pyarrow", "tensorboard"), "train")


def _extra(package: str) -> str:
    """The extra that brings a package."""
    return _EXTRAS.get(package.split(".")[0], "hf")


def _say(line: str) -> None:
    sys.stderr.write(f"usmoe: {line}\n")
