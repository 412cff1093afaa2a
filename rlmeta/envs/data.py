"""Tasks of labelled samples, and the world that hands every learner minibatches of its own task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rlmeta.errors import SettingError
from rlmeta.functional import random

State: TypeAlias = dict[str, Tensor]
Batch: TypeAlias = dict[str, Tensor]
"""`observation` `[*L, B, ...]`, `target` `[*L, B]` (classes) or `[*L, B, D]`, `identity` `[*L, B]` (which task a sample
is of), and `allowed` `[*L, B, C]` where the classes of a sample's task are known."""


class Samples(NamedTuple):
    """Inputs and their targets."""

    observation: Tensor
    """`[n, ...]`: uint8 or float32. Bytes are divided on their way into a network: by 255, or where none is above 127,
    so that they are small whole numbers and no picture, by the largest."""
    target: Tensor
    """`[n]` int64 classes, or `[n, D]` float32."""


@dataclass(frozen=True)
class DataTask:
    """One problem of labelled samples."""

    name: str
    train: Samples
    test: Samples
    classes: tuple[int, ...] = ()
    """Which classes its targets are of; () for regression."""
    num_classes: int = 0
    """Of the whole problem, C."""

    native = True

    def __post_init__(self) -> None:
        for part, samples in (("training", self.train), ("test", self.test)):
            if not all(isinstance(x, Tensor) for x in samples):
                raise SettingError(f"{self.name}: {part} samples are no tensors: make them with torch.as_tensor")
            if len(samples.observation) == 0 or len(samples.observation) != len(samples.target):
                raise SettingError(
                    f"{self.name}: {len(samples.observation)} {part} inputs and {len(samples.target)} targets, "
                    "expected as many of both, at least one"
                )
        if not self.classes and not self.train.target.is_floating_point():
            raise SettingError(f"{self.name}: targets are whole numbers but no classes are named: give classes=")
        if not self.classes and self.train.target.dim() < 2:
            raise SettingError(f"{self.name}: targets {tuple(self.train.target.shape)}, expected [n, D]: unsqueeze(-1)")
        outside = [one for one in self.classes if not 0 <= one < self.num_classes]
        if outside:
            raise SettingError(
                f"{self.name}: class {outside[0]}, expected 0 to {self.num_classes - 1}: give num_classes= of all tasks"
            )
        targets = torch.cat([self.train.target, self.test.target])
        strange = targets[~torch.isin(targets, torch.tensor(self.classes, dtype=targets.dtype))]
        if self.classes and len(strange):
            raise SettingError(f"{self.name}: target {strange[0].tolist()} is none of its classes {self.classes}")

    def world(self, learner_shape: tuple[int, ...], num_envs: int) -> DataWorld:
        """Minibatches of `num_envs` samples for every learner."""
        return DataWorld(DataTable([self]), learner_shape, num_envs)

    def describe(self) -> dict[str, Any]:
        """What a saved configuration says of it; data are the user's to give again."""
        return {"kind": "data", "name": self.name}


class DataTable:
    """The samples of several tasks behind one another, padded to the longest: `[K, n, ...]` for K tasks.

    Raises:
        SettingError: the tasks' inputs, targets or numbers of classes differ in form.
    """

    def __init__(self, tasks: Sequence[DataTask]) -> None:
        first = tasks[0]
        for task in tasks:
            for given, expected in zip((*task.train, *task.test), (*first.train, *first.train)):
                if given.shape[1:] != expected.shape[1:] or given.dtype != expected.dtype:
                    raise SettingError(
                        f"{task.name} has samples {given.dtype} {tuple(given.shape[1:])}, {first.name} has "
                        f"{expected.dtype} {tuple(expected.shape[1:])}: tasks of one stream need the same form"
                    )
            if task.num_classes != first.num_classes:
                raise SettingError(
                    f"{task.name} is of {task.num_classes} classes, {first.name} of {first.num_classes}: give all "
                    "tasks of a stream the same num_classes"
                )
        self.names = [task.name for task in tasks]
        self.train, self.train_count = _stacked([task.train for task in tasks])
        self.test, self.test_count = _stacked([task.test for task in tasks])
        self.classes = torch.zeros(len(tasks), first.num_classes, dtype=torch.bool)
        for row, task in zip(self.classes, tasks):
            row[list(task.classes)] = True


def _stacked(parts: Sequence[Samples]) -> tuple[Samples, Tensor]:
    count = torch.tensor([len(part.target) for part in parts])
    longest = int(count.max())

    def pad(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])]) if len(x) < longest else x

    return Samples(*(torch.stack([pad(part[i]) for part in parts]) for i in range(2))), count


