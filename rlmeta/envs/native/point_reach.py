"""Point reach: a goal-conditioned task with a sparse reward, for hindsight replay (Andrychowicz et al., 2017)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rlmeta.envs.native.base import NativeEnv, Physics
from rlmeta.envs.native.drawing import BLUE, GREEN, Drawing, Picture, plane
from rlmeta.envs.world import State
from rlmeta.errors import SettingError


@dataclass(frozen=True)
class PointReach(NativeEnv):
    """Point in the plane that has to reach a goal, of which nothing but success is paid.

    The point starts at (0, 0) and moves by `stride` times an action in [-1, 1]^2, within [-1, 1]^2. The goal lies in a
    random direction, at a distance from `nearest` to 1, farther than a random walk comes. A step that ends within
    `radius` of the goal pays 1 and terminates the episode, every other one pays 0: the return is the success. As in
    Gymnasium-Robotics' GoalEnv an observation is a dictionary of `observation`, `achieved_goal` and `desired_goal`, and
    `compute_reward` and `compute_terminated` say what a step would have paid for another goal.
    """

    stride: float = 0.05
    """Longest step along each axis."""
    radius: float = 0.05
    """Distance from the goal that counts as success."""
    nearest: float = 0.5
    """Least distance of the goal from the start."""
    max_episode_steps: int | None = 50

    reset_noise = 2

    def __post_init__(self) -> None:
        if not (self.stride > 0 and self.radius > 0 and 0 <= self.nearest <= 1):
            raise SettingError(
                f"PointReach: stride={self.stride}, radius={self.radius}, nearest={self.nearest}: expected the first "
                "two above 0, the last from 0 to 1"
            )

    @cached_property
    def observation_space(self) -> gym.Space:
        """Space of position, achieved goal (the position) and desired goal."""
        place = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        return gym.spaces.Dict({"observation": place, "achieved_goal": place, "desired_goal": place})

    @cached_property
    def action_space(self) -> gym.Space:
        """Space of the move along each axis, in strides."""
        return gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, noise: Tensor, physics: Physics) -> State:
        """The point at (0, 0), the goal around it: direction and distance are uniform."""
        angle, part = (2 * math.pi * noise[..., 0]), noise[..., 1]
        nearest = physics.get("nearest", self.nearest)
        distance = nearest + (1 - nearest) * part
        goal = torch.stack((angle.cos() * distance, angle.sin() * distance), -1)
        return {"position": torch.zeros_like(goal), "goal": goal}

    def step(self, state: State, action: Tensor, noise: Tensor, physics: Physics) -> tuple[State, Tensor, Tensor]:
        """One move."""
        stride = physics.get("stride", self.stride)
        stride = stride.unsqueeze(-1) if isinstance(stride, Tensor) else stride
        position = (state["position"] + stride * action).clamp(-1, 1)
        # in the precision of observations, so that a stored step can be paid again
        reached = _near(position.float(), state["goal"].float(), physics.get("radius", self.radius))
        return {"position": position, "goal": state["goal"]}, reached.float(), reached

    def compute_reward(self, achieved_goal: Tensor, desired_goal: Tensor) -> Tensor:
        """Reward of a step that ends at `achieved_goal` `[*B, 2]` for the goal `desired_goal` `[*B, 2]`: `[*B]`."""
        return self.compute_terminated(achieved_goal, desired_goal).float()

    def compute_terminated(self, achieved_goal: Tensor, desired_goal: Tensor) -> Tensor:
        """Whether a step that ends at `achieved_goal` would have terminated the episode for `desired_goal`: `[*B]`."""
        return _near(achieved_goal, desired_goal, self.radius)

    def observe(self, state: State) -> dict[str, Tensor]:
        """Position and goals."""
        position = state["position"].float()
        return {"observation": position, "achieved_goal": position, "desired_goal": state["goal"].float()}

    def drawing(self) -> Drawing:
        """The plane with the goal, as large as what counts as success, and the point."""

        def draw(state: State, physics: Physics) -> Picture:
            radius = float(physics.get("radius", self.radius))
            return plane(1.05, [(state["goal"].tolist(), radius, GREEN), (state["position"].tolist(), 0.0, BLUE)])

        return Drawing(draw, 10)


def _near(position: Tensor, goal: Tensor, radius: float | Tensor) -> Tensor:
    return (position - goal).square().sum(-1) <= radius * radius
