"""Pictures of native environments: gymnasium's own where it has the world, and every one can be drawn."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from rlmeta.envs.native import NATIVE, NativeEnv, NativeWorld
from rlmeta.envs.native.drawing import BLUE, RED, cells, observed, plane
from rlmeta.functional import tree
from rlmeta.functional.random import make_keys


@pytest.mark.parametrize("name", NATIVE)
def test_every_native_environment_can_be_drawn(name: str) -> None:
    env = NATIVE[name]
    world, drawing = NativeWorld(env, (), 2), env.drawing()
    state = world.reset(make_keys([0])[0])
    action = torch.zeros((2, *(env.action_space.shape or ())))
    action = action.long() if isinstance(env.action_space, gym.spaces.Discrete) else action
    successor = world.successor(state, action)
    for each in (state["env"], successor):
        picture = drawing.draw(tree.map(lambda leaf: leaf[1], each), {})
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[-1] == 3 and picture.min() < 255
    assert drawing.fps > 0


@pytest.mark.parametrize(
    "name",
    ["CartPole-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Acrobot-v1", "Pendulum-v1", "FrozenLake8x8-v1",
     "CliffWalking-v1"],
)  # fmt: skip
def test_a_state_looks_as_in_gymnasium(name: str) -> None:
    env: Any = gym.make(name, render_mode="rgb_array")
    drawing = NATIVE[name].drawing()
    for seed in range(2):
        env.reset(seed=seed)
        inner = env.unwrapped
        state = inner.s if "state" not in vars(inner) else np.asarray(inner.state, np.float64)
        assert np.array_equal(drawing.draw({"state": torch.tensor(state)}, {}), env.render())
    assert drawing.fps == inner.metadata["render_fps"]


def test_physics_of_a_row_are_drawn() -> None:
    env: NativeEnv = NATIVE["CartPole-v1"]
    draw, state = env.drawing().draw, {"state": torch.zeros(4)}
    usual, longer = draw(state, {}), draw(state, {"length": torch.tensor(1.0)})
    assert not np.array_equal(usual, longer) and np.array_equal(usual, draw(state, {}))


def test_the_successor_is_the_state_before_another_episode_begins() -> None:
    world = NativeWorld(NATIVE["Catch-v0"], (), 3)
    state = world.reset(make_keys([0])[0])
    for t in range(9):
        successor = world.successor(state, torch.tensor([0, 1, 2]))
        new, transition = world.step(state, torch.tensor([0, 1, 2]))
        assert torch.equal(world.env.observe(successor), transition.next_observation)
        assert bool(transition.terminated.all()) == (t == 8)
        state = new
    assert state["env"]["row"].eq(0).all() and successor["row"].eq(9).all()


def test_cells_and_discs_are_where_they_belong() -> None:
    picture = cells((2, 3), [([(0, 0), (0, 1)], RED), ([(0, 1), (5, 5)], BLUE)])
    side = picture.shape[0] // 2
    corners = picture[side // 2 :: side, side // 2 :: side]
    assert corners[0, :2].tolist() == [list(RED), list(BLUE)] and corners[1].min() == 255
    disc = plane(2.0, [((1.0, -1.0), 0.4, RED)])
    assert disc[240, 240].tolist() == list(RED) and disc[80, 240].tolist() == [255] * 3


@pytest.mark.parametrize(
    ("space", "observation", "differs"),
    [
        (gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), torch.zeros(8, 8, 3), 1),
        (gym.spaces.Box(0.0, 1.0, (5, 4), np.float32), torch.zeros(5, 4), 1),
        (gym.spaces.Box(-np.inf, np.inf, (4,), np.float32), torch.zeros(4), 1),
        (gym.spaces.Box(-np.inf, np.inf, (3, 2, 2), np.float32), torch.zeros(3, 2, 2), 1),
        (gym.spaces.Discrete(5), torch.tensor(0), 1),
        (gym.spaces.Dict({"a": gym.spaces.Box(-1, 1, (2,)), "b": gym.spaces.Discrete(3)}),
         {"a": torch.zeros(2), "b": torch.tensor(0)}, 1),
    ],
)  # fmt: skip
def test_observations_that_differ_look_different(space: gym.Space, observation: Any, differs: int) -> None:
    other = tree.map(lambda leaf: leaf + differs, observation)
    first, second = observed(space, observation), observed(space, other)
    assert first.shape == second.shape and not np.array_equal(first, second)
