"""Supervised data sets: tasks of labelled samples, and a data loader of minibatches for every learner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rlmeta.errors import SettingError, require_choice
from rlmeta.functional import random

State: TypeAlias = dict[str, Tensor]
Batch: TypeAlias = dict[str, Tensor]
"""`observation` `[*L, B, ...]`, `target` `[*L, B]` (classes) or `[*L, B, D]`, `identity` `[*L, B]` (which task a sample
is of, HIDDEN where nobody is told), and `allowed` `[*L, B, C]` where only the classes of a sample's task count."""

Scenario: TypeAlias = Literal["task", "domain", "class"]
"""What is known at test, after van de Ven et al. (2022): which task it is, so that only its classes count ("task");
only that the tasks share their classes ("domain"); nothing, all classes seen so far count ("class")."""

EVERYTHING = frozenset({"boundaries", "train_id", "test_id"})
"""What a stream may reveal of its tasks."""

HIDDEN = -1
"""Stands for the place and the identity of a task where they are not revealed."""


class Samples(NamedTuple):
    """Labelled samples: inputs and their targets."""

    observation: Tensor
    """`[n, ...]`: uint8 or float32. Bytes are divided on their way into a network: by 255, or where none is above 127,
    so that they are small whole numbers and no picture, by the largest."""
    target: Tensor
    """`[n]` int64 classes, or `[n, D]` float32."""


@dataclass(frozen=True)
class DataTask:
    """Supervised task: one data set of labelled training and test samples.

    Inputs other than bytes become float32 as they are, whole classes int64.

    Raises:
        SettingError: no tensors, as many inputs as targets, classes or numbers that fit them.
    """

    name: str
    train: Samples
    """Samples, or a pair (inputs, targets)."""
    test: Samples
    classes: tuple[int, ...] = ()
    """Which classes its targets are of, in the order that the scenario "domain" counts them in; () for regression."""
    num_classes: int = 0
    """Of the whole problem, C."""
    scenario: Scenario | None = None
    """What a stream of it has to be, as said to `split`; None for whatever the stream says."""

    native = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", self._checked_classes())
        for part, name in (("train", "training"), ("test", "test")):
            object.__setattr__(self, part, self._checked_samples(getattr(self, part), name))
        train, test = self.train.target, self.test.target
        if train.shape[1:] != test.shape[1:] or self.train.observation.shape[1:] != self.test.observation.shape[1:]:
            raise SettingError(f"{self.name}: test samples have another shape than training samples")

    def _checked_classes(self) -> tuple[int, ...]:
        """The classes as plain numbers that differ and are of the whole problem."""
        classes = self.classes.tolist() if isinstance(self.classes, Tensor | np.ndarray) else self.classes
        fits = isinstance(classes, Sequence | range) and not isinstance(classes, str)
        if not fits or not all(_is_whole(number) for number in classes):
            raise SettingError(f"{self.name}: classes are {classes!r}, expected whole numbers such as (0, 1)")
        numbers = tuple(int(number) for number in classes)
        if len(set(numbers)) < len(numbers):
            raise SettingError(f"{self.name}: classes repeat: {numbers}")
        if not _is_whole(self.num_classes):
            raise SettingError(f"{self.name}: num_classes is {self.num_classes!r}, expected a whole number")
        outside = [number for number in numbers if not 0 <= number < self.num_classes]
        if outside:
            raise SettingError(
                f"{self.name}: class {outside[0]}, expected 0 to {self.num_classes - 1}: give num_classes= of all tasks"
            )
        return numbers

    def _checked_samples(self, samples: Any, part: str) -> Samples:
        """Validate samples, and convert them to the dtypes that learners expect."""
        if not isinstance(samples, tuple | list) or len(samples) != 2:
            raise SettingError(f"{self.name}: {part} samples are {type(samples).__name__}, expected Samples(x, y)")
        observation, target = samples
        if not all(isinstance(x, Tensor) for x in samples):
            raise SettingError(f"{self.name}: {part} samples are no tensors: make them with torch.as_tensor")
        if any(x.dim() == 0 for x in samples) or len(observation) == 0 or len(observation) != len(target):
            counts = ["no row of" if x.dim() == 0 else str(len(x)) for x in samples]
            raise SettingError(
                f"{self.name}: {counts[0]} {part} inputs and {counts[1]} targets, expected as many of both, at least "
                "one"
            )
        observation = self._numbers(observation, f"{part} inputs")
        target = self._labels(target, part) if self.classes else self._values(target, part)
        return Samples(observation, target)

    def _numbers(self, x: Tensor, what: str) -> Tensor:
        """Convert inputs: bytes stay as they are, everything else becomes float32."""
        if x.is_complex():
            raise SettingError(f"{self.name}: {what} are {x.dtype}, expected bytes or real numbers")
        numbers = x.detach() if x.dtype == torch.uint8 else x.detach().float()
        strange = 0 if x.dtype == torch.uint8 else int((~torch.isfinite(numbers)).flatten(1).any(-1).sum())
        if strange:
            raise SettingError(f"{self.name}: {strange} of {len(x)} {what} are not finite: leave them out or fill them")
        return numbers

    def _labels(self, target: Tensor, part: str) -> Tensor:
        """Convert classification targets to classes `[n]` int64, after a check that they are among the task's."""
        if target.dim() != 1:
            raise SettingError(
                f"{self.name}: {part} targets {tuple(target.shape)}, expected classes [n]: one-hot targets become "
                "so by target.argmax(-1)"
            )
        if target.is_floating_point() or target.is_complex():
            raise SettingError(
                f"{self.name}: {part} targets are {target.dtype}, expected whole numbers of classes: target.long(), "
                "or no classes= for regression"
            )
        target = target.detach().long()
        strange = target[~torch.isin(target, torch.tensor(self.classes, device=target.device))]
        if len(strange):
            raise SettingError(f"{self.name}: target {strange[0].tolist()} is none of its classes {self.classes}")
        return target

    def _values(self, target: Tensor, part: str) -> Tensor:
        """Convert regression targets to `[n, D]` float32."""
        if not target.is_floating_point():
            raise SettingError(f"{self.name}: targets are whole numbers but no classes are named: give classes=")
        if target.dim() < 2:
            raise SettingError(f"{self.name}: targets {tuple(target.shape)}, expected [n, D]: unsqueeze(-1)")
        return self._numbers(target, f"{part} targets")

    def world(self, learner_shape: tuple[int, ...], num_envs: int) -> DataWorld:
        """Minibatches of `num_envs` samples for every learner."""
        return DataWorld(DataTable([self]), learner_shape, num_envs)

    def describe(self) -> dict[str, Any]:
        """What a saved configuration says of it; data are the user's to give again."""
        return {"kind": "data", "name": self.name}


