"""A stream is a sequence of problems that one learner meets in turn: tasks to act in, or tasks of labelled samples."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random as python_random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias, get_args

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlmeta.envs.data import EVERYTHING, DataTable, DataTask, DataWorld, Samples, Scenario, shared_classes
from rlmeta.envs.datasets import Labelled, labelled
from rlmeta.envs.names import read_named
from rlmeta.envs.native import NativeEnv, NativeWorld
from rlmeta.envs.task import Task, require_named, task
from rlmeta.envs.world import State, Transition, World
from rlmeta.errors import SettingError, unknown_name
from rlmeta.functional import random
from rlmeta.functional.tree import Tree

Order: TypeAlias = Literal["given", "all"] | int
"""The tasks as they stand, every order of them, or so many distinct ones drawn at random. Every order is a learner."""

IDENTITY = EVERYTHING - {"boundaries"}
ONE_ORDER = (
    "orders of tasks as learners need native tasks of one environment that differ in its constants: give these tasks "
    'in one order (order="given")'
)
NO_SCENARIO = "scenario is for streams of samples, {!r} has tasks to act in: leave it out"
MOST_ORDERS = 720


@dataclass(frozen=True)
class TaskStream:
    """A sequence of tasks and what it reveals of them.

    What it hides reaches no lifelong method and changes nothing in how a learner learns. Where `boundaries` are hidden
    the tasks are one endless problem: hooks that begin or end a task or a phase are not called, moments of optimizers,
    schedules, exploration and replay go on, and classes are born when they are met. `train_id` hidden: minibatches do
    not tell their task, and training opens all classes that are born. `test_id` hidden: evaluation tells nothing
    either; a stream of samples hides it in the scenarios "domain" and "class", and only there.

    Raises:
        SettingError: tasks that are no stream, or a scenario, an order or something to reveal that does not fit them.
    """

    name: str
    tasks: tuple[Any, ...]
    """All of them `Task`s with the same spaces, or all `DataTask`s of the same form."""
    reveals: frozenset[str] | None = None
    """Of `boundaries` (when a task ends), `train_id` and `test_id` (which task it is, in training and at test); None
    for all that the scenario reveals."""
    order: Order = "given"
    """In which order learners meet the tasks."""
    scenario: Scenario = "task"
    """Of tasks of labelled samples: what is known of their classes."""
    restart_optimizer: bool | None = None
    """Whether the optimizer's moments start at zero with every task and phase; None for wherever boundaries are
    revealed."""
    observe_identity: bool = False
    """Of tasks to act in: which one it is stands at the end of every observation, as a one-hot vector."""
    table: dict[str, Any] = field(default_factory=dict)
    """The TOML table it was made from, {} for one made in code."""

    def __post_init__(self) -> None:
        self._check_tasks()
        counts = isinstance(self.order, int) and not isinstance(self.order, bool) and self.order >= 1
        if self.order not in ("given", "all") and not counts:
            raise SettingError(f"order is {self.order!r}, expected given, all, or how many orders to draw")
        if self.scenario not in get_args(Scenario):
            raise SettingError(f"scenario is {self.scenario!r}, expected one of {', '.join(get_args(Scenario))}")
        if self.reveals is None:
            object.__setattr__(self, "reveals", EVERYTHING if self.scenario == "task" else EVERYTHING - {"test_id"})
        unknown = self.revealed - EVERYTHING
        if unknown:
            raise unknown_name("thing to reveal", min(unknown), EVERYTHING)
        self._check_scenario()
        if self.restart_optimizer and "boundaries" not in self.revealed:
            raise SettingError(
                f"stream {self.name!r}: restart_optimizer would show what reveals hides, boundaries: leave one out"
            )
        if self.observe_identity:
            self._check_identity()
        if len(self.orders()) > 1 and not self.of_samples and not _physics_of(self.tasks):
            raise SettingError(ONE_ORDER)

    def _check_tasks(self) -> None:
        if not self.tasks:
            raise SettingError(f"stream {self.name!r} has no tasks, expected at least one")
        for one in self.tasks:
            if not isinstance(one, DataTask | Task):
                raise SettingError(
                    f"stream {self.name!r} has a {type(one).__name__} among its tasks, expected DataTask(...) of "
                    "samples (split, permute and rotate make them of a data set), or rl.task(...) and names of tasks"
                )
        if len({isinstance(one, DataTask) for one in self.tasks}) > 1:
            raise SettingError(f"stream {self.name!r} mixes tasks of samples with tasks to act in: make two streams")

    def _check_scenario(self) -> None:
        """Nothing may say something else than the scenario does."""
        scenario, tells = self.scenario, "test_id" in self.revealed
        if not self.of_samples:
            if scenario != "task":
                raise SettingError(NO_SCENARIO.format(self.name))
            return
        for one in self.tasks:
            if one.scenario not in (None, scenario):
                raise SettingError(
                    f"{one.name} was split for the scenario {one.scenario!r}, but its stream's is {scenario!r}: say it "
                    "once, where the stream is made"
                )
        if scenario == "task" and not tells:
            raise SettingError(
                f"stream {self.name!r}: the scenario 'task' tells at test which task it is, but reveals leaves out "
                "'test_id': add it, or choose the scenario 'domain' or 'class'"
            )
        if scenario != "task" and tells:
            raise SettingError(
                f"stream {self.name!r}: the scenario {scenario!r} hides at test which task it is, but reveals has "
                "'test_id': leave it out, or choose the scenario 'task'"
            )
        if scenario == "class" and not all(one.classes for one in self.tasks):
            raise SettingError(f"stream {self.name!r}: the scenario 'class' needs tasks with classes: choose 'domain'")
        if scenario == "domain":
            shared_classes(self.tasks)

    def _check_identity(self) -> None:
        if self.of_samples:
            raise SettingError(f"stream {self.name!r}: observe_identity is for tasks to act in, not for samples")
        if not self.revealed >= IDENTITY:
            raise SettingError(f"stream {self.name!r}: observe_identity shows what reveals hides, train_id or test_id")

    @property
    def revealed(self) -> frozenset[str]:
        """What it reveals."""
        return frozenset() if self.reveals is None else self.reveals

    @property
    def of_samples(self) -> bool:
        """Whether its tasks are of labelled samples, and not to act in."""
        return isinstance(self.tasks[0], DataTask)

    @property
    def restarts(self) -> bool:
        """Whether the optimizer's moments start at zero with every task and phase."""
        return "boundaries" in self.revealed if self.restart_optimizer is None else self.restart_optimizer

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> Any:
        return self.tasks[index]

    @property
    def native(self) -> bool:
        """Whether the tasks are rlmeta's own, so that rows cost little and nothing is hidden."""
        return all(one.native for one in self.tasks)

    def orders(self) -> tuple[tuple[int, ...], ...]:
        """The orders in which learners meet the tasks.

        Raises:
            SettingError: all orders of too many tasks, or more orders than there are.
        """
        count = len(self.tasks)
        if self.order == "given":
            return (tuple(range(count)),)
        if self.order == "all":
            if math.factorial(count) > MOST_ORDERS:
                raise SettingError(
                    f"{count} tasks have {math.factorial(count):,} orders, more than {MOST_ORDERS}: draw some of them, "
                    "such as order=24"
                )
            return tuple(itertools.permutations(range(count)))
        if count < 12 and self.order > math.factorial(count):
            raise SettingError(f"order is {self.order}, but {count} tasks have only {math.factorial(count)} orders")
        source, found = python_random.Random(0), dict[tuple[int, ...], None]()
        while len(found) < self.order:
            found[tuple(source.sample(range(count), count))] = None
        return tuple(found)

    def world(self, learner_shape: tuple[int, ...], num_envs: int) -> DataWorld | StreamWorld:
        """Rows for every learner, each of the task it is set to by the world's `select`."""
        if self.of_samples:
            return DataWorld(self._samples, learner_shape, num_envs, scenario=self.scenario, reveals=self.revealed)
        return StreamWorld(self.tasks, learner_shape, num_envs, self.observe_identity)

    @cached_property
    def _samples(self) -> DataTable:
        return DataTable(shared_classes(self.tasks) if self.scenario == "domain" else self.tasks)

    def describe(self) -> dict[str, Any]:
        """What a saved configuration needs to make the stream again."""
        said: dict[str, Any] = {"kind": "stream", "name": self.name, "order": self.order, "scenario": self.scenario}
        if self.table:
            return {**said, "table": self.table}
        said["observe_identity"] = self.observe_identity
        if self.restart_optimizer is not None:
            said["restart_optimizer"] = self.restart_optimizer
        return {**said, "reveals": sorted(self.revealed), "tasks": [one.describe() for one in self.tasks]}


