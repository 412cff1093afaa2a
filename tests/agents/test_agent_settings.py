"""Every field of every agent's settings, given what it is not: refused by a sentence, or a value it may have."""

from __future__ import annotations

import dataclasses
import math
import typing

import pytest
import torch

from rlmeta.agents import A2C, DQN, PPO, REINFORCE
from rlmeta.errors import SettingError
from rlmeta.imitation import GAIL, IRL, BehaviourCloning
from rlmeta.rewards import EpisodicCounts, PotentialShaping

AGENTS = (PPO, A2C, REINFORCE, DQN, BehaviourCloning, GAIL, IRL)
FIELDS = [(cls, f.name) for cls in AGENTS for f in dataclasses.fields(cls)]
ANY_NUMBER = {"initial_log_std", "v_min", "v_max"}  # those that may be below 0


def hint_of(cls: type, name: str) -> typing.Any:
    return typing.get_type_hints(cls, include_extras=True)[name]


def kind_of(cls: type, name: str) -> str:
    hint = hint_of(cls, name)
    if "per learner" in getattr(hint, "__metadata__", ()):
        return "per learner"
    if typing.get_origin(hint) is typing.Literal:
        return "choice"
    if typing.get_origin(hint) is tuple:
        entry = typing.get_args(hint)[0]
        return "layers" if entry is int else "choices" if typing.get_origin(entry) is typing.Literal else "rewards"
    return {int: "whole", float: "number", bool: "switch"}.get(hint, "other")


WRONG: dict[str, list[typing.Any]] = {
    "per learner": [-1, math.nan, "x", True, None, [], [0.1, "x"], [0.1, -1], [0.1, None], torch.ones(()), [[0.1]]],
    "number": [-1, math.nan, "x", True, None, [0.1], torch.ones(())],
    "whole": [-1, math.nan, math.inf, "x", True, None, 1.5, 2.0, [1]],
    "switch": [-1, 0, 1, "true", None, math.nan],
    "choice": [-1, "x", True, None, "SCALE"],
    "choices": [-1, "action", True, None, {"action"}, ("x",), (1,), ("action", None)],
    "layers": [-1, "64x64", True, None, 64, (1.5,), (0,), (-1,), (True,), ("64",), (None,)],
    "rewards": [-1, "x", True, None, PotentialShaping(len), {}, [EpisodicCounts], (1,), (EpisodicCounts(),) * 2],
}


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=[f"{cls.__name__}-{name}" for cls, name in FIELDS])
def test_what_a_setting_is_not_is_refused_by_name(cls, name):
    for value in WRONG.get(kind_of(cls, name), []):
        if name in ANY_NUMBER and value == -1:
            continue
        about = "rewards" if kind_of(cls, name) == "rewards" else name
        with pytest.raises(SettingError, match=about if value != (EpisodicCounts(),) * 2 else "two rewards"):
            cls(**{name: value})


@pytest.mark.parametrize("cls", AGENTS)
def test_a_network_is_a_function(cls):
    with pytest.raises(SettingError, match="network is 3, expected a function or None"):
        cls(network=3)


def test_what_a_setting_may_be_is_taken():
    import numpy as np

    PPO(num_envs=np.int64(8), learning_rate=np.float32(1e-3), gamma=[0.9, 1], hidden_sizes=[64], rewards=[])
    PPO(clip_range=math.inf, max_grad_norm=math.inf, initial_log_std=-2, entropy_coefficient=0)
    DQN(huber_delta=math.inf, learning_starts=0)
    REINFORCE(hidden_sizes=(), rewards=[EpisodicCounts()])


def test_what_excludes_each_other_is_refused():
    with pytest.raises(SettingError, match="exclude each other"):
        PPO(action_bounds="squash", state_dependent_exploration=True)


def test_a_deviation_that_overflows_is_refused():
    for value in (-21, 21, math.inf):
        with pytest.raises(SettingError, match="initial_log_std"):
            A2C(initial_log_std=value)