def _is_whole(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def shared_classes(tasks: Sequence[DataTask]) -> list[DataTask]:
    """Tasks for the scenario "domain": of the same classes they are as they are; where every task has classes of its
    own, its targets become their places among them (the first of `classes` is 0).

    Raises:
        SettingError: some classes are in several tasks and some are not, or tasks have more classes than others.
    """
    groups = [task.classes for task in tasks]
    if len({frozenset(group) for group in groups}) == 1:
        return list(tasks)
    if len({number for group in groups for number in group}) < sum(map(len, groups)):
        raise SettingError(
            "the scenario 'domain' needs tasks that are of the same classes, or each of its own: these share some"
        )
    sizes = sorted({len(group) for group in groups})
    if len(sizes) > 1:
        raise SettingError(f"the scenario 'domain' needs groups of one size, these have {sizes[0]} to {sizes[-1]}")
    return [_placed(task) for task in tasks]


def _placed(task: DataTask) -> DataTask:
    device = task.train.target.device
    places = torch.zeros(task.num_classes, dtype=torch.int64, device=device)
    places[list(task.classes)] = torch.arange(len(task.classes), device=device)
    parts = [Samples(part.observation, places[part.target]) for part in (task.train, task.test)]
    count = len(task.classes)
    return replace(task, train=parts[0], test=parts[1], classes=tuple(range(count)), num_classes=count)


class DataTable:
    """The samples of several tasks behind one another, padded to the longest: `[K, n, ...]` for K tasks.

    Raises:
        SettingError: the tasks' inputs, targets or numbers of classes differ in form.
    """

    def __init__(self, tasks: Sequence[DataTask]) -> None:
        first = tasks[0]
        for task in tasks:
            for actual, expected in zip((*task.train, *task.test), (*first.train, *first.train)):
                if actual.shape[1:] != expected.shape[1:] or actual.dtype != expected.dtype:
                    raise SettingError(
                        f"{task.name} has samples {actual.dtype} {tuple(actual.shape[1:])}, {first.name} has "
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
        self.classes = torch.zeros(len(tasks), first.num_classes, dtype=torch.bool, device="cpu")
        for row, task in zip(self.classes, tasks):
            row[list(task.classes)] = True


def _stacked(parts: Sequence[Samples]) -> tuple[Samples, Tensor]:
    count = torch.tensor([len(part.target) for part in parts], device="cpu")
    longest = int(count.max())

    def pad(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])]) if len(x) < longest else x

    return Samples(*(torch.stack([pad(part[i]) for part in parts]) for i in range(2))), count


