"""Printing to the terminal, with control characters escaped."""

from __future__ import annotations

import sys

from rlmeta.errors import printable


def say(text: str, error: bool = False) -> None:
    """Print a text to stdout, or to stderr for notes and errors."""
    print(printable(text), file=sys.stderr if error else sys.stdout)
