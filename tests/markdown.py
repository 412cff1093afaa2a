"""README and the pages of docs/: their sections, links, tables, and code blocks, which are run as readers would."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
"""Texts by their paths from the root: what is run, and whose links are followed."""

SMALLER = {
    "steps=100_000": "steps=1_024",
    "steps=20_480": "steps=1_024",
    "steps=10_240": "steps=512",
    "eval_every=10_240": "eval_every=512",
    "steps=8_192": "steps=1_024",
    "steps=20_000": "steps=500",
    "steps=320_000": "steps=1_280",
    "steps=3_200": "steps=320",
    "steps=2_000": "steps=320",
    "lifelong=[rl.Replay(size=128)]": "final_episodes=4, eval_episodes=4, lifelong=[rl.Replay(size=16)]",
    "seeds=16": "seeds=2",
    "seeds=8": "seeds=2",
    "--steps 100k": "--steps 512",
    "--steps 200k": "--steps 1k",
    "--seeds 4 --steps 1k": "--seeds 2 --steps 320",
    "--steps 5k": "--steps 1k",
    "--seeds 16": "--seeds 2",
    "--seeds 8": "--seeds 2 --steps 2k",
    "--episodes 256": "--episodes 4",
}
"""Budgets of the documents, and those that their blocks are tested with."""


def code_blocks(text: str, language: str) -> list[str]:
    """What stands between the fences of a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def small_blocks(text: str, language: str) -> list[str]:
    """The blocks of a language with small budgets."""
    blocks = code_blocks(text, language)
    for long, short in SMALLER.items():
        blocks = [block.replace(long, short) for block in blocks]
    return blocks


def sections(text: str) -> dict[str, str]:
    """The text under every heading of the second level."""
    parts = re.split(r"^## (.+)$", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


def run_section(document: str, title: str) -> dict[str, Any]:
    """The names that a section's Python blocks leave behind, which run one after another in the current folder."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, block in enumerate(small_blocks(sections(DOCUMENTS[document])[title], "python")):
        exec(compile(block, f"{document}, {title}, block {number}", "exec"), names)
    return names


def links(text: str) -> list[str]:
    """Targets of links and pictures, outside code."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S))


def anchors(text: str) -> set[str]:
    """What `#...` may name: headings, as they are linked to."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def table_rows(text: str) -> list[str]:
    """Lines of tables without their heads."""
    tables = re.findall(r"^\|.+\n\|[-|]+\|\n((?:\|.+\n)+)", text, re.M)
    return [row for table in tables for row in table.splitlines()]
