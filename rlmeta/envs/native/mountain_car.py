"""Mountain car: drive an underpowered car out of a valley by swinging (Moore, 1990)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rlmeta.envs.native.base import NativeEnv, Physics, clip
from rlmeta.envs.native.drawing import Drawing, Picture, twin
from rlmeta.envs.world import State


@dataclass(frozen=True)
class _MountainCar(NativeEnv):
    """Dynamics of both mountain cars. The only leaf of the state, `state` `[*B, 2]`, is position and velocity.

    With the push u of an action, velocity' = clip(velocity + u - gravity cos(3 position)) and
    position' = clip(position + velocity'); the left wall stops the car.
    """

    min_position: float = -1.2
    max_position: float = 0.6
    max_speed: float = 0.07
    goal_position: float = 0.5
    goal_velocity: float = 0.0
    gravity: float = 0.0025
    initial_low: float = -0.6
    """The initial position is uniform in [initial_low, initial_high], the initial velocity 0."""
    initial_high: float = -0.4
    max_episode_steps: int | None = 200

    reset_noise = 1

    @cached_property
    def observation_space(self) -> gym.Space:
        """Space of position and velocity."""
        low = np.array([self.min_position, -self.max_speed], dtype=np.float32)
        high = np.array([self.max_position, self.max_speed], dtype=np.float32)
        return gym.spaces.Box(low, high, dtype=np.float32)

    def reset(self, noise: Tensor, physics: Physics) -> State:
        """Initial state: at rest, near the bottom of the valley."""
        low = physics.get("initial_low", self.initial_low)
        position = noise[..., 0] * (physics.get("initial_high", self.initial_high) - low) + low
        return {"state": torch.stack((position, torch.zeros_like(position)), -1)}

    def observe(self, state: State) -> Tensor:
        """Observation: the state in float32."""
        return state["state"].float()

    def drawing(self) -> Drawing:
        """Gymnasium's picture, with the row's own walls and goal."""
        env, fps = twin("MountainCar-v0")

        def draw(state: State, physics: Physics) -> Picture:
            env.state = state["state"].tolist()
            for name in ("min_position", "max_position", "goal_position"):
                setattr(env, name, float(physics.get(name, getattr(self, name))))
            return env.render()

        return Drawing(draw, fps)

    def _drive(self, state: State, push: Tensor, physics: Physics) -> tuple[State, Tensor]:
        position, velocity = state["state"].unbind(-1)
        max_speed = physics.get("max_speed", self.max_speed)
        min_position = physics.get("min_position", self.min_position)
        slope = (position * 3).cos_().mul_(physics.get("gravity", self.gravity))
        velocity = clip(velocity + push.sub_(slope), -max_speed, max_speed)
        position = clip(position + velocity, min_position, physics.get("max_position", self.max_position))
        velocity = velocity.masked_fill((position == min_position) & (velocity < 0), 0.0)
        terminated = (position >= physics.get("goal_position", self.goal_position)) & (
            velocity >= physics.get("goal_velocity", self.goal_velocity)
        )
        return {"state": torch.stack((position, velocity), -1)}, terminated


@dataclass(frozen=True)
class MountainCar(_MountainCar):
    """MountainCar-v0 of gymnasium: reward -1 per step until the goal; actions push left, not at all, right."""

    force: float = 0.001

    @cached_property
    def action_space(self) -> gym.Space:
        """Space of the push: 0 left, 1 none, 2 right."""
        return gym.spaces.Discrete(3)

    def step(self, state: State, action: Tensor, noise: Tensor, physics: Physics) -> tuple[State, Tensor, Tensor]:
        """Push the car for a time step."""
        push = (action - 1).to(torch.float64).mul_(physics.get("force", self.force))
        new, terminated = self._drive(state, push, physics)
        return new, torch.full_like(terminated, -1.0, dtype=torch.float32), terminated


@dataclass(frozen=True)
class MountainCarContinuous(_MountainCar):
    """MountainCarContinuous-v0 of gymnasium: the action is the force; reward 100 at the goal, -0.1 force^2 per step.

    gymnasium rounds its state to float32 after every step, so that long episodes drift from these by about 1e-7.
    """

    goal_position: float = 0.45
    power: float = 0.0015
    max_action: float = 1.0
    max_episode_steps: int | None = 999

    @cached_property
    def action_space(self) -> gym.Space:
        """Space of the force, from left to right."""
        return gym.spaces.Box(-self.max_action, self.max_action, (1,), np.float32)

    def step(self, state: State, action: Tensor, noise: Tensor, physics: Physics) -> tuple[State, Tensor, Tensor]:
        """Push the car for a time step; the force is clipped, its cost is not."""
        force = action[..., 0]
        max_action = physics.get("max_action", self.max_action)
        push = clip(force, -max_action, max_action) * physics.get("power", self.power)
        new, terminated = self._drive(state, push, physics)
        return new, (terminated * 100.0 - force.square() * 0.1).float(), terminated
