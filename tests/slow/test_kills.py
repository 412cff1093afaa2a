"""Kills and SIGTERM at random moments, resumed until it ends: the run ends bit for bit as the one never stopped."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rlmeta.functional import tree
from rlmeta.runs import checkpoint
from tests.slow.configurations import CONFIGURATIONS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ROUNDS, KILLS = 5, 4


def start(name: str, folder: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.slow.configurations", name, str(folder), str(seconds)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str]) -> None:
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said[-3000:]


def kill_after(process: subprocess.Popen[str], wait: float, number: signal.Signals) -> bool:
    """Whether the process was still there to be sent a signal: SIGKILL with its workers, or SIGTERM, which saves."""
    try:
        process.communicate(timeout=wait)
    except subprocess.TimeoutExpired:
        if number is signal.SIGTERM:
            process.terminate()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True
    return False


def ended(folder: Path) -> tuple[dict[str, Any], bytes, Any]:
    """State, records and summary of a run, without what it says of times and which run it is."""
    state, _ = checkpoint.load(folder / "state")
    summary = json.loads((folder / "summary.json").read_text())
    del summary["run"], summary["sha256"]
    for row in summary["summary"]:
        del row["seconds"], row["steps_per_second"]
    return tree.flatten(state), (folder / "metrics.jsonl").read_bytes(), summary


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_killed_at_random_moments(name: str, tmp_path: Path) -> None:
    began = time.perf_counter()
    finish(start(name, tmp_path / "whole", 60.0))
    seconds = time.perf_counter() - began
    state, metrics, summary = ended(tmp_path / "whole")
    moments = random.Random(name)
    for round_number in range(ROUNDS):
        folder, every = tmp_path / str(round_number), moments.choice([0.0, 0.05, 0.3])
        kills = 0
        for _ in range(KILLS):
            process = start(name, folder, every)
            number = moments.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
            if not kill_after(process, moments.uniform(0.2, 1.1) * seconds, number):
                break
            kills += 1
            if not (folder / "state" / "manifest.json").exists():
                shutil.rmtree(folder, ignore_errors=True)  # nothing was saved yet
        finish(start(name, folder, every))
        again, same_metrics, same_summary = ended(folder)
        assert again.keys() == state.keys()
        for leaf, value in state.items():
            assert torch.equal(torch.nan_to_num(value), torch.nan_to_num(again[leaf])), (leaf, kills)
        assert metrics == same_metrics
        assert summary == same_summary
        print(f"{name}: round {round_number}, killed {kills} times, checkpoints every {every} s: equal")
