"""Breakout of MinAtar: a paddle keeps a ball in play that removes bricks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.envs.native.base import NativeEnv, Physics
from rlmeta.envs.native.minatar.rules import (
    ACTIONS,
    SIDE,
    action_space,
    aside,
    at,
    mark,
    observation_space,
    picture,
    require_probability,
    sticky,
)
from rlmeta.envs.world import State

_BOTTOM = SIDE * (SIDE - 1)
"""The first cell of the last row, in which the paddle moves."""
_STARTS = torch.tensor([[3 * SIDE, 2], [3 * SIDE + 9, 3]], device="cpu")
"""Cell and direction of the ball at the start: from the left or from the right."""
_WALL = torch.zeros(SIDE * SIDE, dtype=torch.bool, device="cpu")
_WALL[SIDE : 4 * SIDE] = True


def _flights() -> Tensor:
    """Cell and direction of the ball after a step, reflected at walls and ceiling: `[400, 2]`, by 4 cell + direction.

    Directions: 0 left and up, 1 right and up, 2 right and down, 3 left and down.
    """
    flights = []
    for cell in range(SIDE * SIDE):
        for direction in range(4):
            row, column = divmod(cell, SIDE)
            row += 1 if direction in (2, 3) else -1
            column += 1 if direction in (1, 2) else -1
            after = direction
            if not 0 <= column < SIDE:
                column, after = min(max(column, 0), SIDE - 1), after ^ 1
            if row < 0:
                row, after = 0, 3 - after
            flights.append((min(row, SIDE - 1) * SIDE + column, after))
    return torch.tensor(flights, device="cpu")


_FLIGHTS = _flights()


@dataclass(frozen=True)
class Breakout(NativeEnv):
    """Breakout of the minatar package 1.0.15: a brick pays 1, a ball that is missed ends the episode.

    The channels are paddle, ball, trail (the ball's last cell) and bricks. The three rows of bricks return when the
    ball comes down after the last one. Only the side from which the ball starts and sticky actions are random; there is
    no time limit. As in the package, the action that a sticky step repeats may be of the episode before.
    """

    sticky_action_prob: float = 0.1
    """Probability that the last action is done again in place of the chosen one."""
    minimal_actions: bool = True
    """Whether there are only the actions that matter here (none, left, right), as in MinAtar/Breakout-v1, or all 6."""
    max_episode_steps: int | None = None

    costly_observation = True
    reset_noise = 1
    step_noise = 1

    def __post_init__(self) -> None:
        require_probability("Breakout", self.sticky_action_prob)

    @property
    def actions(self) -> str:
        """The action set: a letter each."""
        return "nlr" if self.minimal_actions else ACTIONS

    @cached_property
    def observation_space(self) -> gym.Space:
        """Pictures of 4 channels."""
        return observation_space(4)

    @cached_property
    def action_space(self) -> gym.Space:
        """The action set."""
        return action_space(self.actions)

    def reset(self, noise: Tensor, physics: Physics) -> State:
        """The ball in the fourth row, on the left if the noise is below a half."""
        ball, direction = _STARTS.to(noise.device)[(noise[..., 0] >= 0.5).long()].unbind(-1)
        return {
            "paddle": torch.full_like(ball, 4),
            "ball": ball,
            "trail": ball,
            "direction": direction,
            "bricks": _WALL.to(noise.device).expand(*ball.shape, -1).clone(),
            "passing": torch.zeros_like(ball, dtype=torch.bool),
            "last_action": torch.zeros_like(ball),
        }

    def restart(self, state: State, noise: Tensor, physics: Physics) -> State:
        """As `reset`, with the last action kept for a sticky first step."""
        return {**self.reset(noise, physics), "last_action": state["last_action"]}

    def step(self, state: State, action: Tensor, noise: Tensor, physics: Physics) -> tuple[State, Tensor, Tensor]:
        """Move the paddle, then the ball; a ball that has just hit a brick passes through the next one."""
        probability = physics.get("sticky_action_prob", self.sticky_action_prob)
        action = sticky(state, action, self.actions, noise[..., 0], probability)
        paddle = (state["paddle"] + aside(action)).clamp(0, SIDE - 1)
        ball, bricks = state["ball"], state["bricks"]
        cell, direction = _FLIGHTS.to(ball.device)[4 * ball + state["direction"]].unbind(-1)
        old_column, column = ball % SIDE, cell % SIDE
        brick, low = at(bricks, cell), cell >= _BOTTOM
        hit = brick & ~state["passing"]
        straight = low & (old_column == paddle)
        missed = low & (old_column != paddle) & (column != paddle)
        returned = low & ~missed
        emptied = low & ~bricks.any(-1)
        turned = torch.where(hit | straight, 3 - direction, torch.where(returned, direction ^ 2, direction))
        bricks = bricks & ~(hit.unsqueeze(-1) & mark(cell)) | (emptied.unsqueeze(-1) & _WALL.to(ball.device))
        new = {
            "paddle": paddle,
            "ball": torch.where(hit | returned, ball - old_column + column, cell),
            "trail": ball,
            "direction": turned,
            "bricks": bricks,
            "passing": brick,
            "last_action": action,
        }
        return new, hit.float(), missed

    def observe(self, state: State) -> Tensor:
        """Picture `[*B, 10, 10, 4]`."""
        return picture(mark(state["paddle"] + _BOTTOM), mark(state["ball"]), mark(state["trail"]), state["bricks"])
