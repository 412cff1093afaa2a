"""Pictures among features: the default encoder's network, on what was encoded before."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from rlmeta import nn
from rlmeta.functional import tree
from rlmeta.nn import Context
from rlmeta.nn.feature_pictures import FeaturePictures, feature_network

PICTURE = gym.spaces.Box(0, 255, (5, 6, 2), np.uint8)
SPACES: dict[str, gym.Space] = {
    "picture": PICTURE,
    "dictionary": gym.spaces.Dict(
        near=gym.spaces.Box(-1, 1, (3,)), a=PICTURE, z=gym.spaces.Box(0, 1, (4, 3, 3)), kind=gym.spaces.Discrete(4)
    ),
}


def observations(space: gym.Space, *lead: int) -> Any:
    torch.manual_seed(0)
    if isinstance(space, gym.spaces.Dict):
        return {name: observations(child, *lead) for name, child in space.spaces.items()}
    if isinstance(space, gym.spaces.Discrete):
        return torch.randint(0, int(space.n), lead)
    if space.dtype == np.uint8:
        return torch.randint(0, 256, (*lead, *space.shape), dtype=torch.uint8)  # type: ignore[misc]
    return torch.rand(*lead, *space.shape)  # type: ignore[misc]


@pytest.mark.parametrize("name", SPACES)
def test_features_of_a_plain_encoder_give_what_the_default_encoder_gives(name: str) -> None:
    space = SPACES[name]
    choosing, pictures = nn.Encoder(space, choose=nn.picture_cnn), FeaturePictures(space, 2)
    weights = {key: value.detach() for key, value in choosing.state_dict().items()}
    assert pictures.state_dict().keys() == weights.keys() and pictures.features == choosing.features + 2
    x = observations(space, 3, 4)
    following = torch.rand(3, 4, 2)
    flat = torch.cat((nn.Encoder(space).run({}, x, Context()), following), -1)
    expected = choosing.run(weights, x, Context(learner_axes=0))
    actual = pictures.run(weights, flat, Context(learner_axes=0))
    assert torch.equal(actual[..., -2:], following)
    torch.testing.assert_close(actual[..., :-2], expected, rtol=1e-5, atol=1e-6)


def test_batched_equals_looped_over_learners() -> None:
    network = lambda: feature_network(SPACES["dictionary"], (5,), 3, following=2)  # noqa: E731
    block = network()
    weights = {name: weight.double() for name, weight in nn.stack(network, torch.arange(2)).items()}
    x = torch.rand(2, 2, 2, int(nn.Encoder(SPACES["dictionary"]).features) + 2, dtype=torch.float64)
    together = block.run(weights, x, Context())
    for i in range(2):
        alone = block.run(tree.map(lambda leaf, i=i: leaf[i], weights), x[i], Context())
        torch.testing.assert_close(together[i], alone, rtol=1e-10, atol=1e-10)


def test_a_space_without_pictures_has_a_perceptron_alone() -> None:
    block = feature_network(gym.spaces.Box(-1, 1, (7,)), (5,), 3, following=2)
    assert isinstance(block, nn.MLP) and [tuple(w.shape) for w in block.parameters()] == [(5, 9), (5,), (3, 5), (3,)]
    assert not isinstance(feature_network(PICTURE, (5,), 3), nn.MLP)
