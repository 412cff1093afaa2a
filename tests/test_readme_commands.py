"""README's shell commands run in their order, in a file of their own, so that two processes share README's tests."""

from __future__ import annotations

from pathlib import Path

from tests.test_readme import blocks, run


def test_commands_run(tmp_path: Path) -> None:
    (commands,) = blocks("sh")
    for command in commands.splitlines():
        run(command.split(), tmp_path)
