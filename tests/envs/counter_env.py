"""Conformance environment: observes its step and episode numbers; actions determine how an episode ends."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

CONTINUE, TERMINATE, TRUNCATE, BOTH = range(4)


class CounterEnv(gym.Env[Any, Any]):
    """Environment that observes (step, episode), with reward 10 episode + step; consecutive resets count as one."""

    observation_space: gym.Space[Any] = spaces.Box(0, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(4)

    def __init__(self, nested: bool = False) -> None:
        self.nested = nested
        if nested:
            step, episode = spaces.Box(0, np.inf, (1,), np.float32), spaces.Box(0, np.inf, (), np.float64)
            self.observation_space = spaces.Dict({"step": step, "more": spaces.Tuple((episode, spaces.Discrete(50)))})
        self.count, self.episode = 0, 0

    def _observe(self) -> Any:
        if self.nested:
            return {"step": np.array([self.count], np.float32), "more": (np.array(float(self.episode)), self.count)}
        return np.array([self.count, self.episode], np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode += self.count > 0
        self.count = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.count += 1
        ends, cuts = action in (TERMINATE, BOTH), action in (TRUNCATE, BOTH)
        return self._observe(), 10.0 * self.episode + self.count, ends, cuts, {"seen": self.count}


def step_and_episode(observation: Any) -> tuple[Tensor, Tensor]:
    """Step and episode numbers from the observation of a (nested) counter, float64 `[...]`."""
    if isinstance(observation, dict):
        assert torch.equal(observation["more"]["1"], observation["step"][..., 0].long())
        return observation["step"][..., 0].double(), observation["more"]["0"].double()
    return observation[..., 0].double(), observation[..., 1].double()


def schedule(row: Tensor, step: Tensor, episode: Tensor) -> Tensor:
    """Actions that end episode e of row r after 1 + (3 r + 5 e) mod 7 steps, by each of the three ways in turn.

    Past that step (on a final observation) it asks for an end, which would show if it were not ignored.
    """
    length = 1 + (3 * row + 5 * episode.long()) % 7
    kind = 1 + (row + episode.long()) % 3
    return torch.where(step.long() + 1 < length, torch.zeros_like(kind), kind)
