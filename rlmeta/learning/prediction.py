"""Convert a user's support and query sets to batches for a meta-learner's prediction."""

from __future__ import annotations

import math
import warnings
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rlmeta.data import spaces
from rlmeta.errors import SettingError, SpaceError
from rlmeta.functional import tree
from rlmeta.functional.tree import Tree, unflatten

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


def to_batches(
    observation_space: gym.Space, target_space: gym.Space, support: Any, query: Any, device: torch.device
) -> tuple[Tree, Tree, bool]:
    """Convert support and query sets to batches of K tasks.

    Args:
        observation_space: space of an input.
        target_space: space of a target.
        support: (inputs `[n, ...]`, targets `[n, ...]`) of a single task, or `[K, n, ...]` each of K tasks.
        query: inputs `[B, ...]`, or `[K, B, ...]`.
        device: device of the tensors.

    Returns:
        The support `{"observation": [K, n, ...], "target": [K, n, ...]}`, the query `{"observation": [K, B, ...]}`, and
        whether there are several tasks.

    Raises:
        SettingError: the support is not a pair; parts do not fit together; a class has no sample.
        SpaceError: a part has another shape or type than its space, is of whole numbers outside of its bounds, or is
            not finite.
    """
    if not isinstance(support, tuple | list) or len(support) != 2:
        raise SettingError(f"support is {type(support).__name__}, expected a pair (inputs, targets)")
    shown = _tensors(observation_space, support[0], "the support's inputs", device)
    target = _tensors(target_space, support[1], "the support's targets", device, warns=False)
    wanted = _tensors(observation_space, query, "the query's inputs", device)
    parts = {"inputs of the support": shown[1], "targets of the support": target[1], "inputs of the query": wanted[1]}
    if len({len(front) for front in parts.values()}) > 1 or shown[1] != target[1] or shown[1][:-1] != wanted[1][:-1]:
        shapes = ", ".join(f"{list(front)} {what}" for what, front in parts.items())
        raise SettingError(
            f"there are {shapes}: expected [n], [n] and [B] for one task, [K, n], [K, n] and [K, B] for K of them"
        )
    several = len(shown[1]) == 2
    trees = [part if several else tree.map(lambda x: x.unsqueeze(0), part) for part, _ in (shown, target, wanted)]
    if isinstance(target_space, gym.spaces.Discrete):
        _check_classes(trees[1], int(target_space.n))
    return {"observation": trees[0], "target": trees[1]}, {"observation": trees[2]}, several


def _check_classes(target: Tensor, classes: int) -> None:
    """Refuse a support set without a sample of every class."""
    for number, row in enumerate(target):
        missing = sorted(set(range(classes)) - set(row.tolist()))
        if missing:
            raise SettingError(
                f"the support of task {number} has no sample of class {missing[0]}: expected at least one of each of "
                f"the {classes} classes (ways) that the run was trained for, numbered from 0"
            )


def _tensors(
    space: gym.Space, value: Any, what: str, device: torch.device, warns: bool = True
) -> tuple[Tree, tuple[int, ...]]:
    """Convert a value `[n, ...]` or `[K, n, ...]` of a space to tensors; returns them and the leading axes."""
    tensors: dict[str, Tensor] = {}
    fronts = set()
    for leaf in spaces.Layout(space).leaves:
        array = _array(spaces.pick(value, leaf.path, what), what)
        front = array.shape[: max(array.ndim - len(leaf.shape), 0)]
        if array.shape[len(front) :] != leaf.shape or len(front) not in (1, 2) or 0 in front:
            shape = "".join(f", {size}" for size in leaf.shape)
            raise SpaceError(
                f"{what}{leaf.where} have the shape {list(array.shape)}, expected [n{shape}] for one task or "
                f"[K, n{shape}] for several, of {space}"
            )
        if not leaf.is_box and array.dtype.kind not in "biu":
            raise SpaceError(f"{what}{leaf.where} are {array.dtype}, expected whole numbers for {space}")
        leaf.check_unit(array, what)
        rows = leaf.read(array.reshape(-1, *leaf.shape), (math.prod(front),), what)
        if warns and leaf.outside(rows):
            warnings.warn(
                f"{what}{leaf.where} reach from {rows.min():.3g} to {rows.max():.3g}, outside of the tasks' "
                f"{leaf.space}: they are used as they are",
                RuntimeWarning,
                stacklevel=4,
            )
        tensors[leaf.name] = torch.from_numpy(rows).reshape(*front, *leaf.shape).to(device)
        fronts.add(front)
    if len(fronts) > 1:
        raise SpaceError(f"the parts of {what} have the axes {sorted(map(list, fronts))} in front, expected the same")
    if not all(bool(x.isfinite().all()) for x in tensors.values()):
        raise SpaceError(f"{what} are not finite: expected finite numbers")
    return unflatten(tensors), fronts.pop()


def _array(value: Any, what: str) -> Array:
    """Convert a value to a numeric array."""
    try:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    except ValueError:
        array = np.empty(0, object)
    if array.dtype.kind not in "biuf":
        raise SpaceError(f"{what} are of {type(value).__name__}, expected an array or a tensor of numbers")
    return array
