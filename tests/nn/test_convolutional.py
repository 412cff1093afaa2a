"""Convolutional networks."""

from __future__ import annotations

import gymnasium as gym
import pytest
import torch

from rlmeta import nn
from rlmeta.errors import SpaceError
from tests.nn.learners import as_torch, assert_equals_loop, data, keys, scattered


@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_every_learner_convolves_its_own_batch(shape: tuple[int, ...]) -> None:
    network = nn.strided_convolutions(gym.spaces.Box(0, 1, (7, 6)), channels=3, layers=2)
    block = nn.lift(network)
    params = scattered(nn.stack(lambda: network, keys(*shape)))
    x = data(*shape, 4, 7, 6)
    assert nn.apply(block, params, x).shape == (*shape, 4, 3 * 2 * 2)
    assert_equals_loop(lambda p, x: nn.apply(block, p, x), as_torch(network), params, x, shape)


def test_features_halve_with_every_layer() -> None:
    network = nn.strided_convolutions(gym.spaces.Box(0, 1, (28, 28)))
    assert network(torch.rand(5, 28, 28)).shape == (5, 32 * 2 * 2)
    assert [tuple(p.shape) for p in network.parameters()][::4] == [(32, 1, 3, 3)] + [(32, 32, 3, 3)] * 3


@pytest.mark.parametrize("space", [gym.spaces.Box(0, 1, (3, 28, 28)), gym.spaces.Discrete(4)])
def test_what_is_no_grey_picture_is_refused(space: gym.Space) -> None:
    with pytest.raises(SpaceError, match="convolutions: the observation space is"):
        nn.strided_convolutions(space)
