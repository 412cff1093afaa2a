"""Live gymnasium environments, one per row, stepped in a loop in this process."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import Any, Literal, TypeAlias

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit

from rlmeta.data.spaces import Array, Layout
from rlmeta.envs.gymnasium import failures
from rlmeta.errors import SettingError, SpaceError, require_choice, require_count

MaskSource: TypeAlias = Literal["method", "info"] | None
"""Source of an environment's action mask: `action_masks()`, `info["action_mask"]`, or none."""

WORKER_TIMEOUT = 600.0
"""Seconds that a call of an environment, its `step`, `reset` or construction, may take in a worker process."""


_calls = threading.local()
"""`began`: start time of the current call of an environment, per thread."""


def seconds_in_call() -> float:
    """Seconds since the start of this thread's current call of an environment; 0 if there is none."""
    began: float | None = getattr(_calls, "began", None)
    return 0.0 if began is None else time.monotonic() - began


def require_timeout(value: object) -> None:
    """Refuse a timeout that is no finite number of seconds above 0.

    Raises:
        SettingError: the value is no such number.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise SettingError(f"worker_timeout is {value!r}, expected seconds, a finite number above 0")


@dataclass
class Buffers:
    """Results of the last step of R environments, overwritten by the next step."""

    observation: list[Array]
    """Observation to act on next, `[R, ...]` per leaf of the observation space."""
    final: list[Array]
    """Final observation of the episode, `[R, ...]` per leaf, written only in rows where one ended."""
    reward: Array
    """`[R]` float32."""
    terminated: Array
    """`[R]` bool."""
    truncated: Array
    """`[R]` bool."""
    valid: Array
    """`[R]` bool: False where the action was ignored."""
    begins: Array
    """`[R]` bool: `observation` begins an episode; if the step was valid, `final` is the last of the previous one."""

    @staticmethod
    def allocate(layout: Layout, rows: int) -> Buffers:
        """Allocate buffers of `rows` environments."""
        flags = [np.zeros(rows, np.bool_) for _ in range(4)]
        return Buffers(layout.empty(rows), layout.empty(rows), np.zeros(rows, np.float32), *flags)

    def arrays(self) -> list[Array]:
        """All buffers in one list: leaves of observation and final observation, then reward and flags."""
        flags = [self.terminated, self.truncated, self.valid, self.begins]
        return [*self.observation, *self.final, self.reward, *flags]

    @staticmethod
    def of(arrays: Sequence[Array]) -> Buffers:
        """Buffers of the arrays that `arrays` returns."""
        leaves = (len(arrays) - 5) // 2
        return Buffers(list(arrays[:leaves]), list(arrays[leaves:-5]), *arrays[-5:])


@dataclass(frozen=True)
class Template:
    """Factory of single environments, with their common name, spaces and time limit."""

    make: Callable[[], gym.Env[Any, Any]]
    name: str
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    mask: MaskSource
    max_episode_steps: int | None

    def environment(self) -> gym.Env[Any, Any]:
        """Create an environment.

        Raises:
            EnvironmentFailedError: its construction failed.
            SpaceError: its spaces differ from those of the first environment.
        """
        with failures.converting(self.name):
            env = with_mask(self.make(), self.mask)
            same = Layout(env.observation_space).signature == Layout(self.observation_space).signature
        if not same or env.action_space != self.action_space:
            failures.close(env, self.name)
            raise SpaceError(
                f"{self.name} gave environments of different spaces: {env.observation_space} and {env.action_space}, "
                f"expected those of the first, {self.observation_space} and {self.action_space}"
            )
        return env

    def limited(self, steps: int) -> Template:
        """Add a time limit to the environments, by gymnasium's TimeLimit.

        Raises:
            SettingError: `steps` is less than 1, or more than the environment's own limit.
        """
        require_count("max_episode_steps", steps)
        own = self.max_episode_steps
        if own is not None and own < steps:
            raise SettingError(
                f"max_episode_steps is {steps}, but {self.name} ends its episodes after {own} steps by itself: give at "
                "most as many, or let the function that makes it give it more"
            )
        return replace(self, make=partial(_limited, self.make, steps), max_episode_steps=steps)


def _limited(make: Callable[[], gym.Env[Any, Any]], steps: int) -> gym.Env[Any, Any]:
    return TimeLimit(make(), steps)


class Rows:
    """R live environments in this process.

    Args:
        template: factory of the environments.
        count: R.
        buffers: for results; allocated if None.
        progress: `[2]`, in which the row of the current call and the number of calls are written.
        first: index of its first row, for messages: a worker process has a part of all rows.

    Raises:
        RlmetaError: here and in all methods, an environment failed; the message names its row.
    """

    def __init__(
        self,
        template: Template,
        count: int,
        buffers: Buffers | None = None,
        progress: MutableSequence[int] | memoryview | None = None,
        first: int = 0,
    ) -> None:
        self.name, self._first = template.name, first
        self._progress: MutableSequence[int] | memoryview = [0, 0] if progress is None else progress
        self.observations, self.actions = Layout(template.observation_space), Layout(template.action_space, "action")
        self.envs: list[gym.Env[Any, Any]] = []
        try:
            with self._calling():
                for row in range(count):
                    self._call(row)
                    self._add(template.environment())
        except BaseException:
            self.close()
            raise
        self.buffers = buffers or Buffers.allocate(self.observations, count)
        self.buffers.valid[:] = True
        self._write = self.observations.writer(self.buffers.observation, self.name)
        self._write_final = self.observations.writer(self.buffers.final, self.name)

    def reset(self, rows: Sequence[int], seeds: Sequence[int]) -> None:
        """Reset the environments of some rows, each with its seed."""
        with self._calling():
            for row, seed in zip(rows, seeds):
                self._write_reset(row, int(seed))

    def step(self, actions: Sequence[Array], next_seeds: Array) -> None:
        """Step every environment; where an episode ended, reset it with its entry of `next_seeds`.

        Args:
            actions: environment actions, `[R, ...]` per leaf, not written to afterwards.
            next_seeds: seeds of the next episodes, `[R]`.
        """
        rewards, terminated, truncated = [], [], []
        with self._calling():
            for row, (env, action) in enumerate(zip(self.envs, self.actions.rows(actions))):
                self._call(row)
                observation, reward, ended, cut = self._step(env, action)
                rewards.append(reward)
                terminated.append(ended)
                truncated.append(cut)
                if self._is_over(ended, cut):
                    self._write_final(row, observation)
                    self._write_reset(row, int(next_seeds[row]))
                else:
                    self._write(row, observation)
        self._store("reward", self.buffers.reward, rewards)
        self._store("terminated", self.buffers.terminated, terminated)
        self._store("truncated", self.buffers.truncated, truncated)
        np.logical_or(self.buffers.terminated, self.buffers.truncated, out=self.buffers.begins)

    def replay(self, rows: Sequence[int], seeds: Sequence[int], actions: Sequence[Sequence[Array]]) -> list[bool]:
        """Replay episodes from their seeds and actions.

        Args:
            rows: indices of the environments.
            seeds: of their episodes.
            actions: environment actions of each row, `[steps, ...]` per leaf.

        Returns:
            Whether the episode of each row still runs at the end; the observations are in `buffers`.
        """
        with self._calling():
            return [self._replay(row, int(seed), taken) for row, seed, taken in zip(rows, seeds, actions)]

    def close(self) -> None:
        """Close every environment; see `failures.close`."""
        with ExitStack() as closing:
            while self.envs:
                closing.callback(failures.close, self.envs.pop(), self.name)

    @property
    def current(self) -> str:
        """Description of the environment that is, or was last, called."""
        return f"{self.name} in row {self._first + self._progress[0]}"

    def _step(self, env: gym.Env[Any, Any], action: Any) -> tuple[Any, Any, Any, Any]:
        """Step an environment: observation, reward, terminated and truncated.

        Raises:
            SpaceError: the environment did not return gymnasium's five values.
        """
        result: Any = env.step(action)
        if not isinstance(result, tuple | list) or len(result) != 5:
            returned = f"{len(result)} values" if isinstance(result, tuple | list) else type(result).__name__
            raise SpaceError(f"{self.name} gave {returned} from step(), expected gymnasium's 5")
        return result[0], result[1], result[2], result[3]

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """Context of calls of environments (see `_call`), whose exceptions are converted to errors with the row."""
        try:
            with failures.converting(lambda: self.current):
                yield
        finally:
            _calls.began = None

    def _call(self, row: int) -> None:
        """Record that a row's environment is called now, for processes that wait for it."""
        self._progress[0] = row
        self._progress[1] += 1
        _calls.began = time.monotonic()

    def _add(self, env: gym.Env[Any, Any]) -> None:
        if any(env.unwrapped is other.unwrapped for other in self.envs):
            raise SettingError(f"{self.name} returned one environment twice; every row needs its own: make it inside")
        self.envs.append(env)

    def _is_over(self, terminated: Any, truncated: Any) -> bool:
        """Whether an episode is over, by either flag.

        Raises:
            SpaceError: a flag is an array of several entries, or of none.
        """
        try:
            return bool(terminated or truncated)
        except (ValueError, RuntimeError):  # of numpy and of torch
            what, odd = ("terminated", terminated) if np.size(terminated) != 1 else ("truncated", truncated)
            raise SpaceError(f"{self.name} gave {what} {odd!r} from step(), expected one number") from None

    def _store(self, what: str, buffer: Array, column: list[Any]) -> None:
        try:
            array = np.asarray(column)
        except ValueError:  # ragged
            array = np.zeros((), object)
        if array.shape != buffer.shape or array.dtype.kind not in "biuf":
            odd = next((x for x in column if np.shape(x) or np.asarray(x).dtype.kind not in "biuf"), column[0])
            raise SpaceError(f"{self.name} gave {what} {odd!r} from step(), expected one number")
        buffer[:] = array

    def _reset(self, row: int, seed: int) -> Any:
        self._call(row)
        return first_reset(self.envs[row], seed, self.name)[0]

    def _write_reset(self, row: int, seed: int) -> None:
        self._write(row, self._reset(row, seed))

    def _replay(self, row: int, seed: int, actions: Sequence[Array]) -> bool:
        env = self.envs[row]
        observation = self._reset(row, seed)
        for action in self.actions.rows(actions):
            self._call(row)
            observation, _, terminated, truncated = self._step(env, action)
            if self._is_over(terminated, truncated):
                return False
        self._write(row, observation)
        return True


