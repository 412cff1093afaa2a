"""Streams: sequences of tasks on which a learner trains in turn, for continual (lifelong) learning."""

from __future__ import annotations

import itertools
import math
import random as python_random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias, get_args

from rlmeta.data.samples import EVERYTHING, DataTable, DataTask, DataWorld, Scenario, shared_classes
from rlmeta.data.sets import Labelled, labelled
from rlmeta.data.splits import permute, rotate, split
from rlmeta.envs.names import read_named
from rlmeta.envs.stream_world import ONE_ORDER, TASK_ID_SIGNALS, StreamWorld, physics_of
from rlmeta.envs.task import Task, require_named, task
from rlmeta.errors import SettingError, unknown_name

Order: TypeAlias = Literal["given", "all"] | int
"""Task order: as given, every permutation, or a number of distinct random ones. Every order is a learner."""


NO_SCENARIO = "scenario is for streams of samples, {!r} has tasks to act in: leave it out"


MOST_ORDERS = 720


@dataclass(frozen=True)
class TaskStream:
    """Sequence of tasks for continual learning, and which information about them learners and methods get.

    Hidden information reaches neither lifelong methods nor the learner. If `boundaries` are hidden, the tasks are one
    endless problem: hooks at the begin and end of a task or phase are not called; optimizer moments, schedules,
    exploration and replay continue; and classes become known when they first occur. If `train_id` is hidden,
    minibatches do not contain their task, and all classes known so far can be predicted in training. If `test_id` is
    hidden, neither does an evaluation; streams of labelled samples hide it in exactly the scenarios "domain" and
    "class".

    Raises:
        SettingError: the tasks form no stream, or scenario, order or revealed information do not fit them.
    """

    name: str
    tasks: tuple[Any, ...]
    """Either all `Task`s with the same spaces, or all `DataTask`s with the same shapes."""
    reveals: frozenset[str] | None = None
    """Revealed information: any of `boundaries` (when a task ends), `train_id` and `test_id` (the task's index, in
    training and at test); None for everything that the scenario reveals."""
    order: Order = "given"
    """Order of the tasks."""
    scenario: Scenario = "task"
    """Continual-learning scenario of labelled samples (van de Ven and Tolias, 2019)."""
    restart_optimizer: bool | None = None
    """Whether optimizer moments are reset with every task and phase; None to reset them if boundaries are revealed."""
    observe_identity: bool = False
    """Whether observations of environments end with the task's index as a one-hot vector."""
    table: dict[str, Any] = field(default_factory=dict)
    """TOML table that defines it, {} for a stream created in code."""

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
        if len(self.orders()) > 1 and not self.of_samples and not physics_of(self.tasks):
            raise SettingError(ONE_ORDER)

    def _check_tasks(self) -> None:
        if not self.tasks:
            raise SettingError(f"stream {self.name!r} has no tasks, expected at least one")
        for member in self.tasks:
            if not isinstance(member, DataTask | Task):
                raise SettingError(
                    f"stream {self.name!r} has a task of type {type(member).__name__}, expected DataTask(...) of "
                    "samples (split, permute and rotate make them of a data set), or rl.task(...) and names of tasks"
                )
        if len({isinstance(member, DataTask) for member in self.tasks}) > 1:
            raise SettingError(f"stream {self.name!r} mixes tasks of samples with tasks to act in: make two streams")

    def _check_scenario(self) -> None:
        """Refuse tasks or revealed information that contradict the scenario."""
        scenario, tells = self.scenario, "test_id" in self.revealed
        if not self.of_samples:
            if scenario != "task":
                raise SettingError(NO_SCENARIO.format(self.name))
            return
        for member in self.tasks:
            if member.scenario not in (None, scenario):
                raise SettingError(
                    f"{member.name} was split for the scenario {member.scenario!r}, but its stream's is {scenario!r}: "
                    "give it to the stream alone"
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
        if scenario == "class" and not all(member.classes for member in self.tasks):
            raise SettingError(f"stream {self.name!r}: the scenario 'class' needs tasks with classes: choose 'domain'")
        if scenario == "domain":
            shared_classes(self.tasks)

    def _check_identity(self) -> None:
        if self.of_samples:
            raise SettingError(f"stream {self.name!r}: observe_identity is for tasks to act in, not for samples")
        if not self.revealed >= TASK_ID_SIGNALS:
            raise SettingError(f"stream {self.name!r}: observe_identity shows what reveals hides, train_id or test_id")

    @property
    def revealed(self) -> frozenset[str]:
        """Revealed information, a subset of `boundaries`, `train_id` and `test_id`."""
        return frozenset() if self.reveals is None else self.reveals

    @property
    def of_samples(self) -> bool:
        """Whether its tasks are labelled samples rather than environments."""
        return isinstance(self.tasks[0], DataTask)

    @property
    def restarts(self) -> bool:
        """Whether optimizer moments are reset with every task and phase."""
        return "boundaries" in self.revealed if self.restart_optimizer is None else self.restart_optimizer

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> Any:
        return self.tasks[index]

    @property
    def native(self) -> bool:
        """Whether all tasks are native, so that environments are cheap and have no hidden state."""
        return all(task.native for task in self.tasks)

    def orders(self) -> tuple[tuple[int, ...], ...]:
        """Orders of the tasks, as tuples of indices.

        Raises:
            SettingError: there are too many orders, or fewer than asked for.
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
        source, distinct = python_random.Random(0), dict[tuple[int, ...], None]()
        while len(distinct) < self.order:
            distinct[tuple(source.sample(range(count), count))] = None
        return tuple(distinct)

    def world(self, learner_shape: tuple[int, ...], num_envs: int) -> DataWorld | StreamWorld:
        """World `[*L, N]` in which every learner is in the task it is set to by `select`."""
        if self.of_samples:
            return DataWorld(self._samples, learner_shape, num_envs, scenario=self.scenario, reveals=self.revealed)
        return StreamWorld(self.tasks, learner_shape, num_envs, self.observe_identity)

    @cached_property
    def _samples(self) -> DataTable:
        return DataTable(shared_classes(self.tasks) if self.scenario == "domain" else self.tasks)

    def describe(self) -> dict[str, Any]:
        """Serialisable description from which the stream can be created again."""
        description: dict[str, Any] = {"kind": "stream", "name": self.name}
        description |= {"order": self.order, "scenario": self.scenario}
        if self.table:
            return {**description, "table": self.table}
        description["observe_identity"] = self.observe_identity
        if self.restart_optimizer is not None:
            description["restart_optimizer"] = self.restart_optimizer
        return {**description, "reveals": sorted(self.revealed), "tasks": [task.describe() for task in self.tasks]}


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
    """Create a stream of tasks from its name or a list of tasks.

    Args:
        source: a name (`rlmeta list streams`), or tasks (or names of tasks) in their order.
        name: of a stream that is created from a list.
        scenario: continual-learning scenario of labelled samples, "task", "domain" or "class"; by default that of the
            stream's file or of `split`, else "task". It decides whether "test_id" is revealed.
        order: the tasks in the given order, all permutations ("all"), or a number of distinct random orders; every
            order is a learner.
        reveals: information about the tasks that learners and methods get, of "boundaries" (when a task ends),
            "train_id" and "test_id" (the task's index, in training and at test); by default that of the stream's file,
            or everything that the scenario allows.
        restart_optimizer: whether optimizer moments are reset with every task; by default as in the stream's file, or
            if boundaries are revealed.
        observe_identity: append the task's index to every observation of an environment, as a one-hot vector; by
            default as in the stream's file, and not if `reveals` hides it.

    Raises:
        UnknownNameError: there is no such stream, or no such information to reveal.
        SettingError: the source is no stream, or its settings do not fit it.
    """
    if isinstance(reveals, str):
        raise SettingError(f"reveals is {reveals!r}, expected a list such as [{reveals!r}]")
    if reveals is not None:
        reveals = list(reveals) if isinstance(reveals, Iterable) else [reveals]
        if not all(isinstance(entry, str) for entry in reveals):
            raise SettingError(f"reveals is {reveals!r}, expected a list of {', '.join(sorted(EVERYTHING))}")
    if isinstance(source, str):
        table = dict(require_named(source))
        if reveals is not None:
            table["reveals"] = sorted(reveals)
            table["observe_identity"] = table.get("observe_identity", False) and set(reveals) >= TASK_ID_SIGNALS
        for key, value in (("observe_identity", observe_identity), ("restart_optimizer", restart_optimizer)):
            if value is not None:
                table[key] = value
        return from_table(source, table, scenario, order)
    if isinstance(source, Labelled):
        raise SettingError("a data set is no stream of tasks: pass tasks of it, such as split(data, [[0, 1], [2, 3]])")
    if not isinstance(source, Iterable):
        raise SettingError(f"a stream of {type(source).__name__}, expected a name (`rlmeta list streams`) or tasks")
    tasks = tuple(task(entry) if isinstance(entry, str) else entry for entry in source)
    declared = next((entry.scenario for entry in tasks if isinstance(entry, DataTask) and entry.scenario), None)
    if scenario is not None and tasks and isinstance(tasks[0], Task):
        raise SettingError(NO_SCENARIO.format(name))
    return TaskStream(
        name,
        tasks,
        None if reveals is None else frozenset(reveals),
        order,
        scenario or declared or "task",
        restart_optimizer,
        bool(observe_identity),
    )


def from_table(
    name: str, table: dict[str, Any], scenario: Scenario | None = None, order: Order = "given"
) -> TaskStream:
    """Create a stream from a TOML table.

    Keys: `tasks` (names, or tables with `env` and `settings`), or `data` (a data set) with one of `split` (groups of
    classes), `permute` (number of tasks) and `rotate` (number of tasks; `degrees`), and `samples`, `scenario`; and
    `reveals`, `restart_optimizer`, and `observe_identity` for environments.

    Args:
        name: of the table's file.
        table: its content.
        scenario: overrides that of the table.
        order: of the tasks, as for `stream`.

    Raises:
        SettingError: the table is of no stream, has an unknown key, or a scenario for tasks that are environments.
    """
    where = f"envs/{name}.toml"
    if table.get("kind") != "stream":
        raise SettingError(f"{name!r} is a {table.get('kind', 'task')}, expected a stream of tasks")
    known = {"kind", "description", "tasks", "reveals", "data", "split", "permute", "rotate", "degrees", "samples"}
    unknown = set(table) - known - {"scenario", "restart_optimizer", "observe_identity"}
    if unknown:
        raise SettingError(f"{where}: {unknown_name('key', min(unknown), known)}")
    reveals = frozenset(table["reveals"]) if "reveals" in table else None
    restarts, shown = table.get("restart_optimizer"), bool(table.get("observe_identity", False))
    if "tasks" in table:
        if scenario is not None or "scenario" in table:
            raise SettingError(NO_SCENARIO.format(name))
        tasks = tuple(_entry(entry, f"{name}/{i}") for i, entry in enumerate(table["tasks"]))
        return TaskStream(name, tasks, reveals, order, "task", restarts, shown, table)
    chosen: Scenario = scenario or table.get("scenario", "task")
    return TaskStream(name, tuple(_of_data(where, table)), reveals, order, chosen, restarts, shown, table)


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
    """Whether a name is that of a stream."""
    return (read_named("envs", name) or {}).get("kind") == "stream"
