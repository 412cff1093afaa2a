"""Checks of a user's task family before training: errors name the split and the shapes.

Two tasks of every split are drawn, for three learners. The learners' own numbers do not depend on it.
"""

from __future__ import annotations

from typing import Any, get_args

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.envs.task_families import Split, as_tensors
from rlmeta.errors import SettingError
from rlmeta.functional import random, tree
from rlmeta.learning.settings import require

LEADING = (3, 2)
"""Shape `[*L, K]` of the tasks that are drawn for the checks."""

DRAWN = f"for {LEADING[1]} tasks of each of {LEADING[0]} learners"


def check_samples(family: Any) -> None:
    """Check that a family's tasks are samples `{"support": {observation, target}, "query": ...}` of its spaces.

    Raises:
        SettingError: a split has no tasks, they lack a part, have another shape or type, or are not finite; or they
            depend on something else than key, counter and split, or not on the split.
    """
    drawn = _drawn(family)
    for split, tasks in drawn:
        for part in ("support", "query"):
            where = f"{type(family).__name__}: split {split!r}: {part}"
            observation = _check_leaf(_entry(tasks, part, "observation", where), family.observation_space, where)
            target = _check_leaf(_entry(tasks, part, "target", where), family.action_space, where)
            if observation is not None and target is not None and observation != target:
                raise SettingError(f"{where} has {observation} observations and {target} targets, expected one each")
    _check_draws(family, dict(drawn))


def _check_draws(family: Any, drawn: dict[str, Any]) -> None:
    """Check that draws are reproducible, and that test tasks are no training tasks."""
    name = type(family).__name__
    for split, tasks in _drawn(family):
        require(
            _equal(tasks, drawn[split]),
            f"{name}: split {split!r}: the same key draws other tasks: make them of the key alone (task_keys and "
            "rlmeta.functional.random), or no run can be resumed",
        )
    one_only = all(bool((leaf == leaf[:1, :1]).all()) for leaf in tree.leaves(drawn["train"]))
    require(
        one_only or not _equal(drawn["train"], drawn["test"]),
        f"{name}: 'train' and 'test' draw the very same tasks: make them of the split, too, as task_keys does",
    )


def _equal(tasks: Any, others: Any) -> bool:
    """Whether two draws are equal in every number."""
    return all(torch.equal(a, b) for a, b in zip(tree.leaves(tasks), tree.leaves(others)))


def check_problems(family: Any) -> None:
    """Check that a family's problems have a loss `[*L, K]` that depends on their initial weights.

    Raises:
        SettingError: a split has no problems, or the weights or losses have other shapes.
    """
    for split, problem in _drawn(family):
        where = f"{type(family).__name__}: split {split!r}"
        start = family.start(problem)
        for name, weight in start.items():
            if weight.shape[: len(LEADING)] != LEADING:
                raise SettingError(f"{where}: weight {name} is {list(weight.shape)}, expected [3, 2, ...] {DRAWN}")
        weights = {name: weight.detach().requires_grad_() for name, weight in start.items()}
        device = next(iter(start.values())).device
        for steps in (LEADING, ()):  # where each problem is, or where all are
            with torch.enable_grad():
                loss = family.loss(weights, problem, torch.zeros(steps, dtype=torch.int64, device=device))
            _check_loss(loss, f"{where}: the loss at step {list(steps)}")


def _check_loss(loss: Tensor, what: str) -> None:
    if loss.shape != LEADING:
        raise SettingError(f"{what} is {list(loss.shape)}, expected {list(LEADING)}, one for each problem, {DRAWN}")
    if not loss.requires_grad:
        raise SettingError(f"{what} does not depend on the weights: compute it from them, without detach or item")
    if not bool(loss.isfinite().all()):
        raise SettingError(f"{what} is {loss.flatten().tolist()} at the start, expected finite numbers")


def _drawn(family: Any) -> list[tuple[str, Any]]:
    """Draw two tasks of every split for each of three learners."""
    key = random.make_keys(range(LEADING[0]))
    drawn = ((split, family.tasks(key, 0, LEADING[-1], split)) for split in get_args(Split))
    return [(split, as_tensors(tasks, key.device)) for split, tasks in drawn]


def _entry(tasks: Any, part: str, name: str, where: str) -> Any:
    try:
        return tasks[part][name]
    except (KeyError, TypeError, IndexError):
        raise SettingError(
            f"{where} has no {name}: tasks are {{'support': {{'observation', 'target'}}, 'query': the same}}"
        ) from None


def _check_leaf(value: Any, space: gym.Space, where: str) -> int | None:
    """Number of samples of a task; None if the shape does not tell, as in spaces of several parts."""
    if not isinstance(value, Tensor):
        for leaf in tree.leaves(value):
            _check_finite(leaf, where)
        return None
    _check_finite(value, where)
    shape = space.shape or ()
    if value.shape[:2] != LEADING or value.dim() != 3 + len(shape) or value.shape[3:] != shape or value.shape[2] < 1:
        raise SettingError(
            f"{where}: got {list(value.shape)} {DRAWN}, expected "
            f"[3, 2, samples{''.join(f', {size}' for size in shape)}], for {space}"
        )
    if isinstance(space, gym.spaces.Discrete):
        if value.dtype != torch.int64:
            raise SettingError(f"{where}: targets are {value.dtype}, expected whole numbers (int64) for {space}")
        if int(value.min()) < 0 or int(value.max()) >= space.n:
            low, high = int(value.min()), int(value.max())
            raise SettingError(f"{where}: targets are {low} to {high}, expected 0 to {space.n - 1} for {space}")
    return int(value.shape[2])


def _check_finite(value: Any, where: str) -> None:
    if not isinstance(value, Tensor):
        raise SettingError(f"{where}: got {type(value).__name__}, expected a tensor or an array")
    bad = ~value.isfinite()
    if bool(bad.any()):
        raise SettingError(f"{where}: task {int(bad.nonzero()[0, 1])} has numbers that are not finite")
