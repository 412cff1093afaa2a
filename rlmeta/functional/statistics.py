"""Statistics of scores over runs and tasks, and bootstrap confidence intervals (rliable, Agarwal et al., 2021).

Scores are `[runs, tasks]`, or `[runs]` for one task. Every statistic takes any number of further axes in front
(`[..., runs, tasks]`), which is how the bootstrap computes all its replicates at once. A score that is NaN makes the
statistic NaN: give a failed run a score rather than leave it out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlmeta.errors import SettingError

Statistic: TypeAlias = Callable[[NDArray[np.float64]], Any]


def mean(scores: ArrayLike) -> Any:
    """Mean score over all runs and tasks, which a single outlier can dominate.

    Args:
        scores: `[..., runs, tasks]` or `[runs]`.

    Returns:
        `[...]`, a number for one set of scores.
    """
    return _table(scores).mean((-2, -1))


def median(scores: ArrayLike) -> Any:
    """Median over tasks of the mean over runs, as rliable defines it; with one task the mean of its runs.

    Args:
        scores: `[..., runs, tasks]` or `[runs]`.

    Returns:
        `[...]`
    """
    return np.median(_table(scores).mean(-2), -1)


def iqm(scores: ArrayLike) -> Any:
    """Interquartile mean: the mean of the middle half of all runs of all tasks together.

    A quarter of the values, rounded down, is left out at either side: scipy's `trim_mean(scores, 0.25, axis=None)`.
    With fewer than 4 values that is none, and the IQM of three runs on one task is their mean: show runs as points.

    Args:
        scores: `[..., runs, tasks]` or `[runs]`.

    Returns:
        `[...]`
    """
    table = _table(scores)
    pooled = np.sort(table.reshape(*table.shape[:-2], -1), -1)
    trimmed = pooled.shape[-1] // 4
    middle = pooled[..., trimmed : pooled.shape[-1] - trimmed].mean(-1)
    return np.where(np.isnan(pooled[..., -1]), np.nan, middle)[()]  # sorting puts NaN last, where it would be trimmed


def optimality_gap(scores: ArrayLike, target: float = 1.0) -> Any:
    """Optimality gap, how far runs stay below a target score: target - mean(min(score, target)).

    Args:
        scores: `[..., runs, tasks]` or `[runs]`.
        target: the score beyond which more is worth nothing; in units of the scores.

    Returns:
        `[...]`
    """
    return target - np.minimum(_table(scores), target).mean((-2, -1))


def performance_profile(scores: ArrayLike, thresholds: ArrayLike) -> NDArray[np.float64]:
    """Performance profile: the fraction of all runs that score above each threshold.

    Args:
        scores: `[..., runs, tasks]` or `[runs]`.
        thresholds: `[P]`

    Returns:
        `[..., P]`
    """
    table = _table(scores)[..., None]
    above = np.where(np.isnan(table), np.nan, table > np.asarray(thresholds))
    return above.mean((-3, -2))


def probability_of_improvement(scores: ArrayLike, baseline: ArrayLike) -> Any:
    """Probability of improvement: that a run scores above a baseline run on the same task; ties count one half.

    The mean over tasks of Mann and Whitney's U / (runs · baseline runs).

    Args:
        scores: `[..., runs, tasks]` or `[runs]`.
        baseline: `[..., baseline runs, tasks]` or `[baseline runs]`, of as many tasks.

    Returns:
        `[...]`

    Raises:
        SettingError: the numbers of tasks differ.
    """
    ours, theirs = _table(scores), _table(baseline)
    if ours.shape[-1] != theirs.shape[-1]:
        raise SettingError(f"scores has {ours.shape[-1]} tasks, baseline {theirs.shape[-1]}, expected the same tasks")
    difference = ours[..., :, None, :] - theirs[..., None, :, :]
    return ((np.sign(difference) + 1) / 2).mean((-3, -2, -1))


def stratified_bootstrap_interval(
    scores: ArrayLike, statistic: Statistic = iqm, reps: int = 2000, confidence: float = 0.95, seed: int = 0
) -> tuple[Any, Any]:
    """Stratified percentile bootstrap interval: runs are resampled within each task, tasks are kept.

    With three runs there are ten different samples of a task and no interval means much: show the runs as points.

    Args:
        scores: `[runs, tasks]` or `[runs]`.
        statistic: from `[reps, runs, tasks]` to `[reps, ...]`: any of this file.
        reps: number of replicates.
        confidence: fraction of them that lies in the interval.
        seed: of the resampling; equal arguments give equal intervals.

    Returns:
        Lower and upper end, `[...]` each.
    """
    table = _table(scores)
    if table.ndim != 2 or table.size == 0:
        raise SettingError(f"scores is {list(table.shape)}, expected [runs, tasks] with at least one of each")
    runs, tasks = table.shape
    drawn = np.random.default_rng(seed).integers(runs, size=(reps, runs, tasks))
    replicates = statistic(table[drawn, np.arange(tasks)])
    low, high = np.quantile(replicates, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high


def _table(scores: ArrayLike) -> NDArray[np.float64]:
    """Convert scores to float64 `[..., runs, tasks]`."""
    table = np.asarray(scores, dtype=np.float64)
    return table[:, None] if table.ndim == 1 else table
