"""The shell commands of README and docs/ run in their order, in a file of their own, beside the tests of Python blocks;
those with a command that was measured can be asked for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tyro

from rlmeta.bench.agents import USAGE, Agents
from rlmeta.bench.checkout import Checkout
from rlmeta.bench.engine import Engine
from rlmeta.bench.imitation import Imitation
from rlmeta.bench.lifelong import Lifelong
from rlmeta.bench.meta import Meta
from rlmeta.bench.offline import Offline
from rlmeta.bench.rainbow import Ablation
from rlmeta.cli.main import main
from rlmeta.cli.plan import from_flags
from tests.markdown import DOCUMENTS, ROOT, small_blocks
from tests.test_readme import run

BENCHMARKS = {"agents": Agents, "checkout": Checkout, "engine": Engine}
BENCHMARKS |= {"imitation": Imitation, "lifelong": Lifelong, "meta": Meta, "offline": Offline, "rainbow": Ablation}


def commands_of(document: str) -> list[str]:
    return [command for block in small_blocks(DOCUMENTS[document], "sh") for command in block.splitlines()]


def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README's first as a reader types it; the others, which go on in the same folder, in this process: faster."""
    first, *others = dict.fromkeys(command for document in DOCUMENTS for command in commands_of(document))
    assert first in commands_of("README.md") and len(others) >= 10
    run(first.split(), tmp_path)
    monkeypatch.chdir(tmp_path)
    for command in others:
        program, *arguments = command.split()
        assert program == "rlmeta" and main(arguments) == 0, command


def test_what_is_said_to_train_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "envs")
    texts = "\n".join(DOCUMENTS.values())
    trained = set(re.findall(r"`rlmeta train (\w+) ([^- `][^ `]*)([^`;]*)", texts))
    assert len(trained) >= 17
    for agent, task, flags in trained:
        from_flags(agent, task, flags.split())


def test_what_is_said_to_measure_can_be_asked_for() -> None:
    measured = set(re.findall(r"rlmeta bench (\w+)([^`]*)`", "\n".join(DOCUMENTS.values())))
    assert {name for name, _ in measured} == set(BENCHMARKS)
    for name, flags in measured:
        tyro.cli(BENCHMARKS[name], args=flags.split())
        assert f"\n  {name} " in USAGE
