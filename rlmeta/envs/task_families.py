"""Protocol of families of tasks, which draw tasks by key, counter and split; helpers that families share."""

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
    """Family of tasks: a distribution over tasks."""

    @property
    def observation_space(self) -> gym.Space:
        """Space of one input."""

    @property
    def action_space(self) -> gym.Space:
        """Space of one target: Discrete classes, or a Box."""

    def tasks(self, key: Tensor, counter: int | Tensor, count: int, split: Split) -> Tree:
        """Draw K = `count` tasks for each key `[*L]`, every leaf `[*L, K, ...]`; `counter` is a number or `[*L]`."""
        ...


class Problems(Family, Protocol):
    """Family of optimisation problems: a distribution over functions to minimise."""

    def start(self, problem: Tree) -> Weights:
        """Starting point of the minimisation, `{name: [*L, K, ...]}`."""

    def loss(self, weights: Weights, problem: Tree, step: Tensor) -> Tensor:
        """Loss `[*L, K]`; `step` `[*L, K]`, or `[]` if the same for all, is the counter for drawing minibatches."""
        ...


def minimises(family: Any) -> bool:
    """Whether a family consists of optimisation problems, as `Problems`."""
    return all(callable(getattr(family, name, None)) for name in ("start", "loss"))


def check_family(family: Any) -> None:
    """Validate a family of tasks: its spaces and the arguments of its `tasks`, without drawing any.

    Raises:
        SettingError: the family is a class, lacks a space, or its `tasks` takes other arguments.
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
    """Convert the numpy arrays of tasks to tensors on the device, float64 to float32."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, np.ndarray | np.generic):
            return leaf
        converted = torch.as_tensor(leaf, device=device)
        return converted.float() if converted.dtype == torch.float64 else converted

    return tree.map(convert, drawn)


def task_keys(key: Tensor, counter: int | Tensor, count: int, split: Split) -> Tensor:
    """Derive the random keys of K tasks.

    Args:
        key: `[*L]`.
        counter: a number or `[*L]`: how many times tasks were drawn before.
        count: K.
        split: whose tasks they are.

    Returns:
        `[*L, K]`

    Raises:
        SettingError: there is no such split, or K is less than 1.
    """
    if split not in get_args(Split):
        raise SettingError(f"split is {split!r}, expected one of {', '.join(get_args(Split))}")
    if count < 1:
        raise SettingError(f"{count} tasks, expected at least 1")
    start = random.fold(random.fold(key, f"family/{split}"), counter)
    return random.fold(start.unsqueeze(-1), torch.arange(count, device=key.device))


def support_and_query(observation: Tensor, target: Tensor, shots: int) -> Tree:
    """Split samples `[*L, K, n, D]` into a support set, the first `shots`, and a query set, the rest."""
    pair, axis = {"observation": observation, "target": target}, observation.dim() - 2
    return {
        "support": {name: value.narrow(axis, 0, shots) for name, value in pair.items()},
        "query": {name: value.narrow(axis, shots, value.shape[axis] - shots) for name, value in pair.items()},
    }


def check_sizes(name: str, family: Any, sizes: Sequence[str] = ("shots", "queries")) -> None:
    """Refuse sizes of a family's tasks that are no whole numbers of at least 1."""
    for size in sizes:
        value = getattr(family, size)
        if not isinstance(value, Integral):
            raise SettingError(f"{name}: {size} is {value!r}, expected a whole number")
        if value < 1:
            raise SettingError(f"{name}: {size} is {value}, expected at least 1")