def first_reset(env: gym.Env[Any, Any], seed: int, name: str) -> tuple[Any, dict[str, Any]]:
    """Reset an environment with a seed, and check that it returns an observation and info.

    Raises:
        SpaceError: the environment did not return `(observation, info)`.
    """
    result: Any = env.reset(seed=seed)
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], dict):
        kind = type(result).__name__
        text = f"{kind} of {', '.join(type(part).__name__ for part in result)}" if isinstance(result, tuple) else kind
        raise SpaceError(f"{name} gave {text} from reset(), expected (observation, info), info a dictionary")
    return result


# ----------------------------------------------------------------------------------------------------- action masks


class ActionMaskObservation(gym.Wrapper[Any, Any, Any, Any]):
    """Wrapper that adds the action mask to the observation, `{"observation": ..., "action_mask": ...}`.

    The mask of a terminal state allows every action: no action is chosen there, and the environment may have no mask.
    """

    def __init__(self, env: gym.Env[Any, Any], source: MaskSource) -> None:
        super().__init__(env)
        require_choice("source", source, MaskSource)
        self._source = source
        self._ones = np.ones(mask_length(env.action_space), np.int8)
        self.observation_space = masked_space(env.observation_space, env.action_space)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset the environment, with the mask in its observation."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self._with_mask(observation, info), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step the environment, with the mask in its observation."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        shown = {"observation": observation, "action_mask": self._ones}
        return shown if terminated else self._with_mask(observation, info), reward, terminated, truncated, info

    def _with_mask(self, observation: Any, info: dict[str, Any]) -> dict[str, Any]:
        if self._source == "method":
            mask = self.env.get_wrapper_attr("action_masks")()
        elif "action_mask" in info:
            mask = info["action_mask"]
        else:
            raise SpaceError('an environment gave an info without the "action_mask" that its first one had')
        return {"observation": observation, "action_mask": mask}


def mask_length(action_space: gym.Space[Any]) -> int:
    """Count the entries of the action mask.

    Raises:
        SpaceError: the actions of this space cannot be masked.
    """
    if isinstance(action_space, spaces.Discrete):
        return int(action_space.n)
    if isinstance(action_space, spaces.MultiDiscrete):
        return int(np.sum(action_space.nvec))
    raise SpaceError(f"actions of {action_space} cannot be masked, expected Discrete or MultiDiscrete")


def masked_space(observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> spaces.Dict:
    """Add the action mask to an observation space."""
    mask = spaces.MultiBinary(mask_length(action_space))
    return spaces.Dict({"observation": observation_space, "action_mask": mask})


def with_mask(env: gym.Env[Any, Any], source: MaskSource) -> gym.Env[Any, Any]:
    """Wrap an environment so that its action mask, if it has one, is part of the observation."""
    return env if source is None else ActionMaskObservation(env, source)


def has_own_mask(observation_space: gym.Space[Any]) -> bool:
    """Whether observations have an action mask of their own."""
    return isinstance(observation_space, spaces.Dict) and "action_mask" in observation_space.spaces
