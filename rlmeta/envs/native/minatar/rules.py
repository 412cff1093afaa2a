"""Action sets, sticky actions and pictures, which MinAtar's games share."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rlmeta.envs.world import State
from rlmeta.errors import SettingError

SIDE = 10
"""Rows and columns of the grid; a cell's number is `SIDE * row + column`."""
ACTIONS = "nlurdf"
"""All actions: none, left, up, right, down, fire."""
NONE, LEFT, UP, RIGHT, DOWN, FIRE = range(len(ACTIONS))

_CELLS = torch.arange(SIDE * SIDE, device="cpu")
_ASIDE = torch.tensor([0, -1, 0, 1, 0, 0], device="cpu")
_DOWNWARDS = torch.tensor([0, 0, -1, 0, 1, 0], device="cpu")
_MINIMAL = {
    letters: torch.tensor([ACTIONS.index(letter) for letter in letters], device="cpu")
    for letters in ("nlr", "nlrf", "nlurd")
}
"""Indices into `ACTIONS` of the action sets that leave some out."""


def require_probability(owner: str, probability: float) -> None:
    """Refuse a probability of a sticky action that is none.

    Raises:
        SettingError: it is not in [0, 1].
    """
    if not 0 <= probability <= 1:
        raise SettingError(f"{owner}: sticky_action_prob={probability}: expected a probability, from 0 to 1")


def observation_space(channels: int) -> gym.Space:
    """Space of pictures `[10, 10, channels]` of 0 and 1."""
    return gym.spaces.Box(0, 1, (SIDE, SIDE, channels), np.uint8)


def action_space(actions: str) -> gym.Space:
    """Space of an action set, a part of `ACTIONS`."""
    return gym.spaces.Discrete(len(actions))


def sticky(state: State, action: Tensor, actions: str, noise: Tensor, probability: float | Tensor) -> Tensor:
    """Action that is done, as an index into `ACTIONS`: the last one again with some probability.

    Args:
        state: with `last_action`, the one that was done in the last step.
        action: index into the action set, `[*B]`.
        actions: the action set.
        noise: `[*B]` uniform in (0, 1): below the probability the last action is repeated.
        probability: of that.
    """
    if actions != ACTIONS:
        action = _MINIMAL[actions].to(action.device)[action]
    return torch.where(noise < probability, state["last_action"], action)


def aside(action: Tensor) -> Tensor:
    """Columns that an action moves: -1 left, 1 right, 0 otherwise."""
    return _ASIDE.to(action.device)[action]


def downwards(action: Tensor) -> Tensor:
    """Rows that an action moves: -1 up, 1 down, 0 otherwise."""
    return _DOWNWARDS.to(action.device)[action]


def mark(cell: Tensor) -> Tensor:
    """Grid that is set in one cell: `[*B, 100]` bool of `[*B]`."""
    return _CELLS.to(cell.device) == cell.unsqueeze(-1)


def at(grid: Tensor, cell: Tensor) -> Tensor:
    """Content of one cell: `[*B]` of `[*B, 100]`."""
    return grid.gather(-1, cell.unsqueeze(-1)).squeeze(-1)


def picture(*channels: Tensor) -> Tensor:
    """Observation `[*B, 10, 10, C]` uint8 of grids `[*B, 100]` bool."""
    stacked = torch.stack(channels, -1).to(torch.uint8)
    return stacked.reshape(*stacked.shape[:-2], SIDE, SIDE, len(channels))
