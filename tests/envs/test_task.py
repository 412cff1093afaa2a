"""Tasks from settings: what is no value of a native environment's constant is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

import rlmeta as rl
from rlmeta.envs.native.bandit import Bandit
from rlmeta.envs.task import from_table
from rlmeta.errors import SettingError


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
    said = str(raised.value)
    assert said.startswith(f"constant {constant} of ") and said.endswith(f" is {value!r}, expected {expected}")


@pytest.mark.parametrize(
    ("constant", "value"),
    [("gravity", 7), ("gravity", 1e-3), ("max_episode_steps", None), ("max_episode_steps", 7)],
)
def test_constants_of_their_type_are_taken(constant: str, value: Any) -> None:
    assert getattr(rl.task("CartPole-v1", settings={constant: value}).source, constant) == value


def test_sequences_may_be_lists_as_toml_has_them() -> None:
    assert rl.task(Bandit(), settings={"mean": [0, 0.5]}).source.mean == [0, 0.5]


@pytest.mark.parametrize("bounds", [3.0, "ab", [1.0], ["a", "b"], [1.0, 2.0, 3.0]])
def test_ranges_of_a_family_are_two_numbers(bounds: Any) -> None:
    table = {"kind": "family", "env": "CartPole-v1", "ranges": {"gravity": bounds}}
    with pytest.raises(SettingError, match=r"envs/mine\.toml: the range of gravity is .*, expected \[low, high\]"):
        from_table("mine", table)
