"""The ablation of Rainbow: which settings each row changes, the table and its file, rows that are added later."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from rlmeta.agents import Rainbow
from rlmeta.bench import rainbow
from rlmeta.cli.main import main
from rlmeta.errors import SettingError, UnknownNameError
from rlmeta.runs.presets import preset

PARTS = {"double", "prioritised", "dueling", "n_steps", "distribution", "noisy"}


def test_each_row_takes_one_part_away_and_dqn_has_none():
    whole = preset("rainbow", "MinAtar/Breakout-v1")
    rows = {name: asdict(settings) for name, settings in rainbow.variants(whole).items()}
    assert len(rows) == 8 and rows.pop("Rainbow") == asdict(whole)
    changed = {
        name: {n for n, value in row.items() if n in PARTS and value != getattr(whole, n)} for name, row in rows.items()
    }
    assert changed.pop("DQN") == PARTS
    assert sorted(part for parts in changed.values() for part in parts) == sorted(PARTS)


def test_a_table_of_two_rows_is_paired_and_another_row_joins_it(tmp_path, capsys, monkeypatch):
    small = Rainbow(
        num_envs=2, gradient_steps=1, batch_size=4, capacity=60, learning_starts=16, hidden_sizes=(4,), head_sizes=()
    )
    monkeypatch.setattr(rainbow, "preset", lambda agent, task: replace(small, atoms=3))
    flags = ["bench", "rainbow", "--task", "CartPole-v1", "--steps", "48", "--episodes", "2", "--seeds", "2"]
    flags += ["--out", str(tmp_path)]
    assert main([*flags, "--only", "Rainbow;no distribution"]) == 0
    assert main([*flags, "--only", "DQN"]) == 0
    assert "no distribution" in capsys.readouterr().out
    content = json.loads((tmp_path / "rainbow_CartPole-v1.json").read_text())
    assert list(content["rows"]) == ["Rainbow", "no distribution", "DQN"] and content["seeds"] == [100, 101]
    whole, other = content["rows"]["Rainbow"], content["rows"]["DQN"]
    assert other["differences"] == [a - b for a, b in zip(other["scores"], whole["scores"])]
    assert other["low"] <= other["difference"] <= other["high"] and "low" not in whole
    with pytest.raises(SettingError, match="another --out"):
        rainbow.rainbow(rainbow.Ablation(task="CartPole-v1", steps=64, seeds=2, episodes=2, out=tmp_path))


def test_unknown_rows_are_refused():
    with pytest.raises(UnknownNameError, match="no double"):
        rainbow.rainbow(rainbow.Ablation(only="no doubel"))
