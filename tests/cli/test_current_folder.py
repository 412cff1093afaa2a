"""`python -m rlmeta` runs no file of the current folder, whatever part of Python's own library it is called like."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import rlmeta
from tests.cli.test_trust import STRAY

REPOSITORY = Path(rlmeta.__file__).parents[1]
NAMES = ("__future__", "ast", "random", "pathlib", "typing", "re", "json", "traceback", "dataclasses", *STRAY)
"""Of modules that are imported after `python -m` has looked for what it runs, if at all."""


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with modules that say that they ran."""
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write('{name} ')")
    return tmp_path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, timeout=300)


WAYS = (
    ("-m", "rlmeta", "list", "agents"),
    ("-mrlmeta", "--help"),
    ("-Wignore", "-Bm", "rlmeta", "list", "agents"),
    ("-m", "rlmeta.cli.main", "list", "agents"),
)


@pytest.mark.parametrize("way", WAYS)
def test_nothing_planted_runs(way: tuple[str, ...], planted: Path) -> None:
    done = run(*way)
    assert not (planted / "ran").exists(), (planted / "ran").read_text()
    assert done.returncode == 0 and "agents" in done.stdout, done.stderr


def test_other_programs_keep_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is run by `-m` and imports rlmeta while it is looked for needs it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").write_text("import rlmeta")
    (tmp_path / "mine/__main__.py").write_text("import beside; print(beside.VALUE)")
    (tmp_path / "beside.py").write_text("VALUE = 5")
    done = run("-m", "mine", "-m", "rlmeta")
    assert (done.returncode, done.stdout) == (0, "5\n"), done.stderr


def test_rlmeta_that_is_here_is_found_by_processes_that_it_starts(tmp_path: Path) -> None:
    """It is searched for last: whatever else lies there is served for nothing."""
    (tmp_path / "rlmeta").symlink_to(REPOSITORY / "rlmeta")
    code = (
        "import sys; sys.argv, sys.orig_argv = ['-m'], ['python', '-m', 'rlmeta']; "
        f"sys.path.insert(0, {str(tmp_path)!r}); import rlmeta; print(sys.path[-1], len(sys.path) > 1)"
    )
    assert run("-c", code).stdout == f"{tmp_path} True\n"
