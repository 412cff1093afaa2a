"""The pages of docs/: every Python block runs, those of one section one after another; no link leads nowhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.markdown import ROOT, code_blocks, sections

PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
SECTIONS = [(page, title) for page in PAGES for title, text in sections(PAGES[page]).items() if "```python" in text]


@pytest.fixture(autouse=True)
def own_random_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a page seeds or writes stays with it."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def run_section(page: str, title: str) -> dict[str, Any]:
    """The names that a section's blocks leave behind."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, block in enumerate(code_blocks(sections(PAGES[page])[title], "python")):
        exec(compile(block, f"docs/{page}, {title}, block {number}", "exec"), names)
    return names


@pytest.mark.parametrize(("page", "title"), SECTIONS)
def test_blocks_run_and_are_short(page: str, title: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = code_blocks(sections(PAGES[page])[title], "python")
    assert max(len(block.splitlines()) for block in blocks) < 25
    names = run_section(page, title)
    said = capsys.readouterr().out
    if title == "In a plain torch loop":
        assert names["steps_an_episode"] > 40
    if title == "Lifelong methods in a plain torch loop":
        scores = [float(score) for score in re.findall(r"\d\.\d+", said)]
        assert len(scores) == 12 and sum(scores) / 12 > 0.85, said


def test_every_block_is_in_a_section() -> None:
    for page, text in PAGES.items():
        inside = sum(len(code_blocks(part, "python")) for part in sections(text).values())
        assert len(code_blocks(text, "python")) == inside, page


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in sections(PAGES[page])}
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif "://" not in target:
            assert (ROOT / "docs" / target.partition("#")[0]).exists(), target
