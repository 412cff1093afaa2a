"""Warnings about NaN, infinity and observations outside their space: once, with name and row."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from rlmeta.envs.gymnasium.world import GymnasiumWorld
from rlmeta.functional.random import make_keys


class Shows(gym.Env[Any, Any]):
    """Environment with observations and rewards 0, except for given ones by step, if the action is 1.

    Episodes have 4 steps under the action 1, else 3.
    """

    action_space = spaces.Discrete(2)

    def __init__(self, spoil: dict[int, Any], rewards: dict[int, Any], space: Any) -> None:
        self.observation_space, self.spoil, self.rewards = space, spoil, rewards

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.count = 0
        return self._observe(), {}

    def step(self, action: Any) -> Any:
        self.count += 1
        told = bool(action == 1)
        return (
            self._observe(told),
            self.rewards.get(self.count, 0.0) if told else 0.0,
            False,
            self.count >= 3 + told,
            {},
        )

    def _observe(self, told: Any = True) -> Any:
        plain = self.spoil.get("plain", 0)
        value = self.spoil.get(self.count, plain) if told else plain
        shown = np.full(2, value, np.float64)
        if isinstance(self.observation_space, spaces.Dict):
            return {"a": shown.astype(np.float32), "b": np.zeros((), np.float32)}
        return shown.astype(self.observation_space.dtype)


BOX = spaces.Box(-1, 1, (2,), np.float32)


def _messages(
    spoil: dict[Any, Any] | None = None,
    rewards: dict[int, Any] | None = None,
    space: Any = BOX,
    vector: AutoresetMode | None = None,
    steps: int = 12,
) -> list[str]:
    """Warnings of a world of 2 learners with 3 environments each, in which row 4 has the fault."""

    def make() -> gym.Env[Any, Any]:
        return Shows(spoil or {}, rewards or {}, space)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        world = GymnasiumWorld(make if vector is None else SyncVectorEnv([make] * 6, autoreset_mode=vector), (2,), 3)
        state = world.reset(make_keys([0, 1]))
        action = torch.tensor([[0, 0, 0], [0, 1, 0]])
        for _ in range(steps):
            state, _ = world.step(state, action)
        world.close()
    return [str(warning.message) for warning in caught]


ROW = "in row 4, environment 1 of learner 1, at step {}"


@pytest.mark.parametrize("vector", [None, *AutoresetMode], ids=str)
@pytest.mark.parametrize("step", [2, 4])
def test_the_first_observation_that_is_not_finite_is_named(step: int, vector: Any) -> None:
    """Also for the final observation of an episode, which is not the next one to act on."""
    for value in (np.nan, np.inf):
        (message,) = _messages({step: value}, vector=vector)
        assert "Shows" in message or "SyncVectorEnv" in message
        assert "an observation that is not finite" in message and ROW.format(step) in message


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_the_first_reward_that_is_not_finite_is_named(value: float) -> None:
    (message,) = _messages(rewards={3: value})
    assert message.startswith(f"environment 'Shows' gave the reward {value} " + ROW.format(3)), message


def test_a_first_observation_that_is_not_finite_is_named() -> None:
    (message,) = _messages({0: np.nan})
    assert "in row 0, environment 0 of learner 0, at its reset" in message


@pytest.mark.parametrize(
    ("space", "value", "outside"),
    [
        (BOX, 1.0, False),
        (BOX, 1.0 + 1e-7, False),  # what rounding does
        (BOX, 1.01, True),
        (BOX, -1.01, True),
        (spaces.Box(0, 2, (2,), np.uint8), 3, True),
        (spaces.Box(0, 2, (2,), np.uint8), 2, False),
        (spaces.Box(0, 255, (2,), np.uint8), 255, False),
        (spaces.Box(-np.inf, 5, (2,)), -1e30, False),
        (spaces.Box(-np.inf, 5, (2,)), 6, True),
        (spaces.Box(-3, np.inf, (2,)), -4, True),
        (spaces.Box(-np.inf, np.inf, (2,)), 1e30, False),
        (spaces.Box(-5, 5, (2,), np.int64), 6, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("step", [0, 1, 4])
def test_an_observation_outside_of_its_space_is_said_once(space: Any, value: Any, outside: bool, step: int) -> None:
    messages = _messages({step: value}, space=space)
    assert len(messages) == outside
    assert all(f"'Shows' gave an observation outside of its space {space}" in message for message in messages)


def test_the_entry_of_a_dictionary_is_named() -> None:
    both = _messages({2: np.nan, 3: 7.0}, space=spaces.Dict(b=spaces.Box(-1, 1, ()), a=BOX))
    assert len(both) == 2 and "observation at 'a' that is not finite" in both[0]
    assert "observation at 'a' outside of its space" in both[1]


def test_nothing_is_said_of_what_is_in_order() -> None:
    assert _messages() == []
    assert _messages({"plain": 7}, space=spaces.Box(5, 9, (2,))) == []  # of which 0 is no part


def test_a_single_learner_has_no_number() -> None:
    with pytest.warns(UserWarning, match="in row 1, at step 1 of its episode"):
        world = GymnasiumWorld(lambda: Shows({1: np.nan}, {}, BOX), (), 2)
        world.step(world.reset(make_keys([0])[0]), torch.tensor([0, 1]))
