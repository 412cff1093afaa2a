"""Warnings about NaN and infinity from an environment, with its name and row."""

from __future__ import annotations

import warnings

import numpy as np


def warn(name: str, what: str, row: int, batch: tuple[int, ...], step: int) -> None:
    """Warn that an environment returned NaN or infinity.

    Args:
        name: of the environment.
        what: the rest of the sentence about what it returned.
        row: flat index into `batch`.
        batch: `[*L, N]`, the axes of the rows.
        step: of the episode, from 1; 0 for its reset.
    """
    *learner, env = (int(index) for index in np.unravel_index(row, batch))
    place = f", environment {env} of learner {', '.join(map(str, learner))}" if learner else ""
    when = f"at step {step} of its episode" if step else "at its reset"
    warnings.warn(
        f"{name} {what} in row {row}{place}, {when}: a learner that learns from it is not finite any more; correct the "
        "environment",
        stacklevel=2,
    )
