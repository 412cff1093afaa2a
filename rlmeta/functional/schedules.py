"""Schedules of settings, such as learning rates, over progress: the fraction of training done, in [0, 1].

    learning_rate = warm_up(cosine(3e-4, 0.0), 0.05)
    learning_rate(0.25)

Progress is a number or a tensor, the ends are numbers or tensors (one per learner), and the value is elementwise in
all of them. Progress outside [0, 1] counts as the nearer end: the last rollout of a run may overshoot.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from rlmeta.errors import SettingError, require_choice

Value: TypeAlias = float | Tensor
Schedule: TypeAlias = Callable[[Value], Value]
ScheduleName: TypeAlias = Literal["constant", "linear", "cosine"]
"""Schedule of a setting over the budget."""


def anneal(value: Tensor, schedule: ScheduleName, progress: Tensor) -> Tensor:
    """Annealing: a setting that falls to 0 over the budget, or stays constant.

    Args:
        value: `[*L]`, the initial value.
        schedule: "constant", "linear" or "cosine".
        progress: `[*L]`, the fraction of the budget that is spent.

    Returns:
        `[*L]` in the dtype of `value`.

    Raises:
        SettingError: no such schedule.
    """
    require_choice("schedule", schedule, ScheduleName)
    if schedule == "constant":
        return value
    annealed = (linear if schedule == "linear" else cosine)(value, 0.0)(progress)
    assert isinstance(annealed, Tensor)
    return annealed


def constant(value: Value) -> Schedule:
    """Constant schedule.

    Args:
        value: a number or a tensor.

    Returns:
        A function of progress.
    """
    return lambda progress: value


def linear(start: Value, end: Value = 0.0) -> Schedule:
    """Linear schedule, start (1 - p) + end p.

    Args:
        start: the value at progress 0.
        end: the value at progress 1.

    Returns:
        A function of progress p.
    """

    def schedule(progress: Value) -> Value:
        spent = _unit(progress)
        return start * _typed(1 - spent, start) + end * _typed(spent, start)

    return schedule


def cosine(start: Value, end: Value = 0.0) -> Schedule:
    """Cosine schedule, end + (start - end) (1 + cos(π p)) / 2 (Loshchilov and Hutter, 2017, without restarts).

    Args:
        start: the value at progress 0.
        end: the value at progress 1.

    Returns:
        A function of progress p.
    """

    def schedule(progress: Value) -> Value:
        angle = math.pi * _unit(progress)
        cos = torch.cos(angle) if isinstance(angle, Tensor) else math.cos(angle)
        return end + (start - end) * _typed((1 + cos) / 2, start)

    return schedule


def exponential(start: Value, end: Value) -> Schedule:
    """Exponential schedule, start (end / start)ᵖ: a straight line on a logarithmic axis.

    Args:
        start: the value at progress 0, positive.
        end: the value at progress 1, positive.

    Returns:
        A function of progress p.

    Raises:
        SettingError: an end is not positive.
    """
    for name, value in (("start", start), ("end", end)):
        if not (bool((value > 0).all()) if isinstance(value, Tensor) else value > 0):
            raise SettingError(f"exponential schedule: {name} is {value}, expected a positive number; linear reaches 0")
    return lambda progress: start * (end / start) ** _unit(progress)


def warm_up(schedule: Schedule, fraction: float) -> Schedule:
    """Linear warm-up from 0 to the schedule's first value, then the whole schedule in the remaining progress.

    Args:
        schedule: of the rest.
        fraction: the progress at which it starts, in [0, 1); 0 changes nothing.

    Returns:
        A function of progress.

    Raises:
        SettingError: the fraction is not in [0, 1).
    """
    if not 0 <= fraction < 1:
        raise SettingError(f"warm_up fraction is {fraction}, expected at least 0 and less than 1")
    if fraction == 0:
        return schedule
    return lambda progress: schedule((progress - fraction) / (1 - fraction)) * _unit(progress / fraction)


def _unit(progress: Value) -> Value:
    return progress.clamp(0, 1) if isinstance(progress, Tensor) else min(max(progress, 0.0), 1.0)


def _typed(fraction: Value, value: Value) -> Value:
    """Cast a fraction to the dtype of the value: progress is float64, settings are float32."""
    return fraction.to(value.dtype) if isinstance(fraction, Tensor) and isinstance(value, Tensor) else fraction
