"""Environments do not depend on torch's default dtype and device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import rlmeta.envs.native.register  # noqa: F401 - registers the ids
from rlmeta.data.demonstrations import Demonstrations, join
from rlmeta.data.spaces import to_numpy, to_tree
from rlmeta.envs.gymnasium.world import GymnasiumWorld
from rlmeta.envs.native import NATIVE, CartPole, GridWorld, MountainCar, NativeWorld, Pendulum, TabularMDP
from rlmeta.envs.task import Task, TaskFamily
from rlmeta.functional import tree
from rlmeta.functional.random import make_keys

KEYS = make_keys([0, 1])


@pytest.fixture(params=["float64", "meta"])
def defaults(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Fixture: a function that sets the default dtype or device until the test ends."""

    def change() -> None:
        if request.param == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(torch.float64)

    yield change
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def _story(world: Any, steps: int = 12) -> list[Any]:
    """Transitions of a world from its reset on, with actions from the bounds of its space."""
    state = world.reset(KEYS)
    shape, low = world.action_space.shape or (), getattr(world.action_space, "low", None)
    kind = torch.int64 if low is None else torch.float32
    action = torch.zeros(2, world.num_envs, *shape, dtype=kind, device="cpu")
    shown = [world.observation(state)]
    for _ in range(steps):
        state, transition = world.step(state, action)
        shown.append(transition._asdict())
    if world.exact_resume:
        shown.append(world.restore(state))
    world.close()
    return shown


def _same(a: Any, b: Any) -> bool:
    first, second = tree.flatten(a), tree.flatten(b)
    return list(first) == list(second) and all(
        leaf.dtype == second[name].dtype and leaf.device == second[name].device and torch.equal(leaf, second[name])
        for name, leaf in first.items()
    )


def _mdp() -> TabularMDP:
    return TabularMDP([[[0.5, 0.5], [1, 0]], [[0, 1], [1, 0]]], [[0, 1], [2, 3]], max_episode_steps=3)


WORLDS: dict[str, Callable[[], Any]] = {
    **{name: lambda env=env: NativeWorld(type(env)(), (2,), 3) for name, env in NATIVE.items()},
    "mdp": lambda: NativeWorld(_mdp(), (2,), 3),
    "grid": lambda: NativeWorld(GridWorld(layout=("S.G", ".#H")), (2,), 3, {"slip": 0.5}),
    "fixed physics": lambda: NativeWorld(CartPole(), (2,), 3, {"gravity": 5.0, "x_threshold": 1.0, "tau": 0.05}),
    "clipped": lambda: NativeWorld(MountainCar(), (2,), 3, {"max_speed": 0.05, "force": 0.1}),
    "torque": lambda: NativeWorld(Pendulum(max_episode_steps=5), (2,), 3, {"max_torque": 0.5, "length": 2.0}),
    "family": lambda: TaskFamily("f", Task("c", CartPole()), {"gravity": (1.0, 9.0)}).task().world((2,), 3),
    "gymnasium": lambda: GymnasiumWorld("CartPole-v1", (2,), 3),
    "registered": lambda: GymnasiumWorld("rlmeta/Pendulum-v1", (2,), 3),
    "vector": lambda: GymnasiumWorld(lambda num_envs: gym.make_vec("rlmeta/CartPole-v1", num_envs), (2,), 3),
}


@pytest.mark.parametrize("name", WORLDS)
def test_worlds_ignore_torchs_defaults(name: str, defaults: Callable[[], None]) -> None:
    expected = _story(WORLDS[name]())
    defaults()
    assert all(_same(a, b) for a, b in zip(_story(WORLDS[name]()), expected, strict=True))


def test_conversions_ignore_torchs_defaults(defaults: Callable[[], None]) -> None:
    defaults()
    space = gym.spaces.Dict(a=gym.spaces.Box(-1, 1, (2,), np.float64), b=gym.spaces.Discrete(3))
    converted = to_tree(space, {"a": np.zeros(2), "b": 1})
    assert {name: (leaf.dtype, leaf.device.type) for name, leaf in converted.items()} == {
        "a": (torch.float32, "cpu"),
        "b": (torch.int64, "cpu"),
    }
    assert space.contains(to_numpy(space, converted))


def test_dynamics_ignore_torchs_defaults(defaults: Callable[[], None]) -> None:
    defaults()
    going_on, reward = _mdp().dynamics()
    assert going_on.device.type == reward.device.type == "cpu" and reward.tolist() == [[0, 1], [2, 3]]


def test_demonstrations_ignore_torchs_defaults(defaults: Callable[[], None], tmp_path: Path) -> None:
    created = Demonstrations(
        observation=torch.arange(10.0).reshape(5, 2),
        action=torch.tensor([0, 1, 1]),
        reward=torch.ones(3),
        lengths=torch.tensor([2, 1]),
        terminated=torch.tensor([True, False]),
        truncated=torch.tensor([False, True]),
        observation_space=gym.spaces.Box(-np.inf, np.inf, (2,)),
        action_space=gym.spaces.Discrete(2),
    )
    expected = created.transitions(), created.shuffled().observation
    defaults()
    created.save(tmp_path / "demonstrations")
    again = Demonstrations.load(tmp_path / "demonstrations")
    assert again.digest == created.digest and again.returns.tolist() == [2, 1] and again.returns.dtype == torch.float64
    assert _same(again.transitions(), expected[0]) and torch.equal(again.shuffled().observation, expected[1])
    assert join([again.first(1), again]).steps == 5
