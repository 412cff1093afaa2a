"""Convolutional encoders of pictures: those of Nature's DQN, of IMPALA, and of MinAtar; which axes are channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from rlmeta.errors import SettingError, SpaceError
from rlmeta.nn.block import Block, Context, Params
from rlmeta.nn.encoder import byte_bound
from rlmeta.nn.initialisers import Initialiser, initialise

_KERNEL = 3
"""Least height and width of a picture: the side of the smallest convolution."""

_NATURE = 36
"""Least height and width for Nature's three convolutions."""


class Layout(NamedTuple):
    """Axes of a picture."""

    channels: int
    """Its channels, times the pictures in a stack."""
    height: int
    width: int
    order: tuple[int, ...]
    """The axes of the space in the order stack (if there is one), channels, height, width."""


def picture_layout(space: gym.Space) -> Layout | None:
    """Read which axes of a picture are its channels, height and width.

    A picture is a Box of 3 axes, or of 4 if a stack comes first, of bytes (uint8) or with the bounds 0 and 1. Its axes
    are `[H, W, C]`, as Gymnasium's, or `[C, H, W]`, as those of a stack of grey pictures: the channels are the smallest
    axis, if there is one and it is the first or the last; else the one beside two equal axes; of three equal axes the
    last. Height and width must be 3 or more.

    Args:
        space: of one observation, or of a part of it.

    Returns:
        The layout; None if the space is no picture.

    Raises:
        SpaceError: the rule does not say which axis are the channels.
    """
    if not isinstance(space, gym.spaces.Box) or len(space.shape) not in (3, 4) or 0 in space.shape:
        return None
    if space.dtype != np.uint8 and ((space.low != 0).any() or (space.high != 1).any()):
        return None
    stack, shape = space.shape[:-3], space.shape[-3:]
    last = _channels_last(shape)
    if last is None:
        if min(_sides(shape, True)) < _KERNEL and min(_sides(shape, False)) < _KERNEL:
            return None
        raise SpaceError(
            f"a picture of {space} may be [H, W, C] or [C, H, W]: transpose it by a wrapper so that the channels are "
            "its smallest axis and the first or the last, or give a network= of your own"
        )
    height, width = _sides(shape, last)
    if min(height, width) < _KERNEL:
        return None
    first = len(stack)
    order = (*range(first), *((first + 2, first, first + 1) if last else (first, first + 1, first + 2)))
    return Layout(int(np.prod(space.shape)) // (height * width), height, width, order)


def _sides(shape: tuple[int, ...], channels_last: bool) -> tuple[int, ...]:
    return shape[:2] if channels_last else shape[1:]


def _channels_last(shape: tuple[int, ...]) -> bool | None:
    """Whether the channels are the last of three axes (else the first); None if that is not clear."""
    first, middle, last = shape
    if min(first, last) < middle and first != last:
        return last < first
    if first == middle or middle == last:
        return first == middle
    return None


class Picture(Block):
    """Picture scaling: an observation `[*L, ..., *shape]` of bytes or floats as floats `[*L, ..., C, H, W]`.

    Bytes are divided by the bound that the space declares; floats stay as they are, since somebody has scaled them.
    """

    def __init__(self, space: gym.Space) -> None:
        """Create the block; `space` is of one picture, see `picture_layout`.

        Raises:
            SpaceError: the space is no picture.
        """
        super().__init__()
        layout = picture_layout(space)
        if layout is None:
            raise SpaceError(
                f"{space} is no picture: expected a Box of shape (H, W, C) or (C, H, W), of uint8 or with the bounds 0 "
                f"and 1, and {_KERNEL} pixels or more high and wide"
            )
        self.layout, self._shape = layout, tuple(space.shape or ())
        bound = byte_bound(space)
        self._bound = bound.reshape(self._shape) if isinstance(bound, Tensor) else bound

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Tensor:
        """Scale and transpose `[*L, ..., *shape]` to `[*L, ..., C, H, W]`."""
        lead = x.dim() - len(self._shape)
        if tuple(x.shape[max(lead, 0) :]) != self._shape:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected {('...', *self._shape)}")
        bound = self._bound if x.dtype == torch.uint8 else None
        x = x if x.is_floating_point() else x.to(torch.float32)
        if bound is not None:
            x = x / (bound.to(x) if isinstance(bound, Tensor) else bound)
        x = x.permute(*range(lead), *(lead + axis for axis in self.layout.order))
        return x.reshape(*x.shape[:lead], *self.layout[:3])


def minatar_cnn(space: gym.Space, initialiser: Initialiser = "torch") -> nn.Sequential:
    """Convolutional network of MinAtar: one convolution of 16 filters 3 x 3, then 128 units, with ReLU.

    Source: Young and Tian, "MinAtar", 2019.

    Args:
        space: of a picture, 3 x 3 or more.
        initialiser: of all layers, see `initialise`.

    Returns:
        A network `[B, *shape]` -> `[B, 128]`.

    Raises:
        SpaceError: the space is no picture.
    """
    picture = Picture(space)
    parts = [nn.Conv2d(picture.layout.channels, 16, 3), nn.ReLU()]
    return _encoder(picture, parts, 128, initialiser)


def nature_cnn(space: gym.Space, initialiser: Initialiser = "torch") -> nn.Sequential:
    """Convolutional network of DQN: 32 filters 8 x 8 of stride 4, 64 4 x 4 of stride 2, 64 3 x 3, 512 units, with ReLU.

    Source: Mnih et al., "Human-level control through deep reinforcement learning", Nature, 2015.

    Args:
        space: of a picture, 36 x 36 or more.
        initialiser: of all layers, see `initialise`.

    Returns:
        A network `[B, *shape]` -> `[B, 512]`.

    Raises:
        SpaceError: the space is no picture, or a smaller one.
    """
    picture = Picture(space)
    channels, height, width, _ = picture.layout
    if min(height, width) < _NATURE:
        raise SpaceError(
            f"a picture of {height} x {width} is too small for Nature's convolutions, which need {_NATURE} x {_NATURE}"
            ": use minatar_cnn or impala_cnn"
        )
    parts = [nn.Conv2d(channels, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU()]
    return _encoder(picture, [*parts, nn.Conv2d(64, 64, 3), nn.ReLU()], 512, initialiser)


def impala_cnn(
    space: gym.Space, channels: Sequence[int] = (16, 32, 32), features: int = 256, initialiser: Initialiser = "torch"
) -> nn.Sequential:
    """Residual convolutional network of IMPALA: sections of a convolution, pooling and two residual blocks, then units.

    Pooling halves height and width, rounded up, so that pictures of any size pass.

    Source: Espeholt et al., "IMPALA", 2018, the large network without its LSTM.

    Args:
        space: of a picture, 3 x 3 or more.
        channels: of every section.
        features: units of the last layer.
        initialiser: of all layers, see `initialise`.

    Returns:
        A network `[B, *shape]` -> `[B, features]`.

    Raises:
        SpaceError: the space is no picture.
        SettingError: there is no section, or one without channels.
    """
    if not channels or min(*channels, features) < 1:
        raise SettingError(
            f"an IMPALA network of channels {tuple(channels)} and {features} features, expected one section or more, "
            "and 1 or more of each"
        )
    picture = Picture(space)
    parts: list[nn.Module] = []
    for incoming, outgoing in zip((picture.layout.channels, *channels), channels):
        parts += [nn.Conv2d(incoming, outgoing, 3, padding=1), nn.MaxPool2d(3, 2, 1)]
        parts += [Residual(outgoing), Residual(outgoing)]
    return _encoder(picture, [*parts, nn.ReLU()], features, initialiser)


def picture_cnn(space: gym.Space, initialiser: Initialiser = "torch") -> nn.Sequential | None:
    """Default convolutional network of a picture: Nature's from 36 x 36 on, below that MinAtar's; None if it is none.

    Args:
        space: of an observation, or of a part of it.
        initialiser: of all layers, see `initialise`.

    Raises:
        SpaceError: it is not clear which axis of the picture are its channels.
    """
    layout = picture_layout(space)
    if layout is None:
        return None
    network = nature_cnn if min(layout.height, layout.width) >= _NATURE else minatar_cnn
    return network(space, initialiser)


class Residual(nn.Module):
    """Residual block of two convolutions 3 x 3: x + conv(relu(conv(relu(x)))), `[B, C, H, W]` of the same shape."""

    def __init__(self, channels: int) -> None:
        """Create the block with as many channels out as in."""
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Add the convolutions' output to `x`."""
        out: Tensor = x + self.second(torch.relu(self.first(torch.relu(x))))
        return out


def _encoder(picture: Picture, parts: list[nn.Module], features: int, initialiser: Initialiser) -> nn.Sequential:
    """Put a picture's convolutions between its scaling and a last layer with ReLU, and initialise all weights."""
    with torch.no_grad():
        size = nn.Sequential(*parts).to(torch.float32)(torch.zeros(1, *picture.layout[:3], dtype=torch.float32)).numel()
        network = nn.Sequential(picture, *parts, nn.Flatten(), nn.Linear(size, features), nn.ReLU()).to(torch.float32)
        for part in network.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                initialise(part.weight, part.bias, initialiser, 2**0.5 if initialiser == "orthogonal" else 1.0)
    return network
