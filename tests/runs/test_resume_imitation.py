"""Imitators, and agents whose rewards are changed, end as if never stopped after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import rlmeta as rl
from rlmeta.errors import SettingError
from tests.runs import killed_imitation
from tests.runs.test_resume import assert_same_run

SCRIPT = Path(killed_imitation.__file__)


@pytest.mark.filterwarnings("ignore:episodes terminate at different times")
@pytest.mark.parametrize("name", ["gail", "gail gymnasium", "cloning", "irl", "rewards"])
def test_killed_and_resumed_equals_never_stopped(name, tmp_path):
    whole = killed_imitation.train(str(tmp_path / "whole"), name)
    half = int(whole.state["count"]["iterations"].max()) // 2
    command = [sys.executable, str(SCRIPT), str(tmp_path / "killed"), name, str(half)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == -signal.SIGKILL, result.stderr
    with pytest.raises(SettingError, match="which a configuration only describes"):
        rl.resume(tmp_path / "killed")
    assert_same_run(whole, rl.resume(tmp_path / "killed", own=killed_imitation.own(name)))
