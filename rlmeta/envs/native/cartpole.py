"""CartPole: balance a pole hinged to a cart that is pushed left or right (Barto, Sutton and Anderson, 1983)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rlmeta.envs.native.base import NativeEnv, Physics
from rlmeta.envs.native.drawing import Drawing, Picture, twin
from rlmeta.envs.world import State
from rlmeta.errors import SettingError


@dataclass(frozen=True)
class CartPole(NativeEnv):
    """CartPole-v1 of gymnasium: reward 1 per step while the pole is upright.

    The state has `state` `[*B, 4]`, x, x', theta, theta' in m, m/s, rad, rad/s, and `noise`, of a noisy observation.

    With F = force_mag or -force_mag, m = masspole, M = masspole + masscart, l = length (half the pole's), c = m l / M,
    temp = F / M + c theta'^2 sin theta,
    theta'' = (gravity sin theta - cos theta temp) / (4/3 l - c cos^2 theta) and
    x'' = temp - c theta'' cos theta.
    """

    gravity: float = 9.8
    masscart: float = 1.0
    masspole: float = 0.1
    length: float = 0.5
    """Half the length of the pole."""
    force_mag: float = 10.0
    tau: float = 0.02
    """Time step in seconds."""
    x_threshold: float = 2.4
    theta_threshold: float = 12 * 2 * math.pi / 360
    initial_range: float = 0.05
    """The initial state is uniform in [-initial_range, initial_range]^4."""
    kinematics_integrator: Literal["euler", "semi-implicit"] = "euler"
    sutton_barto_reward: bool = False
    """Whether the reward is 0 per step and -1 at the end, instead of 1 per step."""
    fixed_horizon: bool = False
    """Whether episodes never terminate, as in seals/CartPole-v0: the angle wraps around and the reward is 1 within the
    thresholds, 0 outside. A constant reward then teaches nothing, since it cannot prolong an episode."""
    observe_velocities: bool = True
    """False for partial observability: velocities are hidden, and an agent needs memory to balance the pole."""
    observation_noise: float | None = None
    """Standard deviation of normal noise on every entry of an observation, clipped to its space; None for none."""
    step_reward: float = 1.0
    """Reward of a step; POPGym's tasks pay 1 / max_episode_steps, so that the best return is 1."""
    max_episode_steps: int | None = 500

    def __post_init__(self) -> None:
        if self.kinematics_integrator not in ("euler", "semi-implicit"):
            raise SettingError(
                f"kinematics_integrator={self.kinematics_integrator!r}: expected 'euler' or 'semi-implicit'"
            )
        if self.fixed_horizon and self.max_episode_steps is None:
            raise SettingError("fixed_horizon=True without max_episode_steps: such an episode would never end")
        if self.observation_noise is not None and not 0 < self.observation_noise < math.inf:
            raise SettingError(
                f"observation_noise={self.observation_noise}: expected a standard deviation above 0, or None for none"
            )

    @property
    def step_noise(self) -> int:
        """Number of random numbers of a step: one for each entry of a noisy observation."""
        return 0 if self.observation_noise is None else 4 if self.observe_velocities else 2

    @property
    def reset_noise(self) -> int:
        """Number of random numbers of a reset: 4 of the initial state, and those of its observation."""
        return 4 + self.step_noise

    @cached_property
    def observation_space(self) -> gym.Space:
        """Observation space: cart position, cart velocity, pole angle and pole velocity, or the two positions alone.

        Bounds are twice the thresholds, so that they include final observations.
        """
        x, theta = (np.inf, np.pi) if self.fixed_horizon else (self.x_threshold * 2, self.theta_threshold * 2)
        high = np.array([x, np.inf, theta, np.inf], dtype=np.float32)
        high = high if self.observe_velocities else high[::2]
        return gym.spaces.Box(-high, high, dtype=np.float32)

    @cached_property
    def action_space(self) -> gym.Space:
        """Space of the push: 0 left, 1 right."""
        return gym.spaces.Discrete(2)

    def reset(self, noise: Tensor, physics: Physics) -> State:
        """Initial state: uniform around the upright rest."""
        span = physics.get("initial_range", self.initial_range)
        span = span.unsqueeze(-1) if isinstance(span, Tensor) else span
        first = noise if self.observation_noise is None else noise[..., :4]
        return self._seen({"state": (first * (2 * span)).sub_(span)}, noise)

    def step(self, state: State, action: Tensor, noise: Tensor, physics: Physics) -> tuple[State, Tensor, Tensor]:
        """Push the cart for `tau` seconds."""
        old = state["state"]
        velocity, theta, angular_velocity = old.select(-1, 1), old.select(-1, 2), old.select(-1, 3)
        acceleration, angular_acceleration = self._accelerations(theta, angular_velocity, action, physics)
        tau = physics.get("tau", self.tau)
        if self.kinematics_integrator == "semi-implicit":
            velocity = velocity + tau * acceleration
            angular_velocity = angular_velocity + tau * angular_acceleration
        change = torch.stack((velocity, acceleration, angular_velocity, angular_acceleration), -1)
        new = change.mul_(tau.unsqueeze(-1) if isinstance(tau, Tensor) else tau).add_(old)
        terminated = (new.abs() > self._limits(new, physics)).any(-1)
        if self.fixed_horizon:
            wrapped = torch.remainder(new[..., 2:3] + math.pi, 2 * math.pi) - math.pi
            new = torch.cat((new[..., :2], wrapped, new[..., 3:]), -1)
            return self._seen({"state": new}, noise), (~terminated).float(), torch.zeros_like(terminated)
        reward = -terminated.float() if self.sutton_barto_reward else self._paid(terminated, physics)
        return self._seen({"state": new}, noise), reward, terminated

    def _paid(self, terminated: Tensor, physics: Physics) -> Tensor:
        paid = torch.ones_like(terminated, dtype=torch.float32)
        if "step_reward" in physics:
            return paid * physics["step_reward"].float()
        return paid if self.step_reward == 1 else paid * self.step_reward

    def _seen(self, state: State, noise: Tensor) -> State:
        """State with the noise of its observation, from the last of the uniform numbers."""
        if self.observation_noise is None:
            return state
        return {**state, "noise": torch.special.ndtri(noise[..., -self.step_noise :]) * self.observation_noise}

    def observe(self, state: State) -> Tensor:
        """Observation: the state in float32, or its positions alone, with their noise."""
        seen = state["state"] if self.observe_velocities else state["state"][..., ::2]
        if self.observation_noise is None:
            return seen.float()
        noisy, high = (seen + state["noise"]).float(), self._high.to(seen.device)
        return torch.minimum(torch.maximum(noisy, -high), high)

    def drawing(self) -> Drawing:
        """Gymnasium's picture, with the row's own track and pole."""
        env, fps = twin("CartPole-v1")

        def draw(state: State, physics: Physics) -> Picture:
            env.state = state["state"].tolist()
            env.x_threshold = float(physics.get("x_threshold", self.x_threshold))
            env.length = float(physics.get("length", self.length))
            return env.render()

        return Drawing(draw, fps)

    @cached_property
    def _high(self) -> Tensor:
        """Upper bounds of an observation."""
        return torch.tensor(self.observation_space.high, device="cpu")  # type: ignore[attr-defined]

    def _accelerations(
        self, theta: Tensor, theta_dot: Tensor, action: Tensor, physics: Physics
    ) -> tuple[Tensor, Tensor]:
        masspole = physics.get("masspole", self.masspole)
        length = physics.get("length", self.length)
        total = masspole + physics.get("masscart", self.masscart)
        coupling = masspole * length / total
        push = physics.get("force_mag", self.force_mag) / total
        sin, cos = theta.sin(), theta.cos()
        force = action.to(theta.dtype, copy=True).mul_(2 * push).sub_(push)
        temp = theta_dot.square().mul_(coupling).mul_(sin).add_(force)
        lever = cos.square().mul_(-coupling).add_(length * (4.0 / 3.0))
        angular = sin.mul_(physics.get("gravity", self.gravity)).sub_(cos * temp).div_(lever)
        return temp.sub_(cos.mul_(angular).mul_(coupling)), angular

    def _limits(self, state: Tensor, physics: Physics) -> Tensor:
        if "x_threshold" not in physics and "theta_threshold" not in physics:
            return self._fixed_limits.to(state.device)
        free = torch.full_like(state[..., 0], math.inf)
        x = physics.get("x_threshold", self.x_threshold) + torch.zeros_like(free)
        theta = physics.get("theta_threshold", self.theta_threshold) + torch.zeros_like(free)
        return torch.stack((x, free, theta, free), -1)

    @cached_property
    def _fixed_limits(self) -> Tensor:
        limits = [self.x_threshold, math.inf, self.theta_threshold, math.inf]
        return torch.tensor(limits, dtype=torch.float64, device="cpu")
