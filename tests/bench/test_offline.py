"""`rlmeta bench offline`: data sets are recorded once, rows are trained once and read after, d3rlpy stands beside."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

import rlmeta as rl
from rlmeta.bench import agents, offline
from rlmeta.bench.offline import Offline
from rlmeta.errors import SettingError, UnknownNameError
from tests.offline.data import SETTINGS


@pytest.fixture
def options(tmp_path, monkeypatch):
    sac = rl.SAC(num_envs=4, learning_starts=32, gradient_steps=1, batch_size=8, capacity=200, hidden_sizes=(8,))
    tiny = {"sac": sac, "behaviour_cloning": rl.BehaviourCloning(num_steps=4), "iql": SETTINGS["iql"](None)}
    monkeypatch.setattr(offline, "preset", lambda name, task: tiny[name])
    monkeypatch.setattr(offline, "MIXED_STEPS", 64)
    monkeypatch.setattr(offline, "PARTS", 2)
    rows = {"rows": "behaviour_cloning,iql", "seeds": 2, "steps": 8, "episodes": 4, "final_episodes": 2}
    return Offline(data="mixed", **rows, runs=tmp_path / "runs", out=tmp_path / "out")


def test_tables_are_written_and_runs_are_read_the_second_time(options, capsys):
    assert offline.offline(options) == 0
    written = json.loads((options.out / "offline_mixed.json").read_text())
    assert [row["row"] for row in written["rows"]] == ["behaviour_cloning", "iql"] and written["seeds"] == [100, 101]
    assert all(len(row["scores"]) == 2 for row in written["rows"]) and not written["rows"][0]["above_cloning"]
    assert "above cloning" in capsys.readouterr().out
    recorded = offline.data_set("mixed", options)
    assert (len(recorded), recorded.steps, recorded.digest) == (4, 800, written["digest"])
    before = {path: path.stat().st_mtime_ns for path in options.runs.rglob("*.*s*n*")}
    assert offline.offline(options) == 0
    assert len(before) > 3 and before == {path: path.stat().st_mtime_ns for path in before}
    with pytest.raises(SettingError, match=r"learners of seeds \[100, 101\], the table .* from 100 on, 3 of them"):
        offline.offline(replace(options, seeds=3))
    with pytest.raises(SettingError, match=r"failed to run d3rlpy \(exit 1\)"):
        offline.offline(replace(options, d3rlpy=sys.executable))


def test_random_actions_are_uniform_whatever_the_policy(options):
    recorded = offline.data_set("random", options)
    parts = torch.histc(recorded.action, 4, -2.0, 2.0) / recorded.steps
    assert len(recorded) == 4 and torch.allclose(parts, torch.full((4,), 0.25), atol=0.08)
    assert bool(recorded.truncated.all())


def test_wrong_options_are_refused(capsys):
    with pytest.raises(SettingError, match="--episodes is 30, expected a multiple of 20"):
        Offline(episodes=30)
    with pytest.raises(UnknownNameError, match="did you mean mixed"):
        Offline(data="mixd")
    with pytest.raises(UnknownNameError, match="iql"):
        Offline(rows="iqll")
    assert agents.main(["--help"]) == 0 and "offline" in capsys.readouterr().out
