"""Parallel environments of a sequence of reinforcement-learning tasks; every learner has its own current task."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rlmeta.data.samples import EVERYTHING
from rlmeta.envs.native import NativeEnv, NativeWorld
from rlmeta.envs.task import Task
from rlmeta.envs.world import State, Transition, World
from rlmeta.errors import SettingError
from rlmeta.functional.tree import Tree

TASK_ID_SIGNALS = EVERYTHING - {"boundaries"}
"""What a stream must reveal for tasks to be identified by a one-hot vector in the observations."""

ONE_ORDER = (
    "orders of tasks as learners need native tasks of one environment that differ in its constants: give these tasks "
    'in one order (order="given")'
)


class StreamWorld:
    """World of a stream of tasks with equal spaces: every learner acts in the task it is set to by `select`.

    Learners may be in different tasks if these are native and differ in constants alone. Of other environments there is
    a world for each task, and all learners are in the same one. The state is that of the current world, with the index
    of the task, `identity` `[*L, N]`.

    Raises:
        SettingError: the tasks' spaces differ, or `observe_identity` is set and observations are no vectors of floats.
    """

    trial_episodes = 1
    recordable: bool
    """Whether steps with random numbers from `predraw_noise` may be recorded: if constants are in the state."""

    def __init__(
        self,
        tasks: Sequence[Task],
        learner_shape: tuple[int, ...],
        num_envs: int,
        observe_identity: bool = False,
    ) -> None:
        self.learner_shape, self.num_envs = tuple(learner_shape), num_envs
        self._observe_identity = observe_identity
        self._tasks, self._physics = tasks, physics_of(tasks)
        self._worlds: list[World] = []
        trials = [task.name for task in tasks if task.episodes > 1]
        if trials:
            raise SettingError(
                f"{', '.join(trials)}: trials of several episodes are no tasks of a stream: leave them out"
            )
        with ExitStack() as closing:
            if not self._physics:
                for task in tasks:
                    self._worlds.append(task.world(learner_shape, num_envs))
                    closing.callback(self._worlds[-1].close)
            self._begin(observe_identity)
            closing.pop_all()

    def _begin(self, observe_identity: bool) -> None:
        """Enter the first task, after a check that all have the same spaces."""
        tasks = self._tasks
        self.recordable = self._physics is not None
        self.identity = torch.zeros(self.learner_shape, dtype=torch.int64, device="cpu")
        self._current: Any = self._with_physics() if self._physics else self._worlds[0]
        inner, self.action_space = self._current.observation_space, self._current.action_space
        for task, world in zip(tasks, self._worlds):
            if (world.observation_space, world.action_space) != (inner, self.action_space):
                raise SettingError(
                    f"{task.name} has spaces {world.observation_space}, {world.action_space}, {tasks[0].name} has "
                    f"{inner}, {self.action_space}: the tasks of a stream need the same"
                )
        self.observation_space = _with_identity(inner, len(tasks)) if observe_identity else inner

    @property
    def longest_episode(self) -> int | None:
        """Largest time limit of the gymnasium tasks in steps, None if one declares none."""
        foreign: list[Any] = [world for task, world in zip(self._tasks, self._worlds) if not task.native]
        limits = [world.max_episode_steps for world in foreign]
        return None if None in limits else max(limits, default=None)

    @property
    def name(self) -> str:
        """Name of the environments of the current task."""
        return str(self._current.name)

    @property
    def max_episode_steps(self) -> int | None:
        """Steps after which episodes of the current task are truncated, None if its environments declare no limit."""
        limit: int | None = self._current.max_episode_steps
        return limit

    @property
    def exact_resume(self) -> bool:
        """Whether `restore` brings every environment back to exactly the saved state."""
        return bool(self._current.exact_resume)

    def select(self, identity: Tensor) -> None:
        """Set the task of every learner, by index `[*L]` int64; `reset` begins it.

        Raises:
            SettingError: learners are set to different tasks that cannot be batched.
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
        """Initial state of every learner's task."""
        state: State = self._current.reset(key)
        shape = (*self.learner_shape, self.num_envs)
        return {**state, "identity": self.identity.to(key.device).unsqueeze(-1).expand(shape).clone()}

    def observation(self, state: State) -> Tree:
        """Current observation, `[*L, N, ...]`."""
        return self._append_task_one_hot(self._current.observation(_inner(state)), state)

    def step(self, state: State, action: Tensor, predrawn_noise: Tree | None = None) -> tuple[State, Transition]:
        """Step every environment; `predrawn_noise` are random numbers drawn in advance."""
        arguments = (action,) if predrawn_noise is None else (action, predrawn_noise)
        new, transition = self._current.step(_inner(state), *arguments)
        transition = transition._replace(
            observation=self._append_task_one_hot(transition.observation, state),
            next_observation=self._append_task_one_hot(transition.next_observation, state),
        )
        return {**new, "identity": state["identity"]}, transition

    def successor(self, state: State, action: Tensor) -> State:
        """State of native environments after a step, before another episode begins (`NativeWorld.successor`)."""
        successor: State = self._current.successor(_inner(state), action)
        return successor

    def predraw_noise(self, state: State) -> tuple[Tree, int]:
        """Draw random numbers for the next steps; returns them and the number of steps for which they suffice."""
        numbers: tuple[Tree, int] = self._current.predraw_noise(_inner(state))
        return numbers

    def warn_of_nonfinite(self, state: State) -> None:
        """Warn of NaN and infinity, as native worlds do."""
        warn_of_nonfinite = getattr(self._current, "warn_of_nonfinite", None)
        if warn_of_nonfinite is not None:
            warn_of_nonfinite(_inner(state))

    def restore(self, state: State, inexact: bool = False) -> State:
        """Bring live environments of the selected task to a loaded `state`."""
        if self._physics:
            return state
        current: Any = self._current
        inner = _inner(state)
        new: State = current.restore(inner) if isinstance(current, NativeWorld) else current.restore(inner, inexact)
        return {**new, "identity": state["identity"]}

    def _append_task_one_hot(self, observation: Any, state: State) -> Any:
        """Append the one-hot vector of the task to an observation, if `observe_identity` is set."""
        if not self._observe_identity:
            return observation
        task_indices = torch.arange(len(self._tasks), device=observation.device)
        one_hot = state["identity"].unsqueeze(-1) == task_indices
        return torch.cat([observation, one_hot.to(observation.dtype)], -1)

    def close(self) -> None:
        """Close the environments of all tasks."""
        with ExitStack() as closing:
            for world in self._worlds:
                closing.callback(world.close)


