"""Demonstrations of episodes that have no end are cut as evaluation cuts them."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import TimeLimit

import rlmeta as rl
from tests.envs.bad_environment import Bad

PPO = rl.PPO(num_envs=2, num_steps=8, batch_size=16, num_epochs=1, hidden_sizes=(4,))


class Planned(Bad):
    """Every second episode has no end, the others have 3 steps."""

    def step(self, action: Any) -> Any:
        _, reward, _, _, info = super().step(action)
        shown = np.array([self.time / 100, self.resets % 2, 0.0], np.float32)
        return shown, reward, self.resets % 2 == 1 and self.time == 3, False, info


def _recorded(make: Any, episodes: int) -> tuple[rl.Demonstrations, list[str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = rl.train(PPO, rl.task(make), budget=rl.Budget(steps=16, final_episodes=1, eval_episodes=1), threads=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = rl.record(run, episodes)
    return made, [str(one.message) for one in caught]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlmeta.learning.evaluate.EVALUATION_LIMIT", 9)
    monkeypatch.setattr("rlmeta.runs.record_demonstrations.EVALUATION_LIMIT", 9)


def test_an_episode_without_an_end_is_cut_and_counted() -> None:
    """34 episodes are 17 in each of two rows."""
    made, said = _recorded(Planned, 34)
    cut = np.array([not ended for ended in made.terminated.tolist()])
    assert made.lengths.tolist() == [9 if one else 3 for one in cut]
    assert made.truncated.tolist() == cut.tolist() and 0 < cut.sum() < 34
    (text,) = said
    assert text == (
        f"environment 'Planned': {cut.sum()} of 34 recorded episodes did not end within 9 steps and were cut "
        "there: give the task max_episode_steps="
    )


def test_what_follows_a_cut_begins_an_episode() -> None:
    made, _ = _recorded(lambda: Bad("never ends"), 34)
    starts = np.concatenate([[0], np.cumsum(made.lengths.numpy() + 1)[:-1]])
    firsts = made.observation[starts]
    assert len(made) == 34 and len(np.unique(firsts.numpy(), axis=0)) == 34, "each from a seed of its own"


def test_a_declared_limit_counts_where_it_is_longer() -> None:
    def make() -> gym.Env[Any, Any]:
        return TimeLimit(Bad("never ends"), 12)

    made, said = _recorded(make, 2)
    assert made.lengths.tolist() == [12, 12] and said == []
