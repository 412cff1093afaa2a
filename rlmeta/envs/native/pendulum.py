"""Pendulum: swing a pendulum up and hold it there by a bounded torque."""

from __future__ import annotations

import math
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
class Pendulum(NativeEnv):
    """Pendulum-v1 of gymnasium.

    theta'' = 3 g / (2 length) sin theta + 3 / (mass length^2) torque, and the cost of a step is
    theta^2 + 0.1 theta'^2 + 0.001 torque^2 of the state it starts from, with theta in [-pi, pi). The only leaf of the
    state, `state` `[*B, 2]`, is theta (0 is upright) and theta'.
    """

    g: float = 10.0
    mass: float = 1.0
    length: float = 1.0
    dt: float = 0.05
    max_speed: float = 8.0
    max_torque: float = 2.0
    initial_angle: float = math.pi
    """The initial angle is uniform in [-initial_angle, initial_angle]."""
    initial_velocity: float = 1.0
    observe_velocity: bool = True
    """Whether the velocity is observed, beside the cosine and sine of the angle."""
    max_episode_steps: int | None = 200

    reset_noise = 2

    @cached_property
    def observation_space(self) -> gym.Space:
        """Space of the cosine and sine of the angle, and the angular velocity if it is observed."""
        high = np.array([1.0, 1.0, self.max_speed][: 3 if self.observe_velocity else 2], dtype=np.float32)
        return gym.spaces.Box(-high, high, dtype=np.float32)

    @cached_property
    def action_space(self) -> gym.Space:
        """Space of the torque."""
        return gym.spaces.Box(-self.max_torque, self.max_torque, (1,), np.float32)

    def reset(self, noise: Tensor, physics: Physics) -> State:
        """Initial state: any angle, with a small velocity."""
        angle, velocity = (noise * 2).sub_(1).unbind(-1)
        angle = angle * physics.get("initial_angle", self.initial_angle)
        return {"state": torch.stack((angle, velocity * physics.get("initial_velocity", self.initial_velocity)), -1)}

    def step(self, state: State, action: Tensor, noise: Tensor, physics: Physics) -> tuple[State, Tensor, Tensor]:
        """Apply the torque for `dt` seconds; episodes never terminate."""
        theta, velocity = state["state"].unbind(-1)
        length, dt = physics.get("length", self.length), physics.get("dt", self.dt)
        max_torque, max_speed = physics.get("max_torque", self.max_torque), physics.get("max_speed", self.max_speed)
        torque = clip(action[..., 0], -max_torque, max_torque)
        angle = torch.remainder(theta + math.pi, 2 * math.pi).sub_(math.pi)
        cost = angle.square_() + velocity.square().mul_(0.1) + torque.square().mul_(0.001)
        pull = theta.sin().mul_(3 * physics.get("g", self.g) / (2 * length))
        push = torque * (3.0 / (physics.get("mass", self.mass) * length**2))
        velocity = clip(velocity + (pull + push) * dt, -max_speed, max_speed)
        new = torch.stack((theta + velocity * dt, velocity), -1)
        return {"state": new}, -cost.float(), torch.zeros_like(theta, dtype=torch.bool)

    def observe(self, state: State) -> Tensor:
        """Observation: cosine and sine of the angle, and velocity if it is observed, in float32."""
        theta, velocity = state["state"].unbind(-1)
        seen = (theta.cos(), theta.sin(), velocity) if self.observe_velocity else (theta.cos(), theta.sin())
        return torch.stack(seen, -1).float()

    def drawing(self) -> Drawing:
        """Gymnasium's picture, without the arrow of the torque, which is in no state."""
        env, fps = twin("Pendulum-v1")

        def draw(state: State, physics: Physics) -> Picture:
            env.state = state["state"].tolist()
            return env.render()

        return Drawing(draw, fps)