# ---------------------------------------------------------------------- tasks to act in


class StreamWorld:
    """The environments of a stream's tasks with equal spaces; every learner is in the task it has been set to.

    Native tasks that differ in constants alone may differ from learner to learner, each with its own physics. Other
    environments stand side by side, and all learners are in the same one. The state is that of the current
    environments, which know nothing of the others, and `identity` `[*L, N]`.

    Raises:
        SettingError: the tasks' spaces differ, or observations that nothing can be put behind.
    """

    records: bool
    """Whether steps with numbers drawn `ahead` may be recorded: of native tasks, whose constants are in the state."""

    def __init__(
        self,
        tasks: Sequence[Task],
        learner_shape: tuple[int, ...],
        num_envs: int,
        observe_identity: bool = False,
    ) -> None:
        self.learner_shape, self.num_envs = tuple(learner_shape), num_envs
        self._observe_identity = observe_identity
        self._tasks, self._physics = tasks, _physics_of(tasks)
        self._worlds: list[World] = [] if self._physics else [one.world(learner_shape, num_envs) for one in tasks]
        if self._physics:
            for one in tasks:
                one.warn_of_endless(one.source.endless)
        self.records = self._physics is not None
        self.identity = torch.zeros(learner_shape, dtype=torch.int64, device="cpu")
        self._current: Any = self._with_physics() if self._physics else self._worlds[0]
        inner, self.action_space = self._current.observation_space, self._current.action_space
        for one, world in zip(tasks, self._worlds):
            if (world.observation_space, world.action_space) != (inner, self.action_space):
                raise SettingError(
                    f"{one.name} has spaces {world.observation_space}, {world.action_space}, {tasks[0].name} has "
                    f"{inner}, {self.action_space}: the tasks of a stream need the same"
                )
        self.observation_space = _with_identity(inner, len(tasks)) if observe_identity else inner

    @property
    def episode_limit(self) -> int | None:
        """Steps of the longest episodes of gymnasium's tasks, where all of these declare a limit."""
        foreign: list[Any] = [world for task, world in zip(self._tasks, self._worlds) if not task.native]
        limits = [world.episode_limit for world in foreign]
        return None if None in limits else max(limits, default=None)

    @property
    def name(self) -> str:
        """Of the environments of the task that the learners are in."""
        return str(self._current.name)

    @property
    def cuts_after(self) -> int | None:
        """Steps after which the episodes of that task are cut, as far as its environments declare it."""
        found: int | None = self._current.cuts_after
        return found

    @property
    def exact_resume(self) -> bool:
        """Whether `restore` always brings every environment back to exactly where the state says."""
        return bool(self._current.exact_resume)

    def select(self, identity: Tensor) -> None:
        """Set every learner to a task, `[*L]` int64; `reset` begins it.

        Raises:
            SettingError: learners in different tasks that can't stand in one batch.
        """
        self.identity = identity.cpu()
        if self._physics:
            self._current = self._with_physics()
            return
        chosen = set(self.identity.flatten().tolist())
        if len(chosen) > 1:
            raise SettingError(ONE_ORDER)
        self._current = self._worlds[chosen.pop()]

    def _with_physics(self) -> NativeWorld:
        identity, shape = self.identity, (*self.learner_shape, self.num_envs)
        physics = {
            name: values[identity].unsqueeze(-1).expand(shape) for name, values in (self._physics or {}).items() if name
        }
        return NativeWorld(self._tasks[0].source, self.learner_shape, self.num_envs, physics)

    def reset(self, key: Tensor) -> State:
        """Episode 0 of every learner's task."""
        state: State = self._current.reset(key)
        shape = (*self.learner_shape, self.num_envs)
        return {**state, "identity": self.identity.to(key.device).unsqueeze(-1).expand(shape).clone()}

    def observation(self, state: State) -> Tree:
        """The current observation."""
        return self._shown(self._current.observation(_inner(state)), state)

    def step(self, state: State, action: Tensor, ahead: Tree | None = None) -> tuple[State, Transition]:
        """Act once in every row."""
        given = (action,) if ahead is None else (action, ahead)
        new, transition = self._current.step(_inner(state), *given)
        shown = transition._replace(
            observation=self._shown(transition.observation, state),
            next_observation=self._shown(transition.next_observation, state),
        )
        return {**new, "identity": state["identity"]}, shown

    def ahead(self, state: State) -> tuple[Tree, int]:
        """Random numbers for `step`, and for how many steps from `state` on they last."""
        found: tuple[Tree, int] = self._current.ahead(_inner(state))
        return found

    def restore(self, state: State, inexact: bool = False) -> State:
        """Put what is hidden where a loaded `state` of the selected task says."""
        if self._physics:
            return state
        current: Any = self._current
        inner = _inner(state)
        found: State = current.restore(inner) if isinstance(current, NativeWorld) else current.restore(inner, inexact)
        return {**found, "identity": state["identity"]}

    def _shown(self, observation: Any, state: State) -> Any:
        if not self._observe_identity:
            return observation
        places = torch.arange(len(self._tasks), device=observation.device)
        one_hot = state["identity"].unsqueeze(-1) == places
        return torch.cat([observation, one_hot.to(observation.dtype)], -1)

    def close(self) -> None:
        """Release what the environments hold."""
        for world in self._worlds:
            world.close()


