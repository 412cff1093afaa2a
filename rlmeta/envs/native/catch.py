"""Catch: move a paddle under a ball that falls, seen as a picture (bsuite; Osband et al., 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rlmeta.envs.native.base import NativeEnv, Physics
from rlmeta.envs.native.drawing import BLUE, RED, Drawing, Picture, cells
from rlmeta.envs.world import State
from rlmeta.errors import SettingError


@dataclass(frozen=True)
class Catch(NativeEnv):
    """Catch of bsuite: a ball falls a row a step, and pays 1 if the paddle is under it in the last row, -1 otherwise.

    The ball starts in a column drawn for every episode, the paddle in the middle; an episode has `rows` - 1 steps. The
    observation is a picture `[rows, columns, 1]` of bytes, 1 where ball and paddle are.
    """

    rows: int = 10
    columns: int = 5
    max_episode_steps: int | None = None

    costly_observation = True
    reset_noise = 1

    def __post_init__(self) -> None:
        if self.rows < 2 or self.columns < 1:
            raise SettingError(
                f"Catch: rows={self.rows}, columns={self.columns}: expected at least 2 rows and a column"
            )

    @cached_property
    def observation_space(self) -> gym.Space:
        """Space of pictures of one channel."""
        return gym.spaces.Box(0, 1, (self.rows, self.columns, 1), np.uint8)

    @cached_property
    def action_space(self) -> gym.Space:
        """Space of the paddle's move: 0 left, 1 none, 2 right."""
        return gym.spaces.Discrete(3)

    def reset(self, noise: Tensor, physics: Physics) -> State:
        """The ball in a random column of the first row."""
        column = (noise[..., 0] * self.columns).long()
        return {
            "row": torch.zeros_like(column),
            "column": column,
            "paddle": torch.full_like(column, self.columns // 2),
        }

    def step(self, state: State, action: Tensor, noise: Tensor, physics: Physics) -> tuple[State, Tensor, Tensor]:
        """Move the paddle, then the ball."""
        paddle = (state["paddle"] + action - 1).clamp(0, self.columns - 1)
        row, column = state["row"] + 1, state["column"]
        over = row == self.rows - 1
        reward = torch.where(paddle == column, 1.0, -1.0) * over
        return {"row": row, "column": column, "paddle": paddle}, reward.float(), over

    def observe(self, state: State) -> Tensor:
        """Picture `[*B, rows, columns, 1]`."""
        ball, paddle = self.columns * state["row"] + state["column"], self.columns * (self.rows - 1) + state["paddle"]
        cells = torch.arange(self.rows * self.columns, device=ball.device)
        marked = (cells == ball.unsqueeze(-1)) | (cells == paddle.unsqueeze(-1))
        return marked.to(torch.uint8).unflatten(-1, (self.rows, self.columns, 1))

    def drawing(self) -> Drawing:
        """Grid of ball and paddle."""

        def draw(state: State, physics: Physics) -> Picture:
            ball, paddle = (int(state["row"]), int(state["column"])), (self.rows - 1, int(state["paddle"]))
            return cells((self.rows, self.columns), [([paddle], BLUE), ([ball], RED)])

        return Drawing(draw, 5)
