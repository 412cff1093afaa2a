"""Acrobot: swing the free end of a two-link pendulum above a height by a torque at the middle joint (Sutton, 1996)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rlmeta.envs.native.base import NativeEnv, Physics, clip
from rlmeta.envs.native.drawing import Drawing, Picture, twin
from rlmeta.envs.world import State
from rlmeta.errors import SettingError


@dataclass(frozen=True)
class Acrobot(NativeEnv):
    """Acrobot-v1 of gymnasium: reward -1 per step until the free end is above the target height.

    The only leaf of the state, `state` `[*B, 4]`, is theta1 (0 hangs down), theta2 (relative to the first link),
    theta1', theta2', integrated over `dt` by one Runge-Kutta step of fourth order.
    """

    dt: float = 0.2
    link_length_1: float = 1.0
    link_mass_1: float = 1.0
    link_mass_2: float = 1.0
    link_com_1: float = 0.5
    """Distance of the first link's centre of mass from its joint."""
    link_com_2: float = 0.5
    link_moi: float = 1.0
    """Moment of inertia of either link."""
    gravity: float = 9.8
    torque: float = 1.0
    max_vel_1: float = 4 * math.pi
    max_vel_2: float = 9 * math.pi
    target_height: float = 1.0
    initial_range: float = 0.1
    """The initial state is uniform in [-initial_range, initial_range]^4."""
    book_or_nips: Literal["book", "nips"] = "book"
    """Equations of motion of Sutton and Barto's book, or of the 1996 paper, which lack a term."""
    max_episode_steps: int | None = 500

    reset_noise = 4

    def __post_init__(self) -> None:
        if self.book_or_nips not in ("book", "nips"):
            raise SettingError(f"book_or_nips={self.book_or_nips!r}: expected 'book' or 'nips'")

    @cached_property
    def observation_space(self) -> gym.Space:
        """Space of the cosine and sine of theta1 and of theta2, and both angular velocities."""
        high = np.array([1.0, 1.0, 1.0, 1.0, self.max_vel_1, self.max_vel_2], dtype=np.float32)
        return gym.spaces.Box(-high, high, dtype=np.float32)

    @cached_property
    def action_space(self) -> gym.Space:
        """Space of the torque on the middle joint: -1, 0 or 1."""
        return gym.spaces.Discrete(3)

    def reset(self, noise: Tensor, physics: Physics) -> State:
        """Initial state: hanging, almost at rest."""
        span = physics.get("initial_range", self.initial_range)
        span = span.unsqueeze(-1) if isinstance(span, Tensor) else span
        return {"state": (noise * (2 * span)).sub_(span)}

    def step(self, state: State, action: Tensor, noise: Tensor, physics: Physics) -> tuple[State, Tensor, Tensor]:
        """Apply the torque for `dt` seconds."""
        dt = physics.get("dt", self.dt)
        dt = dt.unsqueeze(-1) if isinstance(dt, Tensor) else dt
        torque = (action - 1).to(torch.float64).mul_(physics.get("torque", self.torque))
        old = state["state"]
        k1 = self._derivative(old, torque, physics)
        k2 = self._derivative(old + k1 * (dt / 2), torque, physics)
        k3 = self._derivative(old + k2 * (dt / 2), torque, physics)
        k4 = self._derivative(old + k3 * dt, torque, physics)
        moved = old + (k1 + 2 * k2 + 2 * k3 + k4) * (dt / 6)
        angles, (velocity_1, velocity_2) = _wrap(moved[..., :2]), moved[..., 2:].unbind(-1)
        max_1, max_2 = physics.get("max_vel_1", self.max_vel_1), physics.get("max_vel_2", self.max_vel_2)
        velocities = torch.stack((clip(velocity_1, -max_1, max_1), clip(velocity_2, -max_2, max_2)), -1)
        height = -angles[..., 0].cos() - angles.sum(-1).cos()
        terminated = height > physics.get("target_height", self.target_height)
        return {"state": torch.cat((angles, velocities), -1)}, terminated.float() - 1, terminated

    def observe(self, state: State) -> Tensor:
        """Observation: cosines and sines of the angles, and velocities, in float32."""
        angles, velocities = state["state"].split(2, -1)
        waves = torch.stack((angles.cos(), angles.sin()), -1).flatten(-2)
        return torch.cat((waves, velocities), -1).float()

    def drawing(self) -> Drawing:
        """Gymnasium's picture, with the row's own first link."""
        env, fps = twin("Acrobot-v1")

        def draw(state: State, physics: Physics) -> Picture:
            env.state = state["state"].tolist()
            env.LINK_LENGTH_1 = float(physics.get("link_length_1", self.link_length_1))
            return env.render()

        return Drawing(draw, fps)

    def _derivative(self, state: Tensor, torque: Tensor, physics: Physics) -> Tensor:
        theta_1, theta_2, dtheta_1, dtheta_2 = state.unbind(-1)
        m1, m2 = physics.get("link_mass_1", self.link_mass_1), physics.get("link_mass_2", self.link_mass_2)
        lc1, lc2 = physics.get("link_com_1", self.link_com_1), physics.get("link_com_2", self.link_com_2)
        l1 = physics.get("link_length_1", self.link_length_1)
        moi = physics.get("link_moi", self.link_moi)
        g = physics.get("gravity", self.gravity)
        reach = m2 * l1 * lc2
        stretch, bend = theta_2.cos().mul_(reach), theta_2.sin().mul_(reach)
        d1 = (stretch * 2).add_(m1 * lc1**2 + m2 * (l1**2 + lc2**2) + 2 * moi)
        d2 = stretch.add_(m2 * lc2**2 + moi)
        phi_2 = (theta_1 + theta_2).sin_().mul_(m2 * lc2 * g)
        phi_1 = theta_1.sin().mul_((m1 * lc1 + m2 * l1) * g).add_(phi_2)
        phi_1.sub_((dtheta_1 * 2).add_(dtheta_2).mul_(dtheta_2).mul_(bend))
        ratio = d2 / d1
        drive = (ratio * phi_1).add_(torque).sub_(phi_2)
        if self.book_or_nips == "book":
            drive.sub_(dtheta_1.square().mul_(bend))
        ddtheta_2 = drive.div_((d2 * ratio).neg_().add_(m2 * lc2**2 + moi))
        ddtheta_1 = (d2 * ddtheta_2).add_(phi_1).div_(d1).neg_()
        return torch.stack((dtheta_1, dtheta_2, ddtheta_1, ddtheta_2), -1)


def _wrap(angle: Tensor) -> Tensor:
    """Wrap an angle into [-pi, pi]; an angle inside is not changed."""
    turn = 2 * math.pi
    above = ((angle - math.pi) / turn).ceil_().clamp_(min=0)
    below = ((angle + math.pi) / turn).floor_().clamp_(max=0)
    return angle - (above + below) * turn