def _inner(state: State) -> State:
    return {name: value for name, value in state.items() if name != "identity"}


def _with_identity(space: gym.Space, tasks: int) -> gym.Space:
    """The space of observations with a one-hot vector behind them."""
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1 or not np.issubdtype(space.dtype, np.floating):
        raise SettingError(
            f"observe_identity needs observations that are vectors of floats, not {space}: leave it out and let "
            "a network of your own see what the tasks need"
        )
    low, high = (np.concatenate([bound, np.full(tasks, end)]) for bound, end in ((space.low, 0), (space.high, 1)))
    return gym.spaces.Box(low.astype(space.dtype), high.astype(space.dtype))


def _physics_of(tasks: Sequence[Task]) -> dict[str, Tensor] | None:
    """Constants `[K]` in which native tasks of one environment differ; None where they differ in anything else.

    The name '' stands for no constant, so that equal tasks have physics too.
    """
    first = tasks[0].source
    alike = (isinstance(one.source, NativeEnv) and type(one.source) is type(first) for one in tasks)
    if not all(alike) or any(one.ranges for one in tasks):
        return None
    free = first.constants()
    found: dict[str, Tensor] = {"": torch.empty(0, device="cpu")}
    for constant in dataclasses.fields(first):
        values = [getattr(one.source, constant.name) for one in tasks]
        if any(not _equal(value, values[0]) for value in values):
            if constant.name not in free or free[constant.name].dim():
                return None
            found[constant.name] = torch.tensor(values, dtype=free[constant.name].dtype, device="cpu")
    return found


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return bool(a == b)


