"""`rlmeta bench imitation`: rows are trained once and read after, the control is one of them, speed has a peer."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

import rlmeta as rl
from rlmeta.bench import agents, imitation
from rlmeta.bench.imitation import Imitation
from rlmeta.errors import SettingError, UnknownNameError
from tests.imitation.test_gail import TINY, cartpole


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setattr(imitation, "Budget", lambda **given: rl.Budget(**{**given, "final_episodes": 2}))
    chosen = Imitation(seeds=2, steps=64, rounds=1, runs=tmp_path / "runs", out=tmp_path / "out")
    cartpole().save(chosen.runs / "cartpole-fixed.demonstrations")
    tiny = {
        "gail": rl.GAIL(**TINY),
        "behaviour_cloning": rl.BehaviourCloning(),
        "ppo": rl.PPO(num_envs=2, num_steps=16, batch_size=32),
    }
    monkeypatch.setattr(imitation, "preset", lambda name, task: tiny[name])
    cloned = imitation._row
    shorter = lambda name, settings, task, steps, options: cloned(name, settings, task, min(steps, 64), options)  # noqa: E731
    monkeypatch.setattr(imitation, "_row", shorter)
    monkeypatch.setattr(rl.Demonstrations, "first", lambda self, episodes: self)
    return chosen


def test_tables_are_written_and_runs_are_read_the_second_time(options, capsys):
    assert imitation.imitation(options) == 0
    rows = json.loads((options.out / "imitation_gail.json").read_text())["rows"]
    assert [row["row"] for row in rows] == ["gail", "gail-shuffled", "behaviour-cloning"]
    assert all(len(row["scores"]) == 2 for row in rows)
    shaped = json.loads((options.out / "imitation_shaping.json").read_text())["rows"]
    assert [row["row"] for row in shaped] == ["ppo-shaped", "ppo"]
    assert "worst to best seed" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in options.runs.rglob("summary.json")}
    assert imitation.imitation(options) == 0
    assert before == {path: path.stat().st_mtime_ns for path in options.runs.rglob("summary.json")}
    written = json.loads((options.out / "imitation_gail.json").read_text())
    assert written["seeds"] == [100, 101] and max(written["chosen_on_seeds"]) < 100
    with pytest.raises(SettingError, match=r"learners of seeds \[100, 101\], the table .* from 100 on, 3 of them"):
        imitation.imitation(replace(options, seeds=3))


def test_speed_is_a_ratio_of_both_sides_and_needs_the_peer(options, monkeypatch, capsys):
    with pytest.raises(SettingError, match="pip install imitation"):
        imitation.speed(replace(options, imitation=""))
    monkeypatch.setattr(imitation, "_theirs", lambda *given: 10.0)
    monkeypatch.setattr(imitation, "_ours", lambda *given: 60.0)
    assert imitation.speed(replace(options, imitation=sys.executable)) == 0
    assert json.loads((options.out / "imitation_speed.json").read_text())["ratio"] == 6
    exported = np.load(options.runs / "demonstrations.npz")
    steps = cartpole().transitions()
    assert np.array_equal(exported["next_obs"], steps["next_observation"].numpy())
    assert np.array_equal(exported["acts"], steps["action"].numpy())


def test_wrong_flags_are_refused():
    with pytest.raises(UnknownNameError, match="did you mean gail"):
        Imitation(tables="gial,x")
    with pytest.raises(UnknownNameError, match="imitation"):
        agents.main(["imitatoin"])
    with pytest.raises(SettingError, match="--seeds is 0"):
        Imitation(seeds=0)
