"""2D navigation to a goal that the observation does not show."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rlmeta.envs.native.base import NativeEnv, Physics
from rlmeta.envs.native.drawing import BLUE, GREEN, Drawing, Picture, plane
from rlmeta.envs.world import State


@dataclass(frozen=True)
class Navigation(NativeEnv):
    """2D navigation, the point robot of MAML (Finn, Abbeel and Levine, 2017).

    Episodes begin at the origin. A step moves by `speed` times the action, and its reward is minus the distance to the
    goal after it; the episode terminates if both coordinates are within `radius` of the goal's. A family draws the
    goal, which only the rewards reveal. The only leaf of the state, `state` `[*B, 2]`, is the position.
    """

    goal_x: float = 0.3
    goal_y: float = 0.3
    speed: float = 0.1
    """Distance that an action of 1 moves along an axis."""
    radius: float = 0.01
    max_episode_steps: int | None = 100

    @cached_property
    def observation_space(self) -> gym.Space:
        """Space of the position."""
        return gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)

    @cached_property
    def action_space(self) -> gym.Space:
        """Space of the move, in units of `speed`."""
        return gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, noise: Tensor, physics: Physics) -> State:
        """Initial state: the origin."""
        return {"state": torch.zeros((*noise.shape[:-1], 2), dtype=torch.float64, device=noise.device)}

    def step(self, state: State, action: Tensor, noise: Tensor, physics: Physics) -> tuple[State, Tensor, Tensor]:
        """Move, with minus the distance to the goal as reward."""
        speed, radius = physics.get("speed", self.speed), physics.get("radius", self.radius)
        x, y = state["state"].unbind(-1)
        x, y = x + speed * action[..., 0], y + speed * action[..., 1]
        dx, dy = x - physics.get("goal_x", self.goal_x), y - physics.get("goal_y", self.goal_y)
        there = (dx.abs() < radius) & (dy.abs() < radius)
        return {"state": torch.stack((x, y), -1)}, -torch.hypot(dx, dy).float(), there

    def observe(self, state: State) -> Tensor:
        """Observation: the position in float32."""
        return state["state"].float()

    def drawing(self) -> Drawing:
        """The plane with the goal and the robot; a robot that leaves it is drawn at its edge."""

        def draw(state: State, physics: Physics) -> Picture:
            goal = [float(physics.get(name, getattr(self, name))) for name in ("goal_x", "goal_y")]
            span = max(0.6, *map(abs, goal)) * 1.2
            here = state["state"].clamp(-span, span).tolist()
            return plane(span, [(goal, float(physics.get("radius", self.radius)), GREEN), (here, 0.0, BLUE)])

        return Drawing(draw, 10)
