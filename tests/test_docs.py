"""The pages of docs/: their Python runs, their settings exist, their figures are those of one table and its files."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlmeta.agents import ALL as AGENTS
from rlmeta.engine.backends import BACKENDS, VARIABLE
from rlmeta.engine.capture import WARM_UP
from rlmeta.imitation import ALL as IMITATORS
from rlmeta.lifelong import ALL as METHODS
from rlmeta.meta import ALL as META_LEARNERS
from rlmeta.offline import ALL as OFFLINE
from rlmeta.rewards import RND, EpisodicCounts, PotentialShaping
from rlmeta.supervised import ALL as SUPERVISED
from tests.markdown import DOCUMENTS, ROOT, code_blocks, links, run_section, sections, table_rows

PAGES = {name: text for name, text in DOCUMENTS.items() if name.startswith("docs/")}
MEASUREMENTS = "docs/measurements.md"
ALGORITHMS = [name for name in PAGES if name.startswith("docs/algorithms/")]
ALL = [*AGENTS, *IMITATORS, *OFFLINE, *META_LEARNERS, *SUPERVISED, *METHODS]


@pytest.fixture(autouse=True)
def own_random_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a page seeds or writes stays with it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    sys.modules.pop("my_agent", None)


def check_names(title: str, names: dict[str, Any], said: str) -> None:
    """What some blocks promise and do not check themselves."""
    if title == "In a plain torch loop":
        assert names["steps_an_episode"] > 40
    if title == "Lifelong methods in a plain torch loop":
        scores = [float(score) for score in re.findall(r"\d\.\d+", said)]
        assert len(scores) == 12 and sum(scores) / 12 > 0.85, said
    if title == "More steps":
        assert names["run"].env_steps == 1_040, "the first whole iteration of 40 steps from 1,024 on"


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if "```python" in text])
def test_blocks_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for title in sections(PAGES[page]):
        check_names(title, run_section(page, title), capsys.readouterr().out)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_short_and_in_a_section(page: str) -> None:
    blocks = code_blocks(PAGES[page], "python")
    assert all(len(block.splitlines()) < 30 for block in blocks)
    assert len(blocks) == sum(len(code_blocks(part, "python")) for part in sections(PAGES[page]).values())


@pytest.mark.parametrize("page", ALGORITHMS)
def test_an_algorithm_has_all_parts_and_its_settings_exist(page: str) -> None:
    parts = sections(PAGES[page])
    assert list(parts) == ["When to use it", "Settings that matter", "Measured", "Pitfalls"]
    files = set(links(PAGES[page]))
    described = [cls for cls in ALL if f"../../{cls.__module__.replace('.', '/')}.py" in files]
    described += [PotentialShaping, EpisodicCounts, RND] if page.endswith("rewards.md") else []
    known = {field.name for cls in described for field in dataclasses.fields(cls)} | {"rewards"}
    bullets = re.findall(r"^- (.+?)(?:: |$)", parts["Settings that matter"], re.M)
    named = [name for bullet in bullets for name in re.findall(r"`(\w+)`", bullet)]
    assert len(named) >= min(2, len(known) - 1) and set(named) <= known, set(named) - known


def test_figures_of_pages_are_those_of_the_measurements() -> None:
    measured = table_rows(PAGES[MEASUREMENTS])
    repeated = [row for text in PAGES.values() for row in table_rows(sections(text).get("Measured", ""))]
    assert len(repeated) > 30
    assert set(repeated) <= set(measured), set(repeated) - set(measured)


def test_figures_of_agents_are_those_of_their_files() -> None:
    rows = table_rows(sections(PAGES[MEASUREMENTS])["Reinforcement learning"])
    assert len(rows) == len([*(ROOT / "runs/results").glob("*_*-v?.json")])
    for task, agent, figures, _, command in (row.strip("|").split(" | ") for row in rows):
        name = f"{agent.split()[0].lower()}_{task.strip()}"
        kept = json.loads((ROOT / f"runs/results/{name}.json").read_text())
        assert figures.startswith(f"{kept['iqm']:.1f} [{kept['low']:.1f}, {kept['high']:.1f}]"), name
        assert f"--seeds {kept['seeds'][0]}-{kept['seeds'][-1]} --final-episodes {kept['episodes']}" in command
        assert len(kept["scores"]) == len(kept["seeds"]) > 2


def test_what_is_said_of_recordings_is_so() -> None:
    for page in ("docs/recording.md", "docs/your_own_code.md"):
        assert f"after {WARM_UP} calls their" in PAGES[page]
    assert f"`{VARIABLE}`" in PAGES["docs/recording.md"]
    values = re.findall(r"^\| `(\w+)` \|", PAGES["docs/recording.md"], re.M)
    assert values == [*(backend.name for backend in BACKENDS), "none"]


def test_the_pieces_of_an_agent_of_ones_own_are_the_templates() -> None:
    template, pieces = (ROOT / "agents/my_agent.py").read_text(), code_blocks(PAGES["docs/your_own_agent.md"], "py")
    assert len(template.splitlines()) < 120 and len(pieces) > 4
    lines, *quoted = ("\n".join(filter(None, map(str.strip, text.splitlines()))) for text in (template, *pieces))
    assert all(piece in lines for piece in quoted), "a formatter may indent them otherwise"


def test_every_page_is_in_the_contents() -> None:
    listed = {f"docs/{target}" for target in links(PAGES["docs/index.md"])}
    assert PAGES.keys() - {"docs/index.md"} <= listed
