"""The command line. Results go to stdout, progress and warnings to stderr; errors are one line."""

from usmoe.cli.app import main

__all__ = ["main"]