def _inner(state: State) -> State:
    return {name: value for name, value in state.items() if name != "identity"}


def _with_identity(space: gym.Space, tasks: int) -> gym.Space:
    """Observation space with a one-hot vector of the task appended."""
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1 or not np.issubdtype(space.dtype, np.floating):
        raise SettingError(f"observe_identity needs observations that are vectors of floats, not {space}: leave it out")
    low, high = (np.concatenate([bound, np.full(tasks, end)]) for bound, end in ((space.low, 0), (space.high, 1)))
    return gym.spaces.Box(low.astype(space.dtype), high.astype(space.dtype))


def physics_of(tasks: Sequence[Task]) -> dict[str, Tensor] | None:
    """Constants `[K]` in which native tasks of one environment differ; None if they differ in anything else.

    There is an entry '' without values, so that the dictionary of equal tasks is not empty.
    """
    first = tasks[0].source
    alike = (isinstance(task.source, NativeEnv) and type(task.source) is type(first) for task in tasks)
    if not all(alike) or any(task.ranges for task in tasks):
        return None
    free = first.constants()
    differing: dict[str, Tensor] = {"": torch.empty(0, device="cpu")}
    for constant in dataclasses.fields(first):
        values = [getattr(task.source, constant.name) for task in tasks]
        if any(not _equal(value, values[0]) for value in values):
            if constant.name not in free or free[constant.name].dim():
                return None
            differing[constant.name] = torch.tensor(values, dtype=free[constant.name].dtype, device="cpu")
    return differing


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return bool(a == b)
