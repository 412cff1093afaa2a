"""Small environments and set-ups for the agents' tests."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch

from rlmeta.envs.task import Task, task
from rlmeta.functional import random
from rlmeta.learning.settings import hyper_tensors, merge, variants


def start(settings: Any, problem: Task | str, seeds: int | list[int] = 2) -> tuple[Any, Any, Any]:
    """(agent, state, world) of learners of these seeds, or of so many, for every variant of the settings."""
    given = list(range(seeds)) if isinstance(seeds, int) else seeds
    problem = task(problem) if isinstance(problem, str) else problem
    made = variants(settings)
    keys = random.make_keys(given * len(made))
    world = problem.world((len(keys),), made[0].num_envs)
    agent = merge(made).bind(world.observation_space, world.action_space)
    return agent, agent.init(keys, hyper_tensors(made, len(given)), world), world


def train(settings: Any, problem: Task | str, iterations: int, seeds: int = 2) -> tuple[Any, Any]:
    """(agent, state) after some iterations."""
    agent, state, world = start(settings, problem, seeds)
    for i in range(iterations):
        state["progress"] = torch.full_like(state["progress"], i / iterations)
        state, _ = agent.iterate(state, world)
    return agent, state


class Endless(gym.Env):
    """Reward 1 for ever, cut by a time limit: a value of 1 / (1 - gamma), if and only if time limits bootstrap."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, limit: int = 10) -> None:
        self.limit = limit

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.ones(2, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.ones(2, np.float32), 1.0, False, self.t >= self.limit, {}


class Target(gym.Env):
    """One step: a reward of 1 for the action that the observation names, in any kind of action space."""

    observation_space = gym.spaces.Box(0, 1, (2,), np.float32)

    def __init__(self, kind: str = "discrete", masked: bool = False, as_dict: bool = False) -> None:
        spaces = {
            "discrete": gym.spaces.Discrete(2),
            "shifted": gym.spaces.Discrete(2, start=3),
            "multidiscrete": gym.spaces.MultiDiscrete([2, 2]),
            "multibinary": gym.spaces.MultiBinary(2),
            "box": gym.spaces.Box(-1, 1, (1,), np.float32),
        }
        self.kind, self.masked, self.action_space = kind, masked, spaces[kind]
        if as_dict:
            self.observation_space = gym.spaces.Dict({"goal": Target.observation_space, "one": gym.spaces.Discrete(3)})
        if masked:
            self.observation_space = gym.spaces.Dict(
                {"goal": Target.observation_space, "action_mask": gym.spaces.MultiBinary(2)}
            )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.goal = int(self.np_random.integers(2))
        return self._observe(), {}

    def _observe(self):
        goal = np.eye(2, dtype=np.float32)[self.goal]
        if self.masked:
            return {"goal": goal, "action_mask": np.eye(2, dtype=np.int8)[self.goal]}
        return {"goal": goal, "one": 1} if isinstance(self.observation_space, gym.spaces.Dict) else goal

    def step(self, action):
        if self.kind == "box":
            reward = 1.0 - abs(float(action[0]) - (2 * self.goal - 1))
        elif self.kind in ("multidiscrete", "multibinary"):
            reward = float(np.mean(np.asarray(action) == self.goal))
        else:
            reward = float(int(action) == self.goal + (3 if self.kind == "shifted" else 0))
        if self.masked:
            assert int(action) == self.goal, "a masked action was taken"
        return self._observe(), reward, True, False, {}
