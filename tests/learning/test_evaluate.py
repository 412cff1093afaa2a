"""Evaluation of episodes that have no end: cut, counted and said."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit

import rlmeta as rl
from rlmeta.functional import random
from rlmeta.learning import evaluate as evaluation
from rlmeta.learning.evaluate import Evaluation, evaluate
from tests.agents.worlds import start


class Sometimes(gym.Env[Any, Any]):
    """Reward 1 a step; a quarter of its episodes, told by the seed, have no end, the others 2 to 4 steps."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, always: bool = False) -> None:
        self.always = always

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        kind = int(self.np_random.integers(4))
        self.left = -1 if self.always or kind == 0 else kind + 1
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self.left -= 1
        return np.zeros(1, np.float32), 1.0, self.left == 0, False, {}


def _evaluated(make: Any, num_envs: int, episodes: int) -> tuple[Evaluation, list[str]]:
    task = rl.task(make, name="sometimes")
    agent, state, _ = start(rl.REINFORCE(hidden_sizes=(4,), num_envs=2), task)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        world = task.world((2,), num_envs)
        found = evaluate(agent, agent.effective_params(state), world, random.fold(state["key"], "test"), episodes)
        world.close()
    return found, [str(one.message) for one in caught]


def test_episodes_without_an_end_are_cut_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those beside them count as they are; rows that were cut begin their next episodes when all others are done."""
    monkeypatch.setattr(evaluation, "EVALUATION_LIMIT", 9)
    found, said = _evaluated(Sometimes, 4, 24)
    assert found.lengths.shape == (2, 24) and torch.equal(found.returns, found.lengths.double())
    cut = found.lengths == 9
    assert bool((cut | ((found.lengths >= 2) & (found.lengths <= 4))).all()) and 0 < int(cut.sum()) < 48
    by_row = cut.view(8, 6)
    assert any(bool(row[0]) and not bool(row.all()) for row in by_row), "what begins after a cut is another episode"
    rows = cut.view(2, 4, 6).any(-1).flatten().nonzero().flatten().tolist()
    (text,) = said
    assert text.startswith(
        f"environment 'Sometimes': {int(cut.sum())} of 48 evaluation episodes did not end within 9 steps and were cut "
        f"there, in rows {', '.join(map(str, rows))};"
    ), text


def test_a_row_that_was_cut_waits_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "EVALUATION_LIMIT", 9)
    made = [0]

    class Planned(Sometimes):
        """In even rows the first episode has no end and others have 2 steps; in odd rows all have 8."""

        def __init__(self) -> None:
            row, self.resets = made[0] % 5 - 1, 0  # before the four of a world one is made that is only looked at
            self.odd = row % 2 == 1
            made[0] += 1

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            self.resets += 1
            self.left = 8 if self.odd else (-1 if self.resets == 1 else 2)
            return np.zeros(1, np.float32), {}

    found, said = _evaluated(Planned, 2, 6)
    assert found.lengths.tolist() == [[9, 2, 2, 8, 8, 8]] * 2 and "2 of 12" in said[-1] and "rows 0, 2;" in said[-1]


def test_every_row_may_be_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "EVALUATION_LIMIT", 5)
    found, said = _evaluated(lambda: Sometimes(always=True), 2, 6)
    assert found.lengths.tolist() == [[5] * 6] * 2 and "12 of 12" in said[0]


def test_a_declared_limit_counts_where_it_is_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "EVALUATION_LIMIT", 5)
    found, said = _evaluated(lambda: TimeLimit(Sometimes(always=True), 8), 2, 4)
    assert found.lengths.tolist() == [[8] * 4] * 2 and said == []


def test_a_limit_that_no_episode_reaches_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    (whole, _), limit = _evaluated("CartPole-v1", 2, 8), 600
    monkeypatch.setattr(evaluation, "EVALUATION_LIMIT", limit)
    again, said = _evaluated("CartPole-v1", 2, 8)
    assert torch.equal(whole.returns, again.returns) and said == []
