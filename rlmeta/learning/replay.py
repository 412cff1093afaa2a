"""Replay memory on the learner axis: every learner has its own transitions and draws its own minibatches.

A memory is a ring of C time steps of N environments, `[*L, C, N, ...]`. The time order is kept, so n-step returns are
added up when a minibatch is drawn, never across the end of an episode.
"""

from __future__ import annotations

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.envs.world import World
from rlmeta.functional import random, tree
from rlmeta.functional.axes import align
from rlmeta.learning.collect import Rollout
from rlmeta.learning.state import State

FIELDS = ("observation", "next_observation", "action", "terminated", "truncated", "valid")


def init(world: World, world_state: State, capacity: int) -> State:
    """An empty memory of `capacity` time steps for the environments of a world."""
    axes = len(world.learner_shape)
    observation = world.observation(world_state)
    rows = (*world.learner_shape, capacity, world.num_envs)
    device = next(tree.leaves(observation)).device
    shape, continuous = world.action_space.shape or (), isinstance(world.action_space, gym.spaces.Box)

    def like(x: Tensor) -> Tensor:
        return torch.zeros(*rows, *x.shape[axes + 1 :], dtype=x.dtype, device=device)

    flags = {name: torch.zeros(rows, dtype=torch.bool, device=device) for name in ("terminated", "truncated", "valid")}
    return {
        "observation": tree.map(like, observation),
        "next_observation": tree.map(like, observation),
        "action": torch.zeros(*rows, *shape, dtype=torch.float32 if continuous else torch.int64, device=device),
        "reward": torch.zeros(rows, dtype=torch.float32, device=device),
        **flags,
    }


@torch.no_grad()
def insert(memory: State, rollout: Rollout, reward: Tensor, start: int, learner_axes: int) -> State:
    """Write a rollout `[*L, T, N, ...]` behind what is there, over the oldest; `start` counts all time steps so far."""
    capacity, length = memory["reward"].shape[learner_axes], reward.shape[learner_axes]
    rows = (torch.arange(length, device=reward.device) + start) % capacity
    written = {**{name: rollout[name] for name in FIELDS}, "reward": reward}
    return tree.map(
        lambda ring, new: ring.index_copy_(learner_axes, rows, new), memory, {n: written[n] for n in memory}
    )


@torch.no_grad()
def sample(memory: State, key: Tensor, batch_size: int, end: int, gamma: Tensor, n_steps: int = 1) -> tree.Tree:
    """Draw transitions uniformly, with n-step returns.

    reward = sum of gamma^k r_{t+k} for k < m, discount = gamma^m (1 - terminated), with m = n_steps or where the
    episode ended before; `next_observation` is the true successor after these m steps.

    Args:
        memory: of `init` and `insert`.
        key: `[*L]`, another one for every minibatch.
        batch_size: B.
        end: time steps inserted so far; at least `n_steps`.
        gamma: `[*L]`.
        n_steps: n.

    Returns:
        `observation, action, reward, discount, next_observation, valid`, `[*L, B, ...]`
    """
    axes = key.dim()
    capacity, num_envs = memory["reward"].shape[axes : axes + 2]
    oldest = max(0, end - capacity)
    draw = random.integers(key, "replay", 0, (batch_size,), (end - n_steps + 1 - oldest) * num_envs)
    t, env = oldest + draw // num_envs, draw % num_envs
    pick = _Picker(memory, axes, capacity, num_envs)
    first = pick.rows(t, env)
    reward = pick("reward", first)
    last, alive = first, torch.ones_like(first, dtype=torch.bool)
    discount = align(gamma, reward) * ~pick("terminated", first)
    for k in range(1, n_steps):
        alive = alive & ~(pick("terminated", last) | pick("truncated", last))
        row = pick.rows(t + k, env)
        reward = reward + torch.where(alive, discount * pick("reward", row), 0.0)
        discount = torch.where(alive, discount * align(gamma, reward) * ~pick("terminated", row), discount)
        last = torch.where(alive, row, last)
    return {
        "observation": pick("observation", first),
        "action": pick("action", first),
        "reward": reward,
        "discount": discount,
        "next_observation": pick("next_observation", last),
        "valid": pick("valid", first),
    }


class _Picker:
    """Reads transitions `[*L, B]` by their rows in the memory folded to `[L * C * N, ...]`."""

    def __init__(self, memory: State, axes: int, capacity: int, num_envs: int) -> None:
        self.memory, self.axes, self.capacity, self.num_envs = memory, axes, capacity, num_envs
        learners = memory["reward"].shape[:axes]
        base = torch.arange(learners.numel(), device=memory["reward"].device) * capacity * num_envs
        self.base = base.reshape(*learners, 1)

    def rows(self, t: Tensor, env: Tensor) -> Tensor:
        """Folded rows of time steps `t` and environments `env`."""
        return self.base + (t % self.capacity) * self.num_envs + env

    def __call__(self, name: str, rows: Tensor) -> tree.Tree:
        """The field at these rows."""
        axes = self.axes + 2

        def read(x: Tensor) -> Tensor:
            return x.reshape(-1, *x.shape[axes:]).index_select(0, rows.flatten()).reshape(*rows.shape, *x.shape[axes:])

        return tree.map(read, self.memory[name])
