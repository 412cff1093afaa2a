"""Integer flags of episode ends: in tables and in recorded files."""

from __future__ import annotations

import dataclasses

import gymnasium as gym
import pytest
import torch

from rlmeta.data.demonstrations import Demonstrations
from rlmeta.envs.native.tabular import GridWorld
from rlmeta.errors import SettingError
from rlmeta.imitation.irl import cut_off


def test_tables_of_integer_flags_have_the_same_dynamics():
    grid = GridWorld()
    expected = grid.dynamics()
    integers = GridWorld()
    integers.__dict__["tables"] = grid.tables._replace(terminated=grid.tables.terminated.to(torch.uint8))
    for actual, right in zip(integers.dynamics(), expected):
        assert torch.equal(actual, right)


def test_demonstrations_of_integer_flags_are_the_same_demonstrations():
    right = Demonstrations(
        observation=torch.tensor([0, 1, 2, 0, 1]),
        action=torch.tensor([0, 1, 1]),
        reward=torch.zeros(3),
        lengths=torch.tensor([2, 1]),
        terminated=torch.tensor([True, False]),
        truncated=torch.tensor([False, True]),
        observation_space=gym.spaces.Discrete(4),
        action_space=gym.spaces.Discrete(2),
    )
    for dtype in (torch.uint8, torch.int64):
        flags = {name: getattr(right, name).to(dtype) for name in ("terminated", "truncated")}
        with_integers = dataclasses.replace(right, **flags)
        assert with_integers.digest == right.digest
        assert torch.equal(cut_off(with_integers, 4, 0.5), cut_off(right, 4, 0.5))
        assert cut_off(with_integers, 4, 0.5).tolist() == [0, 0.25, 0, 0]
    with pytest.raises(SettingError, match="terminated is float32"):
        dataclasses.replace(right, terminated=torch.tensor([1.0, 0.0]))
