"""Tasks from settings: invalid values of a native environment's constants are refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium as gym
import pytest

import rlmeta as rl
from rlmeta.envs.native.bandit import Bandit
from rlmeta.envs.task import Task, TaskFamily, from_table
from rlmeta.errors import SettingError
from rlmeta.functional.random import make_keys


@pytest.mark.parametrize(
    ("name", "constant", "value", "expected"),
    [
        ("CartPole-v1", "gravity", "hello", "a number"),
        ("CartPole-v1", "gravity", True, "a number"),
        ("CartPole-v1", "gravity", None, "a number"),
        ("CartPole-v1", "sutton_barto_reward", 1, "true or false"),
        ("CartPole-v1", "max_episode_steps", 7.5, "a whole number or None"),
        ("CartPole-v1", "kinematics_integrator", "leapfrog", "one of 'euler', 'semi-implicit'"),
        ("CartPole-v1", "kinematics_integrator", [1], "one of 'euler', 'semi-implicit'"),
        ("FrozenLake-v1", "map_name", 4, "text"),
        ("FrozenLake-v1", "desc", "SFHG", "a list of texts or None"),
        ("FrozenLake-v1", "reward_schedule", [1.0, "b", 0.0], "a list of numbers"),
    ],
)
def test_constants_of_another_type_are_refused(name: str, constant: str, value: Any, expected: str) -> None:
    with pytest.raises(SettingError) as raised:
        rl.task(name, settings={constant: value})
    message = str(raised.value)
    assert message.startswith(f"constant {constant} of ") and message.endswith(f" is {value!r}, expected {expected}")


@pytest.mark.parametrize(
    ("constant", "value"),
    [("gravity", 7), ("gravity", 1e-3), ("max_episode_steps", None), ("max_episode_steps", 7)],
)
def test_constants_of_their_type_are_taken(constant: str, value: Any) -> None:
    assert getattr(rl.task("CartPole-v1", settings={constant: value}).source, constant) == value


def test_sequences_may_be_lists_as_toml_has_them() -> None:
    assert rl.task(Bandit(), settings={"mean": [0, 0.5]}).source.mean == [0, 0.5]


CARTPOLE = rl.task("CartPole-v1")


@pytest.mark.parametrize(
    ("base", "ranges", "message"),
    [
        ("CartPole-v1", {}, "its base is 'CartPole-v1', expected a task, such as rl.task"),
        (rl.task("LunarLander-v3"), {"gravity": (-10.0, -5.0)}, "'LunarLander-v3' is gymnasium's"),
        (rl.task(lambda: gym.make("CartPole-v1")), {"length": (0.5, 1.0)}, "is gymnasium's"),
        (CARTPOLE, {"length": (1.0, 0.5)}, r"length is \(1.0, 0.5\), expected finite numbers, the lower first"),
        (CARTPOLE, {"length": (float("nan"), 1.0)}, "expected finite numbers"),
        (CARTPOLE, {"length": (0.5, float("inf"))}, "expected finite numbers"),
        (CARTPOLE, {"length": 0.5}, r"length is 0.5, expected \[low, high\]"),
        (CARTPOLE, {"lenght": (0.5, 1.0)}, "unknown constant 'lenght': did you mean length"),
        (CARTPOLE, {"max_episode_steps": (5, 9)}, "max_episode_steps is a whole number or None, expected a number"),
        (CARTPOLE, [("length", (0.5, 1.0))], "expected a dictionary such as"),
    ],
)
def test_what_no_family_can_be_made_of_is_refused(base: Any, ranges: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        TaskFamily("mine", base, ranges)
    if ranges and isinstance(base, Task):
        with pytest.raises(SettingError, match=message):
            dataclasses.replace(base, ranges=ranges)


def test_a_range_of_one_number_is_that_number() -> None:
    family = TaskFamily("mine", CARTPOLE, {"length": (0.5, 0.5)})
    assert (family.tasks(make_keys([0, 1]), 0, 3, "train")["length"] == 0.5).all()


@pytest.mark.parametrize("bounds", [3.0, "ab", [1.0], ["a", "b"], [1.0, 2.0, 3.0]])
def test_ranges_of_a_family_are_two_numbers(bounds: Any) -> None:
    table = {"kind": "family", "env": "CartPole-v1", "ranges": {"gravity": bounds}}
    with pytest.raises(SettingError, match=r"envs/mine\.toml: the range of gravity is .*, expected \[low, high\]"):
        from_table("mine", table)
