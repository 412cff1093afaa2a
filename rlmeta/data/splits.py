"""Tasks of a data set: a task for every group of classes, permuted pixels, rotated pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from rlmeta.data.samples import DataTask, Samples, Scenario, shared_classes
from rlmeta.data.sets import Labelled
from rlmeta.errors import SettingError
from rlmeta.functional import random


def split(data: Labelled, groups: Sequence[Sequence[int]], scenario: Scenario | None = None) -> list[DataTask]:
    """A task for every group of classes, for a stream of any scenario.

    Args:
        data: samples of all classes.
        groups: the classes of every task; in the scenario "domain" the first of each group is class 0, and so on.
        scenario: "task", "domain" or "class"-incremental: that of a stream of these tasks; another is refused then.

    Raises:
        SettingError: `groups` is no list of lists of classes, a class is unknown, without samples or in two groups, or
            the groups do not fit the scenario.
    """
    data = _checked(data)
    if scenario is not None and scenario not in get_args(Scenario):
        raise SettingError(f"scenario is {scenario!r}, expected one of {', '.join(get_args(Scenario))}")
    grouped = isinstance(groups, Sequence) and not isinstance(groups, str)
    if not grouped or not all(isinstance(group, Sequence) and not isinstance(group, str) for group in groups):
        raise SettingError(f"split {groups!r}: expected groups of classes such as [[0, 1], [2, 3]]")
    if not all(groups):
        raise SettingError(f"split {list(groups)}: a group has no classes, expected at least one in each")
    listed, known = [c for group in groups for c in group], set(range(data.num_classes))
    if len(set(listed)) < len(listed) or not set(listed) <= known or any(isinstance(c, bool) for c in listed):
        raise SettingError(f"split {list(groups)}: expected groups of different classes of 0 to {data.num_classes - 1}")
    tasks = []
    for group in groups:
        name = "+".join(map(str, group))
        train, test = (_of_classes(part, group) for part in (data.train, data.test))
        tasks.append(DataTask(name, train, test, tuple(group), data.num_classes, scenario))
    if scenario == "domain":
        shared_classes(tasks)
    return tasks


def _of_classes(samples: Samples, group: Sequence[int]) -> Samples:
    chosen = torch.isin(samples.target, torch.tensor(list(group), device=samples.target.device))
    return Samples(samples.observation[chosen], samples.target[chosen])


def permute(data: Labelled, count: int, samples: int | None = None) -> list[DataTask]:
    """Tasks that differ in a fixed permutation of the pixels; the first leaves them (Goodfellow et al., 2013).

    Args:
        data: samples of any shape.
        count: how many tasks.
        samples: training samples of each task, drawn anew for each; None takes all.

    Raises:
        SettingError: no such number of tasks or samples.
    """
    data, count, key = _checked(data), _check_count("permute", count), random.make_keys([0])[0]
    features = data.train.observation[0].numel()
    orders = [random.permutation(key, "pixels", i, features) for i in range(1, count)]
    orders.insert(0, torch.arange(features, device=key.device))

    def shuffled(part: Samples, order: Tensor) -> Samples:
        x = part.observation
        return Samples(x.flatten(1)[:, order].reshape(x.shape), part.target)

    tasks = []
    for i, order in enumerate(orders):
        train = shuffled(_subsample(data.train, i, samples), order)
        tasks.append(_all_classes(data, f"permutation-{i}", train, shuffled(data.test, order)))
    return tasks


def rotate(data: Labelled, count: int, degrees: float = 180.0, samples: int | None = None) -> list[DataTask]:
    """Tasks that differ in the angle of the pictures, evenly from 0 to below `degrees` (Lopez-Paz and Ranzato, 2017).

    Args:
        data: square pictures `[n, H * H]`, or pictures `[n, H, W]` or `[n, C, H, W]`.
        count: how many tasks.
        degrees: end of the range, which no task reaches: task i is rotated by degrees * i / count.
        samples: training samples of each task, drawn anew for each; None takes all.

    Raises:
        SettingError: no pictures, or no such number of tasks or samples.
    """
    data, tasks = _checked(data), []
    if isinstance(degrees, bool) or not isinstance(degrees, int | float) or not math.isfinite(degrees):
        raise SettingError(f"degrees is {degrees!r}, expected a number")
    for i in range(_check_count("rotate", count)):
        angle = degrees * i / count
        train, test = (_rotated(part, angle) for part in (_subsample(data.train, i, samples), data.test))
        tasks.append(_all_classes(data, f"rotation-{angle:g}", train, test))
    return tasks


def _checked(data: Any) -> Labelled:
    """A data set with samples as a `DataTask` has them."""
    if not isinstance(data, Labelled):
        raise SettingError(
            f"data is a {type(data).__name__}, expected labelled(NAME) or Labelled(train, test, classes)"
        )
    if isinstance(data.num_classes, bool) or not isinstance(data.num_classes, int) or data.num_classes < 1:
        raise SettingError(f"num_classes is {data.num_classes!r}, expected how many classes the data are of")
    whole = _all_classes(data, "the data", data.train, data.test)
    return Labelled(whole.train, whole.test, data.num_classes)


def _check_count(what: str, count: Any) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise SettingError(f"{what} is {count!r}, expected how many tasks, at least 1")
    return count


def _all_classes(data: Labelled, name: str, train: Samples, test: Samples) -> DataTask:
    return DataTask(name, train, test, tuple(range(data.num_classes)), data.num_classes)


def _subsample(part: Samples, i: int, count: int | None) -> Samples:
    """`count` samples for task i, drawn without replacement."""
    if count is None:
        return part
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(part.target):
        raise SettingError(f"samples is {count!r}, expected 1 to the {len(part.target)} that there are")
    rows = random.permutation(random.make_keys([1])[0], "samples", i, len(part.target))[:count]
    return Samples(part.observation[rows], part.target[rows])


def _rotated(part: Samples, degrees: float) -> Samples:
    """The pictures rotated about their middle, with bilinear interpolation."""
    x = part.observation
    side = math.isqrt(x[0].numel())
    if x.dim() not in (2, 3, 4) or (x.dim() == 2 and side**2 != x.shape[1]):
        raise SettingError(
            f"rotate: inputs {tuple(x.shape[1:])} are no pictures, expected [H * H], [H, W] or [C, H, W]"
        )
    shape = (1, side, side) if x.dim() == 2 else (1, *x.shape[1:]) if x.dim() == 3 else tuple(x.shape[1:])
    pictures = x.reshape(-1, *shape).float()
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    rotation = torch.tensor([[cos, sin, 0.0], [-sin, cos, 0.0]], device=pictures.device)
    grid = F.affine_grid(rotation.expand(len(pictures), 2, 3), list(pictures.shape), align_corners=False)
    rotated = F.grid_sample(pictures, grid, align_corners=False)
    if x.dtype == torch.uint8:
        rotated = rotated.round().clamp(0, 255).to(torch.uint8)
    return Samples(rotated.reshape(x.shape), part.target)