# ---------------------------------------------------------------------- tasks of labelled samples


def split(data: Labelled, groups: Sequence[Sequence[int]], scenario: Scenario | None = None) -> list[DataTask]:
    """A task for every group of classes, for a stream of any scenario.

    Args:
        data: samples of all classes.
        groups: the classes of every task; in the scenario "domain" the first of each group is class 0, and so on.
        scenario: one that a stream of these tasks must have, to say it here; a stream that says another is refused.

    Raises:
        SettingError: groups that are none or have no samples, a class that is unknown or in two groups, or groups that
            the scenario can't be of.
    """
    data = _checked(data)
    if scenario is not None and scenario not in get_args(Scenario):
        raise SettingError(f"scenario is {scenario!r}, expected one of {', '.join(get_args(Scenario))}")
    grouped = isinstance(groups, Sequence) and not isinstance(groups, str)
    if not grouped or not all(isinstance(group, Sequence) and not isinstance(group, str) for group in groups):
        raise SettingError(f"split {groups!r}: expected groups of classes such as [[0, 1], [2, 3]]")
    if not all(groups):
        raise SettingError(f"split {list(groups)}: a group has no classes, expected at least one in each")
    named, known = [c for group in groups for c in group], set(range(data.num_classes))
    if len(set(named)) < len(named) or not set(named) <= known or any(isinstance(c, bool) for c in named):
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
    data, count, key = _checked(data), _counted("permute", count), random.make_keys([0])[0]
    features = data.train.observation[0].numel()
    orders = [random.permutation(key, "pixels", i, features) for i in range(1, count)]
    orders.insert(0, torch.arange(features, device=key.device))

    def shuffled(part: Samples, order: Tensor) -> Samples:
        x = part.observation
        return Samples(x.flatten(1)[:, order].reshape(x.shape), part.target)

    return [
        _whole(data, f"permutation-{i}", shuffled(_some(data.train, i, samples), order), shuffled(data.test, order))
        for i, order in enumerate(orders)
    ]


