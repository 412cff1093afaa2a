"""Metrics of lifelong learning (accuracy, backward and forward transfer, forgetting) from the score matrix.

`R[i, j]` is the score on task j after training on i tasks of the stream, `[..., T + 1, T]`: row 0 is the untrained
learner, row T the final one, and columns are in the order of the stream, so that task j is trained between rows j and
j + 1. NaN stands for "not evaluated" and makes NaN of every average it enters; a single task has no transfer and no
forgetting, which is NaN and not 0. Published code differs in every one of these (divisions by T instead of T - 1, a
maximum that includes the final row, zeros for what was never measured); here are the papers' definitions.

Every task counts the same in every average, however many samples or classes it has; `accuracy` takes other weights.

Where a task's classes are added when it begins (the scenario "class" of labelled samples), nobody can be right about
them before: the scores above the diagonal are NaN, and so is the forward transfer, which is not defined there.

Sources: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", 2017 (accuracy, backward and forward
transfer); Chaudhry et al., "Riemannian Walk for Incremental Learning", 2018 (forgetting).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlmeta.errors import SettingError
from rlmeta.functional import statistics


def accuracy(matrix: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """Accuracy (ACC): mean over tasks of the final scores, (1 / T) Σⱼ R[T, j]; `[..., T + 1, T]` -> `[...]`.

    Args:
        matrix: the scores.
        weights: of the tasks, `[T]` or `[..., T]`, instead of equal ones: `run.evaluation.lengths` of a run on labelled
            samples are how many each task is tested on, so that every sample counts the same.

    Raises:
        SettingError: weights that are not one for each task, negative, or all 0.
    """
    final = _checked(matrix)[..., -1, :]
    if weights is None:
        return final.mean(-1)
    w = np.asarray(weights, dtype=np.float64)
    if not w.shape or w.shape[-1] != final.shape[-1] or not (w >= 0).all() or not (w.sum(-1) > 0).all():
        raise SettingError(f"weights {w.tolist()}, expected one of at least 0 for each of the {final.shape[-1]} tasks")
    return (final * w).sum(-1) / w.sum(-1)


def learning_accuracy(matrix: ArrayLike) -> Any:
    """Learning accuracy: mean score right after training, (1 / T) Σⱼ R[j + 1, j]; `[..., T + 1, T]` -> `[...]`."""
    return _trained(_checked(matrix)).mean(-1)


def backward_transfer(matrix: ArrayLike, maximise: bool = True) -> Any:
    """Backward transfer (BWT): mean change by later training, (1 / (T - 1)) Σⱼ R[T, j] - R[j + 1, j].

    With `maximise=False` scores are losses and the difference is the other way round, so that more is better.
    """
    r = _rising(matrix, maximise)
    return _mean((r[..., -1, :] - _trained(r))[..., :-1])


def forward_transfer(matrix: ArrayLike, maximise: bool = True) -> Any:
    """Forward transfer (FWT): mean gain before a task is trained, (1 / (T - 1)) Σⱼ R[j, j] - R[0, j].

    With `maximise=False` scores are losses and the difference is the other way round, so that more is better. NaN where
    a task has no score before it is trained, as when its classes are added with it.
    """
    r = _rising(matrix, maximise)
    before = np.diagonal(r[..., :-1, :], axis1=-2, axis2=-1)
    return _mean((before - r[..., 0, :])[..., 1:])


def forgetting(matrix: ArrayLike, maximise: bool = True) -> Any:
    """Forgetting: mean over all tasks but the last of the best earlier score less the final one.

    The best is that since the task was trained. Forgetting is negative where the last task helped. With
    `maximise=False` scores are losses: the best is the lowest.
    """
    return _mean(task_forgetting(matrix, maximise)[..., :-1])


def task_forgetting(matrix: ArrayLike, maximise: bool = True) -> NDArray[np.float64]:
    """Forgetting of every task, `[..., T + 1, T]` -> `[..., T]`; NaN for the last task, which nothing came after."""
    r = _rising(matrix, maximise)
    tasks = r.shape[-1]
    lost = np.full((*r.shape[:-2], tasks), np.nan)
    for j in range(tasks - 1):
        lost[..., j] = r[..., j + 1 : tasks, j].max(-1) - r[..., tasks, j]
    return lost


def forgetting_first(matrix: ArrayLike, maximise: bool = True) -> Any:
    """Forgetting since training: mean score right after a task less its final one, without the last task; minus BWT."""
    return -backward_transfer(matrix, maximise)


def summary(matrix: ArrayLike, maximise: bool = True) -> dict[str, Any]:
    """Compute all metrics by name, `[...]` each."""
    return {
        "accuracy": accuracy(matrix),
        "backward_transfer": backward_transfer(matrix, maximise),
        "forward_transfer": forward_transfer(matrix, maximise),
        "forgetting": forgetting(matrix, maximise),
        "forgetting_first": forgetting_first(matrix, maximise),
        "learning_accuracy": learning_accuracy(matrix),
    }


class Estimate(NamedTuple):
    """Estimate of a metric: mean over runs and 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def estimates(matrix: ArrayLike, maximise: bool = True) -> dict[str, Estimate]:
    """Estimate all metrics over runs `[S, T + 1, T]`, with intervals, which mean little for three runs or fewer."""
    estimates = {}
    for name, values in summary(matrix, maximise).items():
        values = np.atleast_1d(values)
        low, high = statistics.stratified_bootstrap_interval(values, statistics.mean)
        estimates[name] = Estimate(float(values.mean()), float(low), float(high))
    return estimates


def _checked(matrix: ArrayLike) -> NDArray[np.float64]:
    r = np.asarray(matrix, dtype=np.float64)
    if r.ndim < 2 or r.shape[-2] != r.shape[-1] + 1 or r.shape[-1] == 0:
        raise SettingError(
            f"the matrix of scores has shape {r.shape}, expected [..., T + 1, T]: a row before any training and one "
            "after each task"
        )
    return r


def _rising(matrix: ArrayLike, maximise: bool) -> NDArray[np.float64]:
    """Validate a score matrix, and negate losses, so that more is better."""
    return _checked(matrix) * (1.0 if maximise else -1.0)


def _trained(r: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores right after each task's training, R[j + 1, j], `[..., T]`."""
    return np.diagonal(r[..., 1:, :], axis1=-2, axis2=-1)


def _mean(values: NDArray[np.float64]) -> Any:
    """Mean over the last axis; NaN, without a warning, if it is empty."""
    return values.mean(-1) if values.shape[-1] else np.full(values.shape[:-1], np.nan)[()]
