"""Networks of convolutions, as `network=` of a learner takes them."""

from __future__ import annotations

import gymnasium as gym
from torch import nn

from rlmeta.errors import SpaceError


def strided_convolutions(space: gym.Space, channels: int = 32, layers: int = 4) -> nn.Sequential:
    """The few-shot network without pooling: 3 x 3 convolutions of stride 2, each normalised by its batch, and ReLU.

    Finn et al., "Model-agnostic meta-learning", 2017, with 64 channels, for Omniglot. No running statistics are kept:
    a batch is one task's support or query.

    Args:
        space: of grey pictures, `[H, W]`, numbers.
        channels: of every layer.
        layers: each halves the sides.

    Returns:
        `[B, H, W]` -> `[B, features]`.

    Raises:
        SpaceError: the observations are no grey pictures.
    """
    return _convolutions(space, channels, layers, running=False)


def running_convolutions(space: gym.Space, channels: int = 32, layers: int = 4) -> nn.Sequential:
    """`strided_convolutions` with running statistics, which normalise where nothing is trained: a picture's features
    are then its own, whatever else is in the batch."""
    return _convolutions(space, channels, layers, running=True)


def _convolutions(space: gym.Space, channels: int, layers: int, running: bool) -> nn.Sequential:
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 2:
        raise SpaceError(f"convolutions: the observation space is {space}, expected a Box of shape (H, W)")
    parts: list[nn.Module] = [nn.Unflatten(1, (1, space.shape[0]))]
    for incoming in (1, *(channels,) * (layers - 1)):
        parts += [nn.Conv2d(incoming, channels, 3, stride=2, padding=1)]
        parts += [nn.BatchNorm2d(channels, track_running_stats=running), nn.ReLU()]
    return nn.Sequential(*parts, nn.Flatten())
