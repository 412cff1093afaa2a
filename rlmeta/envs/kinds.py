"""Kinds of problems, and their resolution from values and names: task, family of tasks, stream of tasks.

| kind | what it is | which learners train on it |
|---|---|---|
| `Task`, `DataTask` | one problem: environments, or labelled samples | any learner but a meta-learner |
| `TaskFamily` | a task whose constants are redrawn | an agent, as one task; a meta-learner, as many |
| `NamedFamily` | a distribution over tasks | a meta-learner |
| `TaskStream` | a sequence of tasks | any learner but a meta-learner |
"""

from __future__ import annotations

import dataclasses
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
    """Look up the kind of a named problem; "task" if no TOML file in `envs/` has the name."""
    table = read_named("envs", name) or {}
    if table.get("kind") == "stream":
        return "stream"
    return "family" if is_data_family(name) or table.get("kind") == "family" else "task"


def is_problem(value: Any) -> bool:
    """Whether a value is a task, stream or family (with a method `tasks`), and no environment or factory of one."""
    if isinstance(value, Task | DataTask | TaskFamily | NamedFamily | TaskStream):
        return True
    return callable(getattr(value, "tasks", None)) and not _is_env(value)


def _is_env(value: Any) -> bool:
    return issubclass(value, gym.Env) if isinstance(value, type) else isinstance(value, gym.Env)


def problem_of(value: Any, learner: str, learns_from_tasks: bool) -> Task | DataTask | NamedFamily | TaskStream:
    """Resolve a problem for a learner: a problem, its name, or anything that `task` accepts.

    Of a family, a meta-learner gets the family itself, and any other learner the task that redraws its constants.

    Args:
        value: a problem, its name, a family of the user's own, or an argument of `task`.
        learner: its name, for the error message.
        learns_from_tasks: whether the learner is a meta-learner.

    Raises:
        UnknownNameError: nothing has this name.
        SettingError: a meta-learner without a family, or another learner with a family for meta-learners alone.
    """
    problem = _resolved(value, learns_from_tasks)
    if learns_from_tasks != isinstance(problem, NamedFamily):
        name = getattr(problem, "name", problem)
        raise SettingError(
            f"{learner} learns from a family of tasks, {name!r} is none: `rlmeta list families` shows them"
            if learns_from_tasks
            else f"{name!r} is a family of tasks for meta-learners, {learner} learns one task: use MAML or another "
            "meta-learner"
        )
    return problem


def evaluated(problem: Any) -> Any:
    """The problem as it is evaluated (`Task.evaluated`), of a stream every task; others are evaluated as they are."""
    if isinstance(problem, Task):
        return problem.evaluated()
    if isinstance(problem, TaskStream):
        tasks = tuple(evaluated(member) for member in problem.tasks)
        same = all(whole is member for whole, member in zip(tasks, problem.tasks))
        return problem if same else dataclasses.replace(problem, tasks=tasks)
    return problem


def _resolved(value: Any, learns_from_tasks: bool) -> Any:
    """Convert a value or name to a problem, without the check that it suits the learner."""
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
    return task(value)  # a factory of an environment; `task` refuses anything else
