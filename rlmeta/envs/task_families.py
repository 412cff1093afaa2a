"""What a family of tasks is: it draws tasks by key, counter and split; and what families share."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal, Protocol, TypeAlias, get_args

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rlmeta.errors import SettingError
from rlmeta.functional import random, tree
from rlmeta.functional.tree import Tree

Split: TypeAlias = Literal["train", "validation", "test"]


Weights: TypeAlias = dict[str, Tensor]


class Family(Protocol):
    """A distribution over tasks."""

    @property
    def observation_space(self) -> gym.Space:
        """Of one input."""

    @property
    def action_space(self) -> gym.Space:
        """Of one target: Discrete classes, or a Box."""

    def tasks(self, key: Tensor, counter: int | Tensor, count: int, split: Split) -> Tree:
        """K = `count` tasks for each key `[*L]`, every leaf `[*L, K, ...]`; `counter` is a number or `[*L]`."""
        ...


class Problems(Family, Protocol):
    """A distribution over functions to minimise."""

    def start(self, problem: Tree) -> Weights:
        """Where the minimisation begins, `{name: [*L, K, ...]}`."""

    def loss(self, weights: Weights, problem: Tree, step: Tensor) -> Tensor:
        """The loss `[*L, K]` at step `[*L, K]`, or `[]` where it is the same for all: minibatches are drawn by it."""
        ...


def minimises(family: Any) -> bool:
    """Whether it is a family of `Problems`."""
    return all(callable(getattr(family, name, None)) for name in ("start", "loss"))


def check_family(family: Any) -> None:
    """Validate a family of tasks: its spaces and the arguments of its `tasks`; nothing is drawn.

    Raises:
        SettingError: it is a class, lacks a space, or its `tasks` take other arguments.
    """
    if isinstance(family, type):
        raise SettingError(f"{family.__name__} is the class of a family: give one of it, such as {family.__name__}()")
    name = type(family).__name__
    for attribute, what in (("observation_space", "input"), ("action_space", "target")):
        space = getattr(family, attribute, None)
        if not isinstance(space, gym.Space):
            raise SettingError(f"{name}: {attribute} is {space!r}, expected the gymnasium space of one {what}")
    tasks = getattr(family, "tasks", None)
    if not callable(tasks):
        raise SettingError(f"{name} has no tasks(key, counter, count, split), which draws them")
    try:
        inspect.signature(tasks).bind(None, 0, 1, "train")
    except TypeError as error:
        raise SettingError(
            f"{name}: tasks{inspect.signature(tasks)} can't be called as tasks(key, counter, count, split): {error}"
        ) from None


def as_tensors(drawn: Any, device: torch.device) -> Tree:
    """Tasks whose leaves are tensors on the device where they were numpy's arrays, doubles as floats."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, np.ndarray | np.generic):
            return leaf
        made = torch.as_tensor(leaf, device=device)
        return made.float() if made.dtype == torch.float64 else made

    return tree.map(convert, drawn)


def task_keys(key: Tensor, counter: int | Tensor, count: int, split: Split) -> Tensor:
    """One key for each of `count` tasks, `[*L, K]`."""
    if split not in get_args(Split):
        raise SettingError(f"split is {split!r}, expected one of {', '.join(get_args(Split))}")
    if count < 1:
        raise SettingError(f"{count} tasks, expected at least 1")
    start = random.fold(random.fold(key, f"family/{split}"), counter)
    return random.fold(start.unsqueeze(-1), torch.arange(count, device=key.device))


def support_and_query(observation: Tensor, target: Tensor, shots: int) -> Tree:
    """The first `shots` of the samples `[*L, K, n, D]` as support, the rest as query."""
    pair, axis = {"observation": observation, "target": target}, observation.dim() - 2
    return {
        "support": {name: value.narrow(axis, 0, shots) for name, value in pair.items()},
        "query": {name: value.narrow(axis, shots, value.shape[axis] - shots) for name, value in pair.items()},
    }


def check_sizes(name: str, family: Any, sizes: Sequence[str] = ("shots", "queries")) -> None:
    """Refuse sizes of a family's tasks that are no counts."""
    for size in sizes:
        value = getattr(family, size)
        if not isinstance(value, Integral):
            raise SettingError(f"{name}: {size} is {value!r}, expected a whole number")
        if value < 1:
            raise SettingError(f"{name}: {size} is {value}, expected at least 1")
