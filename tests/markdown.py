"""Code blocks of Markdown files, which are run as their readers would."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def code_blocks(text: str, language: str) -> list[str]:
    """What stands between the fences of a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def sections(text: str) -> dict[str, str]:
    """The text under every heading of the second level."""
    parts = re.split(r"^## (.+)$", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))
