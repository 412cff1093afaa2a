"""Every code block of the README runs, with smaller budgets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
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
    found = re.findall(rf"```{language}\n(.*?)```", README, re.S)
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


def test_commands_run(folder):
    (commands,) = blocks("sh")
    for command in commands.splitlines():
        run(command.split(), folder)


def test_the_two_commands_are_the_makefiles_targets():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M)
