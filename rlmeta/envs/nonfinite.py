"""NaN and infinity of an environment: the words that name it and its row, the same for every kind of environment."""

from __future__ import annotations

import warnings

import numpy as np


def warn(name: str, what: str, row: int, batch: tuple[int, ...], step: int) -> None:
    """Warn that an environment gave a number that is not finite.

    Args:
        name: of the environment.
        what: it gave.
        row: of `batch`, counted through.
        batch: `[*L, N]`, the axes of the rows.
        step: of the episode, from 1; 0 is its reset.
    """
    *learner, env = (int(place) for place in np.unravel_index(row, batch))
    said = f", environment {env} of learner {', '.join(map(str, learner))}" if learner else ""
    when = f"at step {step} of its episode" if step else "at its reset"
    warnings.warn(
        f"{name} {what} in row {row}{said}, {when}: a learner that learns from it is not finite any more; correct the "
        "environment",
        stacklevel=2,
    )
