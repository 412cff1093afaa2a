"""Kinds of problems: a task, a family of tasks, a stream of them. The one place that tells them apart.

| kind | what it is | who learns it |
|---|---|---|
| `Task`, `DataTask` | one problem: environments, or labelled samples | any learner but a meta-learner |
| `TaskFamily` | a task whose constants are drawn anew | an agent, as one task; a meta-learner, as many |
| `NamedFamily` | a distribution over tasks to learn to learn | a meta-learner |
| `TaskStream` | a sequence of tasks | any learner but a meta-learner |
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import gymnasium as gym

from rlmeta.data.samples import DataTask
from rlmeta.envs.families import NamedFamily
from rlmeta.envs.names import read_named
from rlmeta.envs.streams import TaskStream, stream
from rlmeta.envs.task import Task, TaskFamily, family, is_data_family, task
from rlmeta.errors import SettingError

Kind: TypeAlias = Literal["task", "family", "stream"]


def kind_named(name: str) -> Kind:
    """The kind of problem that a name names; of one that no table in `envs/` names it is a task."""
    table = read_named("envs", name) or {}
    if table.get("kind") == "stream":
        return "stream"
    return "family" if is_data_family(name) or table.get("kind") == "family" else "task"


def is_problem(value: Any) -> bool:
    """Whether it is a task, a stream, or a family (`tasks` draws some), rather than an environment or what makes it."""
    if isinstance(value, Task | DataTask | TaskFamily | NamedFamily | TaskStream):
        return True
    return callable(getattr(value, "tasks", None)) and not _is_env(value)


def _is_env(value: Any) -> bool:
    return issubclass(value, gym.Env) if isinstance(value, type) else isinstance(value, gym.Env)


def problem_of(value: Any, learner: str, learns_from_tasks: bool) -> Task | DataTask | NamedFamily | TaskStream:
    """What a run is on: the problem itself, or what its name names.

    A meta-learner gets a family as it is, any other learner the task that redraws its constants.

    Args:
        value: a problem, the name of one, a family of the user's own, or what `task` makes a task of.
        learner: what to call it in a message.
        learns_from_tasks: whether it is a meta-learner.

    Raises:
        UnknownNameError: nothing has this name.
        SettingError: a meta-learner without a family, or a family of tasks that only a meta-learner can use.
    """
    problem = _made(value, learns_from_tasks)
    if learns_from_tasks != isinstance(problem, NamedFamily):
        name = getattr(problem, "name", problem)
        raise SettingError(
            f"{learner} learns from a family of tasks, {name!r} is none: `rlmeta list families` shows them"
            if learns_from_tasks
            else f"{name!r} is a family of tasks to learn to learn, {learner} learns one: use MAML or another "
            "meta-learner"
        )
    return problem


def _made(value: Any, learns_from_tasks: bool) -> Any:
    """The problem that something is, or names."""
    if isinstance(value, str):
        kind = kind_named(value)
        if kind == "stream":
            value = stream(value)
        else:
            value = family(value) if learns_from_tasks or is_data_family(value) else task(value)
    if isinstance(value, TaskFamily):
        return NamedFamily(value.name, value) if learns_from_tasks else value.task()
    if isinstance(value, Task | DataTask | NamedFamily | TaskStream):
        return value
    if getattr(value, "tasks", None) is not None and not _is_env(value):
        return NamedFamily(type(value).__name__, value)
    return task(value)  # of an environment's factory; what can't be one is refused with what to give instead