def rotate(data: Labelled, count: int, degrees: float = 180.0, samples: int | None = None) -> list[DataTask]:
    """Tasks that differ in the angle of the pictures, evenly from 0 to below `degrees` (Lopez-Paz and Ranzato, 2017).

    Args:
        data: square pictures `[n, H * H]`, or pictures `[n, H, W]` or `[n, C, H, W]`.
        count: how many tasks.
        degrees: of the angle that would follow the last.
        samples: training samples of each task, drawn anew for each; None takes all.

    Raises:
        SettingError: no pictures, or no such number of tasks or samples.
    """
    data, tasks = _checked(data), []
    if isinstance(degrees, bool) or not isinstance(degrees, int | float) or not math.isfinite(degrees):
        raise SettingError(f"degrees is {degrees!r}, expected a number")
    for i in range(_counted("rotate", count)):
        angle = degrees * i / count
        train, test = (_rotated(part, angle) for part in (_some(data.train, i, samples), data.test))
        tasks.append(_whole(data, f"rotation-{angle:g}", train, test))
    return tasks


def _checked(data: Any) -> Labelled:
    """A data set with samples as a `DataTask` has them."""
    if not isinstance(data, Labelled):
        raise SettingError(
            f"data is a {type(data).__name__}, expected labelled(NAME) or Labelled(train, test, classes)"
        )
    if isinstance(data.num_classes, bool) or not isinstance(data.num_classes, int) or data.num_classes < 1:
        raise SettingError(f"num_classes is {data.num_classes!r}, expected how many classes the data are of")
    whole = _whole(data, "the data", data.train, data.test)
    return Labelled(whole.train, whole.test, data.num_classes)


def _counted(what: str, count: Any) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise SettingError(f"{what} is {count!r}, expected how many tasks, at least 1")
    return count


def _whole(data: Labelled, name: str, train: Samples, test: Samples) -> DataTask:
    return DataTask(name, train, test, tuple(range(data.num_classes)), data.num_classes)


def _some(part: Samples, i: int, count: int | None) -> Samples:
    """`count` samples for task i, drawn without replacement."""
    if count is None:
        return part
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(part.target):
        raise SettingError(f"samples is {count!r}, expected 1 to the {len(part.target)} that there are")
    rows = random.permutation(random.make_keys([1])[0], "samples", i, len(part.target))[:count]
    return Samples(part.observation[rows], part.target[rows])


def _rotated(part: Samples, degrees: float) -> Samples:
    """The pictures turned about their middle, with bilinear interpolation."""
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
    turn = torch.tensor([[cos, sin, 0.0], [-sin, cos, 0.0]], device=pictures.device)
    grid = F.affine_grid(turn.expand(len(pictures), 2, 3), list(pictures.shape), align_corners=False)
    turned = F.grid_sample(pictures, grid, align_corners=False)
    if x.dtype == torch.uint8:
        turned = turned.round().clamp(0, 255).to(torch.uint8)
    return Samples(turned.reshape(x.shape), part.target)


# ---------------------------------------------------------------------- by name


