"""Pictures of native environments: grids of cells, points in the plane, observations, and gymnasium's own pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlmeta.errors import require_extra
from rlmeta.functional import tree
from rlmeta.functional.tree import Tree

Picture: TypeAlias = NDArray[np.uint8]
"""RGB picture `[height, width, 3]`."""
Colour: TypeAlias = tuple[int, int, int]
Draw: TypeAlias = Callable[[dict[str, Any], Mapping[str, Tensor]], Picture]
"""Function of the state and the physics of a single environment, tensors without the axes of rows, to its picture."""

WHITE: Colour = (255, 255, 255)
GREY: Colour = (120, 120, 120)
BLACK: Colour = (40, 40, 40)
BLUE: Colour = (0, 114, 178)
GREEN: Colour = (0, 158, 115)
RED: Colour = (213, 94, 0)
PALETTE: tuple[Colour, ...] = (
    BLUE, RED, (240, 228, 66), GREEN, (204, 121, 167), (86, 180, 233), (230, 159, 0),
)  # fmt: skip
"""Colours for things that have no colour of their own (Okabe and Ito, 2008)."""

_SIDE = 320
"""Pixels that the shorter side of a grid has about."""


class Drawing(NamedTuple):
    """How an environment is drawn."""

    draw: Draw
    fps: int
    """Pictures a second at the environment's own speed."""


def twin(identifier: str, **settings: Any) -> tuple[Any, int]:
    """Create gymnasium's environment of the same world, which is drawn in a state that is set, and its speed.

    Raises:
        MissingExtraError: pygame, with which it draws, is not installed.
    """
    require_extra("pygame", "video", f"a picture of {identifier}")
    env: Any = gym.make(identifier, render_mode="rgb_array", disable_env_checker=True, **settings).unwrapped
    env.reset(seed=0)
    return env, int(env.metadata["render_fps"])


def cells(shape: tuple[int, int], layers: Iterable[tuple[Iterable[tuple[int, int]], Colour]]) -> Picture:
    """Grid of cells, of which some have a colour.

    Args:
        shape: rows and columns.
        layers: cells (row, column) and their colour; later ones hide earlier ones, and cells outside are left out.
    """
    grid = np.full((*shape, 3), WHITE, np.uint8)
    for marked, colour in layers:
        for row, column in marked:
            if 0 <= row < shape[0] and 0 <= column < shape[1]:
                grid[row, column] = colour
    return _enlarged(grid)


def _enlarged(grid: Picture) -> Picture:
    """Picture of a grid with a colour for each cell, with lines between the cells."""
    side = max(4, min(40, _SIDE // min(grid.shape[:2]), 3 * _SIDE // max(grid.shape[:2])))
    picture = grid.repeat(side, 0).repeat(side, 1)
    picture[::side] = picture[:, ::side] = (225, 225, 225)
    return picture


def plane(span: float, discs: Sequence[tuple[Sequence[float], float, Colour]]) -> Picture:
    """Square part of the plane, from -span to span, with discs.

    Args:
        span: largest coordinate that is seen.
        discs: centre (x, y), radius and colour; a disc has at least the size of a dot.
    """
    axis = (np.arange(_SIDE) + 0.5) / _SIDE * 2 * span - span
    picture = np.full((_SIDE, _SIDE, 3), WHITE, np.uint8)
    picture[_SIDE // 2], picture[:, _SIDE // 2] = (225, 225, 225), (225, 225, 225)
    for (x, y), radius, colour in discs:
        square = (axis - x) ** 2 + (-axis[:, None] - y) ** 2
        picture[square <= max(radius, span / 32) ** 2] = colour
    return picture


def observed(space: gym.Space, observation: Tree) -> Picture:
    """Picture of an observation, for environments without a drawing of their own.

    A Box of rank two or three is drawn as cells, with a colour for each channel, one with three channels of bytes as
    the picture that it is, a discrete one as the cell of its number, anything else as bars between the bounds.
    """
    if isinstance(space, gym.spaces.Discrete):
        return cells((1, int(space.n)), [([(0, int(observation))], BLUE)])
    if isinstance(space, gym.spaces.Box) and len(space.shape) in (2, 3):
        return _pixels(space, observation.detach().cpu().double().numpy())
    leaves = [leaf.detach().cpu().double().flatten() for leaf in tree.leaves(observation)]
    return _bars(torch.cat(leaves).numpy())


def _pixels(space: gym.spaces.Box, values: NDArray[np.float64]) -> Picture:
    values = values if values.ndim == 3 else values[..., None]
    if values.shape[-1] == 3 and space.dtype == np.uint8 and float(space.high.max()) == 255:
        grid = values.astype(np.uint8)
        side = max(1, _SIDE // min(grid.shape[:2]))
        return grid.repeat(side, 0).repeat(side, 1)
    low, high = float(space.low.min()), float(space.high.max())
    scale = high - low if math.isfinite(high - low) else max(1.0, float(np.abs(values).max()))
    part = np.clip((values - (low if math.isfinite(low) else 0.0)) / scale, 0, 1)
    mixed = np.full((*values.shape[:2], 3), WHITE, np.float64)
    for channel in range(values.shape[-1]):
        colour = np.array(PALETTE[channel % len(PALETTE)], np.float64)
        mixed += part[..., channel, None] * (colour - mixed)
    return _enlarged(mixed.astype(np.uint8))


def _bars(values: NDArray[np.float64]) -> Picture:
    """Bars upwards and downwards from a line in the middle, of the height of tanh(value)."""
    width, middle = max(4, min(40, 3 * _SIDE // max(1, len(values)))), _SIDE // 2
    picture = np.full((_SIDE, max(_SIDE, width * len(values)), 3), WHITE, np.uint8)
    heights = np.rint(np.tanh(np.nan_to_num(values)) * (middle - 4)).astype(int)
    for i, height in enumerate(heights):
        top, bottom = sorted((middle - height, middle))
        picture[top : bottom + 1, i * width + 1 : (i + 1) * width] = PALETTE[i % len(PALETTE)]
    picture[middle] = GREY
    return picture
