"""Deep sea: a grid in which only one of 2^N walks is paid, and every step towards it costs a little."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rlmeta.envs.native.base import NativeEnv, Physics
from rlmeta.envs.native.drawing import BLUE, GREEN, Drawing, Picture, cells
from rlmeta.envs.world import State
from rlmeta.errors import SettingError
from rlmeta.functional import random


@dataclass(frozen=True)
class DeepSea(NativeEnv):
    """The exploration test of bsuite (Osband et al., 2020; Osband, Van Roy, Russo and Wen, 2019, section 4.1).

    From the top left of `size` by `size` cells every step goes one row down, and one column to the right or to the
    left; a step to the right costs move_cost / size, and from the last column it is paid 1. After `size` steps the
    episode terminates. Which of the two actions goes to the right is drawn for every cell, from `mapping_seed`: no
    habit helps, and a random walk finds the reward once in 2^size episodes. The best return is 1 - move_cost.

    The observation is 1 in the cell where one is and 0 elsewhere, all 0 after the last step. Physics may vary
    `mapping_seed` and `move_cost` by learner or row.
    """

    size: int = 10
    """Rows, columns, and steps of an episode."""
    mapping_seed: float = 42.0
    """What the actions' meanings are drawn from; a whole number."""
    move_cost: float = 0.01
    """What an episode of steps to the right alone costs."""
    max_episode_steps: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise SettingError(f"DeepSea: size={self.size}: expected at least 1")

    @cached_property
    def observation_space(self) -> gym.Space:
        """The cells."""
        return gym.spaces.Box(0.0, 1.0, (self.size, self.size), np.float32)

    @cached_property
    def action_space(self) -> gym.Space:
        """Two actions, one of them to the right."""
        return gym.spaces.Discrete(2)

    def reset(self, noise: Tensor, physics: Physics) -> State:
        """The top left."""
        corner = torch.zeros(noise.shape[:-1], dtype=torch.int64, device=noise.device)
        return {"row": corner, "column": corner}

    def right(self, row: Tensor, column: Tensor, physics: Physics) -> Tensor:
        """The action that goes to the right from a cell, `[*B]` int64."""
        seed = torch.as_tensor(physics.get("mapping_seed", self.mapping_seed), device=row.device).to(torch.int64)
        key = random.fold(torch.zeros_like(row) + seed, row * self.size + column)
        return random.integers(key, "deep sea", 0, (), 2)

    def step(self, state: State, action: Tensor, noise: Tensor, physics: Physics) -> tuple[State, Tensor, Tensor]:
        """One row down."""
        row, column = state["row"], state["column"]
        right = action == self.right(row, column, physics)
        cost = right.double() * physics.get("move_cost", self.move_cost) / self.size
        reward = (right & (column == self.size - 1)).double() - cost
        column = (column + torch.where(right, 1, -1)).clamp(0, self.size - 1)
        return {"row": row + 1, "column": column}, reward.float(), row + 1 == self.size

    def observe(self, state: State) -> Tensor:
        """One-hot, `[*B, size, size]`."""
        cell = state["row"] * self.size + state["column"]
        cells = torch.arange(self.size**2, device=cell.device)
        return (cell.unsqueeze(-1) == cells).float().unflatten(-1, (self.size, self.size))

    def drawing(self) -> Drawing:
        """Grid of the cells, with a row below for the end of the episode, and the place of the reward in it."""

        def draw(state: State, physics: Physics) -> Picture:
            here = int(state["row"]), int(state["column"])
            return cells((self.size + 1, self.size), [([(self.size, self.size - 1)], GREEN), ([here], BLUE)])

        return Drawing(draw, 5)
