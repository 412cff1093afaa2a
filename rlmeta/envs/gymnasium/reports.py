"""What an environment gives that is no error but spoils learning, said once, with its name and row."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from rlmeta.data.spaces import Array, Leaf
from rlmeta.envs import spoilt
from rlmeta.envs.gymnasium.rows import Buffers

_SLACK = 1e-6
"""Relative to a bound: what rounding to float32 may take an observation beyond it."""


class Reports:
    """Warns of the first reward or observation that is not finite, and of the first that is outside its space.

    Args:
        name: of the environment.
        leaves: of its observations.
        batch: `[*L, N]`, the axes of its rows.
    """

    def __init__(self, name: str, leaves: Sequence[Leaf], batch: tuple[int, ...]) -> None:
        self.name, self._batch = name, batch
        self._finite = [(i, leaf) for i, leaf in enumerate(leaves) if leaf.stored.kind == "f"]
        bounds = [(i, leaf, _stored_bounds(leaf)) for i, leaf in enumerate(leaves)]
        self._bounded = [(i, leaf, *found) for i, leaf, found in bounds if found is not None]
        self._rewards = True

    def reset(self, observation: Sequence[Array]) -> None:
        """Look at first observations, `[R, *shape]` per leaf."""
        self._look(observation, None)

    def step(self, buffers: Buffers, ended: Array, elapsed: Array) -> None:
        """Look at what a step left, at final observations where `ended` `[R]`; `elapsed` `[R]` steps came before it."""
        if self._rewards and not np.isfinite(buffers.reward).all():
            row = int(np.flatnonzero(~np.isfinite(buffers.reward))[0])
            self._rewards = False
            self._warn(f"gave the reward {buffers.reward[row]}", row, elapsed)
        self._look(buffers.observation, elapsed)
        if ended.any():
            self._look(buffers.final, elapsed, ended)

    def _look(self, observation: Sequence[Array], elapsed: Array | None, rows: Array | None = None) -> None:
        for entry in list(self._finite):
            i, leaf = entry
            wrong = ~np.isfinite(observation[i] if rows is None else observation[i][rows])
            if wrong.any():
                self._finite.remove(entry)
                self._warn(f"gave an observation{leaf.where} that is not finite", _row(wrong, rows), elapsed)
        for bounded in list(self._bounded):
            i, leaf, low, high = bounded
            given = observation[i] if rows is None else observation[i][rows]
            outside = (given < low) | (given > high)
            if outside.any() and np.isfinite(given[outside]).any():  # what is not finite was said above
                self._bounded.remove(bounded)
                # the same words whatever the row, so that worlds made later do not say it again
                warnings.warn(
                    f"{self.name} gave an observation{leaf.where} outside of its space {leaf.space}: it is used as it "
                    "is; correct the bounds of the environment's observation_space, or what it returns",
                    stacklevel=2,
                )

    def _warn(self, what: str, row: int, elapsed: Array | None) -> None:
        spoilt.warn(self.name, what, row, self._batch, 0 if elapsed is None else int(elapsed[row]) + 1)


def _row(wrong: Array, rows: Array | None) -> int:
    """The first row, of those looked at, with a wrong entry."""
    first = int(np.flatnonzero(wrong.reshape(len(wrong), -1).any(-1))[0])
    return first if rows is None else int(np.flatnonzero(rows)[first])


def _stored_bounds(leaf: Leaf) -> tuple[Array, Array] | None:
    """Bounds to compare stored values with; None where no stored value can be outside."""
    if leaf.bounds is None:
        return None
    low, high = (np.asarray(bound, np.float64) for bound in leaf.bounds)
    if leaf.stored == np.uint8 and bool((low <= 0).all() and (high >= 255).all()):
        return None
    slack = [np.where(np.isfinite(bound), _SLACK * np.maximum(1.0, np.abs(bound)), 0.0) for bound in (low, high)]
    return (low - slack[0]).astype(np.float32), (high + slack[1]).astype(np.float32)
