"""Convolutional networks for the `network=` argument of a learner."""

from __future__ import annotations

import gymnasium as gym
from torch import nn

from rlmeta.errors import SpaceError


def strided_convolutions(space: gym.Space, channels: int = 32, layers: int = 4) -> nn.Sequential:
    """Few-shot convolutional network of Omniglot: 3 x 3 convolutions of stride 2, batch normalisation and ReLU.

    The network without pooling of Finn et al., "Model-agnostic meta-learning", 2017, who take 64 channels. There are no
    running statistics: a batch is the support or query set of one task.

    Args:
        space: Box of grayscale images `[H, W]`.
        channels: of every layer.
        layers: number of convolutions; each halves height and width.

    Returns:
        A network `[B, H, W]` -> `[B, features]`.

    Raises:
        SpaceError: the observations are no grayscale images.
    """
    return _convolutions(space, channels, layers, running=False)


def running_convolutions(space: gym.Space, channels: int = 32, layers: int = 4) -> nn.Sequential:
    """Few-shot convolutional network with running statistics; arguments as for `strided_convolutions`.

    In evaluation an image's features do not depend on the rest of its batch.
    """
    return _convolutions(space, channels, layers, running=True)


def _convolutions(space: gym.Space, channels: int, layers: int, running: bool) -> nn.Sequential:
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 2:
        raise SpaceError(f"convolutions: the observation space is {space}, expected a Box of shape (H, W)")
    parts: list[nn.Module] = [nn.Unflatten(1, (1, space.shape[0]))]
    for incoming in (1, *(channels,) * (layers - 1)):
        parts += [nn.Conv2d(incoming, channels, 3, stride=2, padding=1)]
        parts += [nn.BatchNorm2d(channels, track_running_stats=running), nn.ReLU()]
    return nn.Sequential(*parts, nn.Flatten())
