"""Warnings about NaN, infinity and observations outside their space, once per world, with name and row."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from rlmeta.data.spaces import Array, Leaf
from rlmeta.envs import nonfinite
from rlmeta.envs.gymnasium.rows import Buffers

_SLACK = 1e-6
"""Relative tolerance of a bound, for rounding to float32."""


class Reports:
    """Warns of the first reward or observation that is not finite, and of the first observation outside its space.

    Args:
        name: of the environment.
        leaves: of its observations.
        batch: `[*L, N]`, the axes of its rows.
    """

    def __init__(self, name: str, leaves: Sequence[Leaf], batch: tuple[int, ...]) -> None:
        self.name, self._batch = name, batch
        self._finite = [(i, leaf) for i, leaf in enumerate(leaves) if leaf.stored.kind == "f"]
        bounds = [(i, leaf, _stored_bounds(leaf)) for i, leaf in enumerate(leaves)]
        self._bounded = [(i, leaf, *limits) for i, leaf, limits in bounds if limits is not None]
        self._rewards = True

    def reset(self, observation: Sequence[Array]) -> None:
        """Check the observations of a reset, `[R, *shape]` per leaf."""
        self._look(observation, None)

    def step(self, buffers: Buffers, ended: Array, elapsed: Array) -> None:
        """Check the results of a step, and final observations where `ended` `[R]`; `elapsed` `[R]` steps precede it."""
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
            values = observation[i] if rows is None else observation[i][rows]
            outside = (values < low) | (values > high)
            if outside.any() and np.isfinite(values[outside]).any():  # NaN and infinity were reported above
                self._bounded.remove(bounded)
                # the same text for all rows, so that Python shows the warning of later worlds no second time
                warnings.warn(
                    f"{self.name} gave an observation{leaf.where} outside of its space {leaf.space}: it is used as it "
                    "is; correct the bounds of the environment's observation_space, or what it returns",
                    stacklevel=2,
                )

    def _warn(self, what: str, row: int, elapsed: Array | None) -> None:
        nonfinite.warn(self.name, what, row, self._batch, 0 if elapsed is None else int(elapsed[row]) + 1)


def _row(wrong: Array, rows: Array | None) -> int:
    """Find the first of the checked rows with a wrong entry."""
    first = int(np.flatnonzero(wrong.reshape(len(wrong), -1).any(-1))[0])
    return first if rows is None else int(np.flatnonzero(rows)[first])


def _stored_bounds(leaf: Leaf) -> tuple[Array, Array] | None:
    """Derive bounds for a comparison with stored values; None if no stored value can be outside."""
    if leaf.bounds is None:
        return None
    low, high = (np.asarray(bound, np.float64) for bound in leaf.bounds)
    if leaf.stored == np.uint8 and bool((low <= 0).all() and (high >= 255).all()):
        return None
    slack = [np.where(np.isfinite(bound), _SLACK * np.maximum(1.0, np.abs(bound)), 0.0) for bound in (low, high)]
    return (low - slack[0]).astype(np.float32), (high + slack[1]).astype(np.float32)
