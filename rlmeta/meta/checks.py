"""What a family draws, looked at before training: a mistake in one's own family is told with its split and its shapes.

Two tasks of every split are drawn, for one learner. The learners' own numbers do not depend on it.
"""

from __future__ import annotations

from typing import Any, get_args

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.envs.families import Split
from rlmeta.errors import SettingError
from rlmeta.functional import random, tree

LEADING = (1, 2)
"""`[*L, K]` of what is drawn to look at."""


def check_samples(family: Any) -> None:
    """Refuse a family whose tasks are no samples `{"support": {observation, target}, "query": ...}` of its spaces.

    Raises:
        SettingError: a split has no tasks, or they lack a part, have another shape or type, or are not finite.
    """
    for split, tasks in _drawn(family):
        for part in ("support", "query"):
            where = f"{type(family).__name__}: split {split!r}: {part}"
            observation = _check_leaf(_entry(tasks, part, "observation", where), family.observation_space, where)
            target = _check_leaf(_entry(tasks, part, "target", where), family.action_space, where)
            if observation is not None and target is not None and observation != target:
                raise SettingError(f"{where} has {observation} observations and {target} targets, expected one each")


def check_problems(family: Any) -> None:
    """Refuse a family whose problems have no loss `[*L, K]` that depends on the weights they start from.

    Raises:
        SettingError: a split has no problems, or the weights or losses have other shapes.
    """
    for split, problem in _drawn(family):
        where = f"{type(family).__name__}: split {split!r}"
        start = family.start(problem)
        for name, weight in start.items():
            if weight.shape[: len(LEADING)] != LEADING:
                raise SettingError(f"{where}: weight {name} is {list(weight.shape)}, expected [*L, K, ...] with K = 2")
        weights = {name: weight.detach().requires_grad_() for name, weight in start.items()}
        for steps in (LEADING, ()):  # where each problem is, or where all are
            with torch.enable_grad():
                loss = family.loss(weights, problem, torch.zeros(steps, dtype=torch.int64))
            _check_loss(loss, f"{where}: the loss at step {list(steps)}")


def _check_loss(loss: Tensor, what: str) -> None:
    if loss.shape != LEADING:
        raise SettingError(f"{what} is {list(loss.shape)}, expected [*L, K], one for each problem")
    if not loss.requires_grad:
        raise SettingError(f"{what} does not depend on the weights: compute it from them, without detach or item")
    if not bool(loss.isfinite().all()):
        raise SettingError(f"{what} is {loss.flatten().tolist()} at the start, expected finite numbers")


def _drawn(family: Any) -> list[tuple[str, Any]]:
    """Two tasks of every split."""
    return [(split, family.tasks(random.make_keys([0]), 0, LEADING[-1], split)) for split in get_args(Split)]


def _entry(tasks: Any, part: str, name: str, where: str) -> Any:
    try:
        return tasks[part][name]
    except (KeyError, TypeError, IndexError):
        raise SettingError(
            f"{where} has no {name}: tasks are {{'support': {{'observation', 'target'}}, 'query': the same}}"
        ) from None


def _check_leaf(value: Any, space: gym.Space, where: str) -> int | None:
    """How many samples of the space a task has; None where that is not to be seen, as in spaces of several parts."""
    if not isinstance(value, Tensor):
        for leaf in tree.leaves(value):
            _check_finite(leaf, where)
        return None
    _check_finite(value, where)
    shape = space.shape or ()
    if value.shape[:2] != LEADING or value.dim() != 3 + len(shape) or value.shape[3:] != shape or value.shape[2] < 1:
        raise SettingError(
            f"{where}: got {list(value.shape)} for 2 tasks of one learner, expected "
            f"[1, 2, samples{''.join(f', {size}' for size in shape)}], for {space}"
        )
    if isinstance(space, gym.spaces.Discrete):
        if value.is_floating_point():
            raise SettingError(f"{where}: targets are {value.dtype}, expected whole numbers for {space}")
        if int(value.min()) < 0 or int(value.max()) >= space.n:
            low, high = int(value.min()), int(value.max())
            raise SettingError(f"{where}: targets are {low} to {high}, expected 0 to {space.n - 1} for {space}")
    return int(value.shape[2])


def _check_finite(value: Tensor, where: str) -> None:
    bad = ~value.isfinite()
    if bool(bad.any()):
        raise SettingError(f"{where}: task {int(bad.nonzero()[0, 1])} has numbers that are not finite")
