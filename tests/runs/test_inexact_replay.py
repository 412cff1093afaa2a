"""A resume that begins new episodes: no transition in the replay memory leads from an old one into a new one."""

from __future__ import annotations

import time

import gymnasium as gym
import numpy as np
import pytest

import rlmeta as rl


class Unrepeatable(gym.Env):
    """The observation is which episode it is and its step; no seed brings an episode back."""

    observation_space = gym.spaces.Box(0, 100, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.at = time.time_ns() % 997 / 10, 0
        return np.array([self.episode, 0], np.float32), {}

    def step(self, action):
        self.at += 1
        return np.array([self.episode, self.at], np.float32), 1.0, False, self.at >= 50, {}


class Stop(Exception):
    """Ends a run from within."""


@pytest.mark.filterwarnings("ignore")
def test_no_transition_leads_into_another_episode(tmp_path):
    def stop(run, line):
        if line["iteration"] == 15:
            raise Stop

    dqn = rl.DQN(num_envs=2, num_steps=4, gradient_steps=1, batch_size=8, capacity=800, learning_starts=16,
                 hidden_sizes=(8,))  # fmt: skip
    budget = rl.Budget(steps=320, checkpoint_seconds=0, log_points=40, eval_episodes=1, final_episodes=1)
    with pytest.raises(Stop):
        rl.train(dqn, Unrepeatable, budget=budget, out=tmp_path / "run", callbacks=[stop], threads=1)
    run = rl.resume(tmp_path / "run", env=Unrepeatable, inexact=True)
    memory = {name: value[0] for name, value in run.state["replay"].items()}
    for env in range(2):
        for row in range(int(memory["written"][env]) - 1):
            if memory["valid"][row, env]:
                now, after = memory["observation"][row, env], memory["observation"][row + 1, env]
                assert now[0] == after[0] and now[1] + 1 == after[1], (row, now.tolist(), after.tolist())