class DataWorld:
    """Data loader: shuffled minibatches for every learner from its current task (`select`), task 0 at first.

    The state is the order of every learner's epoch and how far it is; its numbers depend on the learner's key alone.

    Args:
        table: the samples of K tasks.
        learner_shape: `*L`.
        num_envs: B, samples in a minibatch.
        scenario: which classes count; see `Scenario`. "domain" does not change the targets (see `shared_classes`).
        reveals: what learner and methods are told: with "train_id" minibatches have the `identity` of their samples
            and, in the scenario "task", the classes that count; with "test_id" those for testing do. In the scenario
            "class" the classes of a task are added to the output layer when it begins, or without
            "boundaries" when they are met.

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
        scenario: Scenario = "domain",
        reveals: frozenset[str] = EVERYTHING,
    ) -> None:
        require_choice("scenario", scenario, Scenario)
        smallest = int(table.train_count.argmin())
        if num_envs > int(table.train_count[smallest]):
            raise SettingError(
                f"a minibatch of {num_envs} is more than the {int(table.train_count[smallest])} training samples of "
                f"{table.names[smallest]}: choose a smaller batch_size"
            )
        self.table, self.learner_shape, self.num_envs = table, tuple(learner_shape), num_envs
        self.identity = torch.zeros(learner_shape, dtype=torch.int64, device="cpu")
        self.scenario, self._reveals = scenario, reveals
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
        """Set the task of every learner, by index `[*L]` int64; `reset` begins it."""
        self.identity = identity.cpu()

    def classes(self) -> Tensor:
        """Classes of every learner's current task, `[*L, C]` bool."""
        return self.table.classes[self.identity]

    def initial_classes(self) -> Tensor:
        """Classes of the output layer before any task has begun, `[C]` bool."""
        return torch.full(self.table.classes.shape[1:], self.scenario != "class", device="cpu")

    @property
    def announces(self) -> bool:
        """Whether the classes of a task are known when it begins, before any of its samples."""
        return "boundaries" in self._reveals

    # ------------------------------------------------------------------ minibatches

    def reset(self, key: Tensor) -> State:
        """Shuffle the samples of every learner's task for the first epoch; `key` is `[*L]`."""
        zero = torch.zeros(key.shape, dtype=torch.int64, device=key.device)
        return {"key": key, "epoch": zero, "position": zero.clone(), "order": self._order(key, zero)}

    def _order(self, key: Tensor, epoch: Tensor) -> Tensor:
        """A permutation of every learner's samples, `[*L, n]`, the padding behind them."""
        longest = self.table.train.target.shape[1]
        draws = random.uniform(key, "samples", epoch, (longest,), torch.float64)
        behind = torch.arange(longest, device="cpu") >= self.table.train_count[self.identity].unsqueeze(-1)
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
        return new, self._batch(self.table.train, rows, "train_id")

    def sample(self, key: Tensor, n: int) -> Batch:
        """n training samples of every learner's task without replacement, as many as every task has at most."""
        n = min(n, int(self.table.train_count[self.identity].min()))
        return self._batch(self.table.train, self._order(key, torch.zeros_like(key))[..., :n], "train_id")

    def test_batches(self, size: int) -> Iterator[Batch]:
        """All test samples of every learner's task, with `valid` `[*L, B]`, False for padding."""
        count = self.table.test_count[self.identity]
        for start in range(0, int(count.max()), size):
            stop = min(start + size, int(count.max()))
            rows = torch.arange(start, stop, device="cpu").expand(*self.learner_shape, -1)
            yield {**self._batch(self.table.test, rows, "test_id"), "valid": rows < count.unsqueeze(-1)}

    def _batch(self, samples: Samples, rows: Tensor, identified_by: str) -> Batch:
        identity = self.identity.unsqueeze(-1).expand(rows.shape)
        local, told = rows.cpu(), identified_by in self._reveals
        observation, target = (x[identity, local].to(rows.device) for x in samples)
        shown = identity if told else torch.full_like(identity, HIDDEN)
        batch = {"observation": observation, "target": target, "identity": shown.to(rows.device)}
        if told and self.scenario == "task":
            batch["allowed"] = self.table.classes[identity].to(rows.device)
        return batch

    # ------------------------------------------------------------------ as every world

    def restore(self, state: State, inexact: bool = False) -> State:
        """Return the state itself: no live environment has to be restored."""
        return state

    def close(self) -> None:
        """Nothing to release."""


def _space(x: Tensor) -> gym.spaces.Box:
    """Infer the space of one sample of `x`."""
    shape = tuple(x.shape[1 + 1 :])
    if x.dtype == torch.uint8:
        largest = int(x.max()) if x.numel() else 0
        return gym.spaces.Box(0, 255 if largest > 127 else max(1, largest), shape, np.uint8)
    return gym.spaces.Box(-np.inf, np.inf, shape, np.float32)
