"""Small recorded data for the tests of offline learners."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch

import rlmeta as rl
from rlmeta.data.demonstrations import Demonstrations
from tests.agents.worlds import Target

BOX = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
FORCE = gym.spaces.Box(-2.0, 2.0, (1,), np.float32)
SMALL: dict[str, Any] = {"num_steps": 4, "batch_size": 8}
NETWORK: dict[str, Any] = {"hidden_sizes": (8,)}
SEQUENCES: dict[str, Any] = {"context": 3, "features": 8, "layers": 1, "max_length": 250}
SETTINGS = {
    "td3_bc": lambda given, **own: rl.TD3BC(given, **{**SMALL, **NETWORK, **own}),
    "iql": lambda given, **own: rl.IQL(given, **{**SMALL, **NETWORK, **own}),
    "cql": lambda given, **own: rl.CQL(given, sampled_actions=3, **{**SMALL, **NETWORK, **own}),
    "decision_transformer": lambda given, **own: rl.DecisionTransformer(given, **{**SMALL, **SEQUENCES, **own}),
}
"""Small settings of every offline learner, given the data."""


def recorded(
    lengths: tuple[int, ...] = (5, 3, 4), terminated: tuple[bool, ...] = (True, False, True), action_space: Any = FORCE
) -> Demonstrations:
    """Random steps of Pendulum's spaces; every observation counts the row in its first entry."""
    generator = torch.Generator().manual_seed(0)
    steps, rows = sum(lengths), sum(lengths) + len(lengths)
    observation = torch.randn(rows, 3, generator=generator)
    observation[:, 0] = torch.arange(rows)
    action: Any = torch.rand(steps, 1, generator=generator) * 4 - 2
    if isinstance(action_space, gym.spaces.Discrete):
        action = torch.randint(action_space.n, (steps,), generator=generator)
    return Demonstrations(
        observation=observation,
        action=action,
        reward=torch.randn(steps, generator=generator),
        lengths=torch.tensor(lengths),
        terminated=torch.tensor(terminated),
        truncated=~torch.tensor(terminated),
        observation_space=BOX,
        action_space=action_space,
    )


def guesses(kind: str) -> Demonstrations:
    """Episodes of one step in which random actions are paid by how near they are to what `Target` asks for."""
    env, generator, episodes = Target(kind), torch.Generator().manual_seed(1), 200
    goal = torch.arange(episodes) % 2
    if kind == "box":
        action = torch.rand(episodes, 1, generator=generator) * 2 - 1
        reward = 1.0 - (action.squeeze(-1) - (2.0 * goal - 1)).abs()
    else:
        action = torch.randint(2, (episodes,), generator=generator)
        reward = (action == goal).float()
    return Demonstrations(
        observation=torch.repeat_interleave(torch.eye(2)[goal], 2, 0),
        action=action,
        reward=reward,
        lengths=torch.ones(episodes, dtype=torch.int64),
        terminated=torch.ones(episodes, dtype=torch.bool),
        truncated=torch.zeros(episodes, dtype=torch.bool),
        observation_space=env.observation_space,
        action_space=env.action_space,
    )
