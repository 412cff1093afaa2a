"""Your own environment in torch, all rows at once. Copy this file and change it; running it checks it.

rlmeta train ppo my_native_env:MyNativeEnv --env.drag 0.5
"""

from dataclasses import dataclass
from functools import cached_property

import gymnasium as gym
import numpy as np
import torch

from rlmeta.envs.native import NativeEnv, NativeWorld
from rlmeta.functional.random import make_keys


@dataclass(frozen=True)
class MyNativeEnv(NativeEnv):
    """A puck on a line, pushed to the origin. The fields are the physics: any row may have its own."""

    drag: float = 0.1
    push: float = 1.0
    dt: float = 0.1
    max_episode_steps: int | None = 100

    reset_noise = 1  # uniform numbers that `reset` needs in each row
    step_noise = 0  # and `step`

    @cached_property
    def observation_space(self):
        """Position and velocity."""
        return gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)

    @cached_property
    def action_space(self):
        """The push."""
        return gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, noise, physics):
        """At rest, anywhere in [-1, 1]; every tensor of the state starts with the shape of the rows."""
        position = 2 * noise[..., 0] - 1
        return {"position": position, "velocity": torch.zeros_like(position)}

    def step(self, state, action, noise, physics):
        """Constants through `physics.get`; the new state, the reward (float32), whether the task is over."""
        force = physics.get("push", self.push) * action[..., 0]
        dt = physics.get("dt", self.dt)
        velocity = state["velocity"] + dt * (force - physics.get("drag", self.drag) * state["velocity"])
        position = state["position"] + dt * velocity
        reward = -(position.square() + 0.1 * velocity.square()).float()
        return {"position": position, "velocity": velocity}, reward, position.abs() > 5

    def observe(self, state):
        """The observation of a state, float32."""
        return torch.stack((state["position"], state["velocity"]), -1).float()


def returns(world: NativeWorld, seeds: list[int], steps: int) -> torch.Tensor:
    """The summed rewards `[S, N]` of a fixed sequence of pushes."""
    state, total = world.reset(make_keys(seeds)), torch.zeros(len(seeds), world.num_envs)
    for t in range(steps):
        state, transition = world.step(state, torch.full((len(seeds), world.num_envs, 1), (-1.0) ** t))
        assert world.observation_space.contains(transition.observation[0, 0].numpy())
        total += transition.reward
    return total


if __name__ == "__main__":
    env = MyNativeEnv()
    alone, together = returns(NativeWorld(env, (1,), 2), [7], 250), returns(NativeWorld(env, (2,), 3), [4, 7], 250)
    assert torch.equal(alone[0], together[1, :2]), "a row must not depend on the rows beside it"
    assert torch.isfinite(together).all(), "rewards must be finite"
    print("MyNativeEnv is fine: rlmeta train ppo my_native_env:MyNativeEnv --env.drag 0.5")
