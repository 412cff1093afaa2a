"""Multi-armed bandits, with episodes of one pull."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.envs.native.base import NativeEnv, Physics
from rlmeta.envs.world import State
from rlmeta.errors import SettingError


@dataclass(frozen=True)
class Bandit(NativeEnv):
    """Multi-armed bandit with `len(mean)` arms; the observation is always 0 and every pull ends an episode.

    The reward of arm a is 1 with probability mean[a], else 0 ("bernoulli"), or normal with that mean and the standard
    deviation `std` ("gaussian").
    """

    mean: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.5)
    reward: Literal["bernoulli", "gaussian"] = "bernoulli"
    std: float = 1.0
    max_episode_steps: int | None = None

    step_noise = 1

    def __post_init__(self) -> None:
        if self.reward not in ("bernoulli", "gaussian"):
            raise SettingError(f"reward={self.reward!r}: expected 'bernoulli' or 'gaussian'")
        if not self.mean or (self.reward == "bernoulli" and not all(0 <= p <= 1 for p in self.mean)):
            raise SettingError(f"mean={self.mean!r}: expected one number an arm, in [0, 1] if the arms are Bernoulli")

    @cached_property
    def observation_space(self) -> gym.Space:
        """Space of the only state."""
        return gym.spaces.Discrete(1)

    @cached_property
    def action_space(self) -> gym.Space:
        """Space of the arms."""
        return gym.spaces.Discrete(len(self.mean))

    def constants(self) -> dict[str, Tensor]:
        """Constants that physics may override: `mean` `[arms]`, and `std` of Gaussian arms."""
        mean = torch.tensor(self.mean, dtype=torch.float64, device="cpu")
        return {"mean": mean} if self.reward == "bernoulli" else {"mean": mean, **super().constants()}

    def reset(self, noise: Tensor, physics: Physics) -> State:
        """Initial state, always 0."""
        return {"state": torch.zeros(noise.shape[:-1], dtype=torch.int64, device=noise.device)}

    def step(self, state: State, action: Tensor, noise: Tensor, physics: Physics) -> tuple[State, Tensor, Tensor]:
        """Pull an arm."""
        if "mean" in physics:
            mean = physics["mean"].gather(-1, action.unsqueeze(-1)).squeeze(-1)
        else:
            mean = torch.tensor(self.mean, dtype=torch.float64, device=action.device)[action]
        if self.reward == "bernoulli":
            reward = noise[..., 0] < mean
        else:
            reward = torch.special.ndtri(noise[..., 0]) * physics.get("std", self.std) + mean
        return state, reward.float(), torch.ones_like(action, dtype=torch.bool)

    def observe(self, state: State) -> Tensor:
        """Observation, always 0."""
        return state["state"]
