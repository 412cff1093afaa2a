"""Meta-learners end as if never stopped after a kill: the unrolls under way and PES's perturbations included."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import rlmeta as rl
from rlmeta.cli.main import main
from tests.runs import killed_meta
from tests.runs.test_resume import assert_same_run

SCRIPT = Path(killed_meta.__file__)


@pytest.mark.parametrize("name", list(killed_meta.CASES))
def test_killed_and_resumed_equals_never_stopped(name, tmp_path, monkeypatch):
    monkeypatch.setattr("rlmeta.report.listeners.write_curve", lambda run: None)
    whole = killed_meta.train(str(tmp_path / "whole"), name)
    iterations = int(whole.state["count"]["iterations"].max())
    at = iterations // 2 + (1 - iterations // 2 % 2)  # odd
    assert 0 < at < iterations
    command = [sys.executable, str(SCRIPT), str(tmp_path / "killed"), name, str(at)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not (tmp_path / "killed" / "summary.json").exists()
    assert main(["resume", str(tmp_path / "killed"), "--quiet"]) == 0
    assert_same_run(whole, rl.load(tmp_path / "killed"))