def stream(
    source: str | Sequence[Any],
    name: str = "stream",
    *,
    scenario: Scenario | None = None,
    order: Order = "given",
    reveals: Iterable[str] | None = None,
    restart_optimizer: bool | None = None,
    observe_identity: bool | None = None,
) -> TaskStream:
    """The named stream of tasks, or one made from a list of tasks.

    Args:
        source: a name (`rlmeta list streams`), or tasks (or names of tasks) in their order.
        name: what to call one that is made from a list.
        scenario: what is known of the classes of labelled samples; by default as the stream's file or `split` says,
            else "task". It decides whether "test_id" is revealed.
        order: the tasks as they stand, every order of them ("all"), or so many distinct orders; every order is a
            learner.
        reveals: what methods are told of the tasks, of "boundaries" (when one ends), "train_id" and "test_id" (which
            one it is, in training and at test); by default everything that the scenario allows, or what the stream's
            file says.
        restart_optimizer: whether the optimizer's moments start at zero with every task; by default where boundaries
            are revealed, or as the stream's file says.
        observe_identity: put which task it is at the end of every observation, of tasks to act in; by default as the
            stream's file says, and not where `reveals` hides it.

    Raises:
        UnknownNameError: there is no such stream, or nothing of this name to reveal.
        SettingError: not a stream, or one that can't be so.
    """
    if isinstance(reveals, str):
        raise SettingError(f"reveals is {reveals!r}, expected a list such as [{reveals!r}]")
    if reveals is not None:
        reveals = list(reveals) if isinstance(reveals, Iterable) else [reveals]
        if not all(isinstance(one, str) for one in reveals):
            raise SettingError(f"reveals is {reveals!r}, expected a list of {', '.join(sorted(EVERYTHING))}")
    if isinstance(source, str):
        table = dict(require_named(source))
        if reveals is not None:
            table["reveals"] = sorted(reveals)
            table["observe_identity"] = table.get("observe_identity", False) and set(reveals) >= IDENTITY
        for key, value in (("observe_identity", observe_identity), ("restart_optimizer", restart_optimizer)):
            if value is not None:
                table[key] = value
        return from_table(source, table, scenario, order)
    if isinstance(source, Labelled):
        raise SettingError(
            "a data set is no stream of tasks: make some of it, such as split(data, [[0, 1], [2, 3]]), and give those"
        )
    if not isinstance(source, Iterable):
        raise SettingError(f"a stream of {type(source).__name__}, expected a name (`rlmeta list streams`) or tasks")
    tasks = tuple(task(one) if isinstance(one, str) else one for one in source)
    said = next((one.scenario for one in tasks if isinstance(one, DataTask) and one.scenario), None)
    if scenario is not None and tasks and isinstance(tasks[0], Task):
        raise SettingError(NO_SCENARIO.format(name))
    return TaskStream(
        name,
        tasks,
        None if reveals is None else frozenset(reveals),
        order,
        scenario or said or "task",
        restart_optimizer,
        bool(observe_identity),
    )


def from_table(
    name: str, table: dict[str, Any], scenario: Scenario | None = None, order: Order = "given"
) -> TaskStream:
    """The stream that a TOML table describes.

    Keys: `tasks` (names, or tables with `env` and `settings`), or `data` (a data set) with one of `split` (groups of
    classes), `permute` (how many tasks) and `rotate` (how many tasks; `degrees`), and `samples`, `scenario`; `reveals`;
    `restart_optimizer`; `observe_identity`, of tasks to act in.

    Raises:
        SettingError: not the table of a stream, or a scenario that is not of its kind.
    """
    where = f"envs/{name}.toml"
    if table.get("kind") != "stream":
        raise SettingError(f"{name!r} is a {table.get('kind', 'task')}, expected a stream of tasks")
    known = {"kind", "description", "tasks", "reveals", "data", "split", "permute", "rotate", "degrees", "samples"}
    unknown = set(table) - known - {"scenario", "restart_optimizer", "observe_identity"}
    if unknown:
        raise SettingError(f"{where}: {unknown_name('key', min(unknown), known)}")
    given = frozenset(table["reveals"]) if "reveals" in table else None
    restarts, shown = table.get("restart_optimizer"), bool(table.get("observe_identity", False))
    if "tasks" in table:
        if scenario is not None or "scenario" in table:
            raise SettingError(NO_SCENARIO.format(name))
        tasks = tuple(_entry(entry, f"{name}/{i}") for i, entry in enumerate(table["tasks"]))
        return TaskStream(name, tasks, given, order, "task", restarts, shown, table)
    chosen: Scenario = scenario or table.get("scenario", "task")
    return TaskStream(name, tuple(_of_data(where, table)), given, order, chosen, restarts, shown, table)


def _entry(entry: Any, name: str) -> Task:
    if isinstance(entry, str):
        return task(entry)
    return task(entry["env"], settings=entry.get("settings"), name=name)


def _of_data(where: str, table: dict[str, Any]) -> list[DataTask]:
    kinds = [kind for kind in ("split", "permute", "rotate") if kind in table]
    if "data" not in table or len(kinds) != 1:
        raise SettingError(f"{where}: expected tasks, or data with one of split, permute and rotate")
    data = labelled(table["data"])
    if kinds == ["split"]:
        return split(data, table["split"])
    if kinds == ["permute"]:
        return permute(data, table["permute"], table.get("samples"))
    return rotate(data, table["rotate"], table.get("degrees", 180.0), table.get("samples"))


def is_stream(name: str) -> bool:
    """Whether a stream has this name."""
    return (read_named("envs", name) or {}).get("kind") == "stream"
