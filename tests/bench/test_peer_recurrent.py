"""Baseline with a memory: rows in Stable-Baselines3's protocol, and errors; the training needs sb3-contrib."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from rlmeta.bench import peer_recurrent
from rlmeta.errors import MissingExtraError, SettingError, UnknownNameError


@pytest.mark.parametrize("task", peer_recurrent.SETTINGS)
def test_rows_of_a_native_task_end_as_stable_baselines_expects(task: str) -> None:
    rows = peer_recurrent.native_rows(task, 3, seed=5)
    first = np.asarray(rows.reset())
    dones: list[Any] = []
    for step in range(60):
        observation, _, done, infos = rows.step(np.full(3, step % 2))
        assert len(infos) == 3 and ["terminal_observation" in info for info in infos] == done.tolist()
        dones.append(done)
    assert any(done.any() for done in dones)
    again = np.asarray(peer_recurrent.native_rows(task, 3, seed=5).reset())
    assert np.asarray(observation).shape == first.shape and np.array_equal(first, again)
    if task == "RepeatPrevious-easy":
        assert np.flatnonzero(np.stack(dones).all(1)).tolist() == [50]  # 52 cards; the first is dealt by reset


def test_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SettingError, match="positive"):
        peer_recurrent.train_sb3_contrib("RepeatPrevious-easy", 0, 0)
    with pytest.raises(UnknownNameError, match="Nowhere-v0"):
        peer_recurrent.train_sb3_contrib("Nowhere-v0", 10, 0)
    monkeypatch.setitem(sys.modules, "sb3_contrib", None)
    with pytest.raises(MissingExtraError, match="needs sb3-contrib, which is not installed: pip install"):
        peer_recurrent.train_sb3_contrib("RepeatPrevious-easy", 10, 0)
    assert peer_recurrent.main(["Nowhere-v0"]) == 2 and "Nowhere-v0" in capsys.readouterr().err
