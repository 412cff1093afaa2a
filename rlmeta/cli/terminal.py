"""The terminal: what it is shown has no control characters but tabs and ends of lines."""

from __future__ import annotations

import sys

from rlmeta.errors import printable


def say(text: str, error: bool = False) -> None:
    """Print a text, to stderr if it is no result."""
    print(printable(text), file=sys.stderr if error else sys.stdout)