class DataWorld:
    """Samples for every learner, each of the task it has been set to (`select`), all of task 0 at first.

    The state is the order of every learner's epoch and how far it is; its numbers depend on the learner's key alone.

    Args:
        table: the samples of K tasks.
        learner_shape: `*L`.
        num_envs: B, samples in a minibatch.
        reveals_classes: batches say which classes are of their task (`allowed`).
        born: classes exist from the beginning; otherwise a task's classes are born when the task begins.

    Raises:
        SettingError: a task has fewer training samples than a minibatch.
    """

    exact_resume = True

    def __init__(
        self,
        table: DataTable,
        learner_shape: tuple[int, ...],
        num_envs: int,
        *,
        reveals_classes: bool = False,
        born: bool = True,
    ) -> None:
        smallest = int(table.train_count.argmin())
        if num_envs > int(table.train_count[smallest]):
            raise SettingError(
                f"a minibatch of {num_envs} is more than the {int(table.train_count[smallest])} training samples of "
                f"{table.names[smallest]}: choose a smaller batch_size"
            )
        self.table, self.learner_shape, self.num_envs = table, tuple(learner_shape), num_envs
        self.identity = torch.zeros(learner_shape, dtype=torch.int64)
        self._reveals, self._born = reveals_classes, born
        observation, target = table.train
        self.observation_space: gym.Space = _space(observation)
        self.action_space: gym.Space = (
            _space(target) if target.is_floating_point() else gym.spaces.Discrete(table.classes.shape[1])
        )

    # ------------------------------------------------------------------ which task

    @property
    def task_samples(self) -> int:
        """Training samples of the smallest task."""
        return int(self.table.train_count.min())

    def select(self, identity: Tensor) -> None:
        """Set every learner to a task, `[*L]` int64; `reset` begins it."""
        self.identity = identity.cpu()

    def classes(self) -> Tensor:
        """The classes of every learner's task, `[*L, C]` bool."""
        return self.table.classes[self.identity]

    def born(self) -> Tensor:
        """The classes that exist before any task has begun, `[C]` bool."""
        return torch.full(self.table.classes.shape[1:], self._born)

    # ------------------------------------------------------------------ minibatches

    def reset(self, key: Tensor) -> State:
        """The start of the first epoch; `key` is `[*L]`."""
        zero = torch.zeros(key.shape, dtype=torch.int64, device=key.device)
        return {"key": key, "epoch": zero, "position": zero.clone(), "order": self._order(key, zero)}

    def _order(self, key: Tensor, epoch: Tensor) -> Tensor:
        """A permutation of every learner's samples, `[*L, n]`, the padding behind them."""
        longest = self.table.train.target.shape[1]
        draws = random.uniform(key, "samples", epoch, (longest,), torch.float64)
        behind = torch.arange(longest) >= self.table.train_count[self.identity].unsqueeze(-1)
        return draws.masked_fill(behind.to(key.device), 2.0).argsort(-1)

    def next_batch(self, state: State) -> tuple[State, Batch]:
        """The next `num_envs` samples of every learner; a remainder that is too short for a minibatch is left out."""
        size = self.num_envs
        position, epoch, order = state["position"], state["epoch"], state["order"]
        count = self.table.train_count[self.identity].to(position.device)
        over = position + size > count
        if bool(over.any()):
            epoch = epoch + over
            order = torch.where(over.unsqueeze(-1), self._order(state["key"], epoch), order)
            position = position.masked_fill(over, 0)
        rows = order.gather(-1, position.unsqueeze(-1) + torch.arange(size, device=order.device))
        new = {"key": state["key"], "epoch": epoch, "position": position + size, "order": order}
        return new, self._batch(self.table.train, rows)

    def sample(self, key: Tensor, n: int) -> Batch:
        """n training samples of every learner's task without replacement, as many as every task has at most."""
        n = min(n, int(self.table.train_count[self.identity].min()))
        return self._batch(self.table.train, self._order(key, torch.zeros_like(key))[..., :n])

    def test_batches(self, size: int) -> Iterator[Batch]:
        """All test samples of every learner's task, with `valid` `[*L, B]`, False for padding."""
        count = self.table.test_count[self.identity]
        for start in range(0, int(count.max()), size):
            rows = torch.arange(start, min(start + size, int(count.max()))).expand(*self.learner_shape, -1)
            yield {**self._batch(self.table.test, rows), "valid": rows < count.unsqueeze(-1)}

    def _batch(self, samples: Samples, rows: Tensor) -> Batch:
        identity = self.identity.unsqueeze(-1).expand(rows.shape)
        local = rows.cpu()
        observation, target = (x[identity, local].to(rows.device) for x in samples)
        batch = {"observation": observation, "target": target, "identity": identity.to(rows.device)}
        if self._reveals:
            batch["allowed"] = self.table.classes[identity].to(rows.device)
        return batch

    # ------------------------------------------------------------------ as every world

    def restore(self, state: State, inexact: bool = False) -> State:
        """The state itself: nothing is hidden."""
        return state

    def close(self) -> None:
        """Nothing to release."""


def _space(x: Tensor) -> gym.spaces.Box:
    """The space of one row of `x`."""
    shape = tuple(x.shape[1 + 1 :])
    if x.dtype == torch.uint8:
        largest = int(x.max()) if x.numel() else 0
        return gym.spaces.Box(0, 255 if largest > 127 else max(1, largest), shape, np.uint8)
    return gym.spaces.Box(-np.inf, np.inf, shape, np.float32)
