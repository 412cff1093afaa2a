"""Every code block of the README runs, with smaller budgets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tyro

from rlmeta.bench.agents import USAGE, Agents
from rlmeta.bench.imitation import Imitation
from rlmeta.bench.lifelong import Lifelong
from rlmeta.bench.meta import Meta
from rlmeta.cli.plan import from_flags
from rlmeta.engine.capture import WARM_UP
from tests.markdown import ROOT, code_blocks

README = (ROOT / "README.md").read_text()
SMALLER = {
    "steps=100_000": "steps=2_048",
    "steps=20_480": "steps=2_048",
    "steps=8_192": "steps=1_024",
    "steps=20_000": "steps=500",
    "steps=320_000": "steps=1_280",
    "steps=3_200": "steps=320",
    "seeds=16": "seeds=2",
    "seeds=8": "seeds=2",
    "--steps 100k": "--steps 2k",
    "--seeds 16": "--seeds 2",
    "--seeds 8": "--seeds 2 --steps 2k",
    "--episodes 256": "--episodes 4",
}


def blocks(language: str) -> list[str]:
    found = code_blocks(README, language)
    for long, short in SMALLER.items():
        found = [block.replace(long, short) for block in found]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One working folder for all blocks: a later one reads what an earlier one wrote."""
    return tmp_path_factory.mktemp("readme")


def run(command: list[str], folder: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


def test_python_blocks_run(folder):
    assert len(blocks("python")) >= 5
    for block in blocks("python"):
        run([sys.executable, "-c", block], folder)


def test_what_is_said_to_train_or_measure_can_be_asked_for(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "envs")
    trained = re.findall(r"`rlmeta train (\w+) ([^- `][^ `]*)([^`;]*)", README)
    assert len(trained) >= 15
    for agent, task, flags in trained:
        from_flags(agent, task, flags.split())
    options = {"agents": Agents, "imitation": Imitation, "lifelong": Lifelong, "meta": Meta}
    measured = re.findall(r"rlmeta bench (\w+)([^`]*)`", README)
    assert {name for name, _ in measured} == set(options)
    for name, flags in measured:
        tyro.cli(options[name], args=flags.split())
        assert f"\n  {name} " in USAGE


def test_the_numbers_and_extras_it_names_are_those_of_the_package():
    assert f"after {WARM_UP} calls their operations are" in README
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    said = README[README.index('".[all]"') : README.index("and `bench`.") + 12]
    assert {*re.findall(r"`(\w+)`", said), "all", "dev"} == set(project["optional-dependencies"])


def test_the_two_commands_are_the_makefiles_targets():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M)
