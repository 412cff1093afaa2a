"""A stream is a sequence of problems that one learner meets in turn: tasks to act in, or tasks of labelled samples."""

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
from rlmeta.envs.stream_world import IDENTITY, ONE_ORDER, StreamWorld, physics_of
from rlmeta.envs.task import Task, require_named, task
from rlmeta.errors import SettingError, unknown_name

Order: TypeAlias = Literal["given", "all"] | int
"""The tasks as they stand, every order of them, or so many distinct ones drawn at random. Every order is a learner."""


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
        if len(self.orders()) > 1 and not self.of_samples and not physics_of(self.tasks):
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
