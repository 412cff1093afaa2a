"""A stream that trains in a blink: three tasks of labelled points that disagree about their labels."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import rlmeta as rl
from rlmeta.data.samples import DataTask, Samples
from rlmeta.envs.streams import TaskStream, stream
from rlmeta.learning.state import State
from rlmeta.lifelong import Method
from rlmeta.supervised import Classifier

FEATURES, CLASSES, SAMPLES = 4, 3, 40


def tasks(count: int = 3) -> list[DataTask]:
    """Points in 4 dimensions, each task with linear labels of its own."""
    made = []
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(SAMPLES + 20, FEATURES, generator=generator)
        y = (x @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(-1)
        parts = [Samples(x[rows], y[rows]) for rows in (slice(0, SAMPLES), slice(SAMPLES, None))]
        made.append(DataTask(f"points-{i}", *parts, tuple(range(CLASSES)), CLASSES))
    return made


@functools.cache
def points(count: int = 3, order: Any = "given") -> TaskStream:
    return stream(tasks(count), "points", scenario="task", order=order)


@functools.cache
def pictures(scenario: Any = "class") -> Any:
    """Three tasks of two classes of noisy pictures of 3 x 3 bytes."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(6, 9, generator=generator)
    parts = []
    for count in (20, 10):
        noise = 0.1 * torch.randn(6, count, 9, generator=generator)
        parts.append(((centres.unsqueeze(1) + noise).clamp(0, 1) * 255).to(torch.uint8).reshape(6, count, 3, 3))
    tasks = []
    for first in (0, 2, 4):
        target = [torch.arange(first, first + 2).repeat_interleave(part.shape[1]) for part in parts]
        samples = [Samples(part[first : first + 2].flatten(0, 1), y) for part, y in zip(parts, target)]
        tasks.append(DataTask(f"pictures-{first}", *samples, (first, first + 1), 6))
    return stream(tasks, "pictures", scenario=scenario)


def learner(**settings: Any) -> Classifier:
    return Classifier(**{"batch_size": 8, "num_steps": 5, "hidden_sizes": (6,), "learning_rate": 0.01, **settings})


@functools.cache
def trained(*methods: Method, count: int = 3, seeds: int = 3, steps: int = 160, **settings: Any) -> Any:
    """A run on the stream, 20 gradient steps a task."""
    return rl.train(learner(**settings), points(count), steps=steps, seeds=seeds, lifelong=methods, progress=False)


def flat(state: State) -> Tensor:
    axes = state["key"].dim()
    return torch.cat([w.flatten(axes) for w in state["params"]["weights"].values()], -1)
