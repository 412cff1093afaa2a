"""Live gymnasium environments, one a row, stepped one after another in this process."""

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
"""Where an environment says which actions are allowed: `action_masks()`, `info["action_mask"]`, or not at all."""

WORKER_TIMEOUT = 600.0
"""Seconds that one call of an environment, its `step`, `reset` or making, may take in a worker process."""


_calls = threading.local()
"""`began`: when the environment that a thread calls was called."""


def seconds_in_call() -> float:
    """For how long this thread has been within a call of an environment; 0 where it is in none."""
    began: float | None = getattr(_calls, "began", None)
    return 0.0 if began is None else time.monotonic() - began


def require_timeout(value: object) -> None:
    """Refuse what is no finite number of seconds above 0.

    Raises:
        SettingError: it is another.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise SettingError(f"worker_timeout is {value!r}, expected seconds, a finite number above 0")


@dataclass
class Buffers:
    """What the last step of R environments left; the next one overwrites it."""

    observation: list[Array]
    """One `[R, ...]` per leaf of the observation space: what is seen next."""
    final: list[Array]
    """The same, written only in the rows where an episode ended: its last observation."""
    reward: Array
    """`[R]` float32."""
    terminated: Array
    """`[R]` bool."""
    truncated: Array
    """`[R]` bool."""
    valid: Array
    """`[R]` bool: False where the action was ignored."""
    begins: Array
    """`[R]` bool: `observation` is the first of an episode; where the step was valid, `final` ends the one before."""

    @staticmethod
    def allocate(layout: Layout, rows: int) -> Buffers:
        """Room for `rows` environments."""
        flags = [np.zeros(rows, np.bool_) for _ in range(4)]
        return Buffers(layout.empty(rows), layout.empty(rows), np.zeros(rows, np.float32), *flags)

    def arrays(self) -> list[Array]:
        """Every array, in a fixed order."""
        flags = [self.terminated, self.truncated, self.valid, self.begins]
        return [*self.observation, *self.final, self.reward, *flags]

    @staticmethod
    def of(arrays: Sequence[Array]) -> Buffers:
        """The inverse of `arrays`."""
        leaves = (len(arrays) - 5) // 2
        return Buffers(list(arrays[:leaves]), list(arrays[leaves:-5]), *arrays[-5:])


@dataclass(frozen=True)
class Template:
    """How to make one environment, and what every one that it makes has in common."""

    make: Callable[[], gym.Env[Any, Any]]
    name: str
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    mask: MaskSource
    max_episode_steps: int | None

    def environment(self) -> gym.Env[Any, Any]:
        """A new environment.

        Raises:
            EnvironmentFailedError: it can't be made.
            SpaceError: it has other spaces than the first one had.
        """
        with failures.telling(self.name):
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
        """Environments that cut their episodes after so many steps, by gymnasium's TimeLimit.

        Raises:
            SettingError: no count, or they cut them sooner by themselves.
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
    """R live environments.

    Args:
        template: how to make one.
        count: R.
        buffers: where to write; by default memory of its own.
        progress: `[2]`, where the row whose environment is called is written, and how many calls there were.
        first: the number of its first row, for messages: a worker process has some of all rows.

    Raises:
        RlmetaError: here and below, one sentence of whatever an environment did wrong, with its row.
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
        """Start an episode from the given seed in each of the rows."""
        with self._calling():
            for row, seed in zip(rows, seeds):
                self._write_reset(row, int(seed))

    def step(self, actions: Sequence[Array], next_seeds: Array) -> None:
        """Act in every row, and start the next episode from `next_seeds` `[R]` in those where one ended.

        Args:
            actions: executable ones, `[R, ...]` per leaf, not written to afterwards.
            next_seeds: `[R]`.
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
        """Bring each of the rows to where its episode was after the given actions.

        Args:
            rows: which.
            seeds: of their episodes.
            actions: for each row, its executable actions so far, `[steps, ...]` per leaf.

        Returns:
            For each row, whether the episode was still running; the observations are in `buffers`.
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
        """The environment that is called, or was called last, in words."""
        return f"{self.name} in row {self._first + self._progress[0]}"

    def _step(self, env: gym.Env[Any, Any], action: Any) -> tuple[Any, Any, Any, Any]:
        """What `step` gives but its infos.

        Raises:
            SpaceError: something else than gymnasium's five values.
        """
        result: Any = env.step(action)
        if not isinstance(result, tuple | list) or len(result) != 5:
            given = f"{len(result)} values" if isinstance(result, tuple | list) else type(result).__name__
            raise SpaceError(f"{self.name} gave {given} from step(), expected gymnasium's 5")
        return result[0], result[1], result[2], result[3]

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """Within, environments are called, see `_call`; what one raises is told with its row."""
        try:
            with failures.telling(lambda: self.current):
                yield
        finally:
            _calls.began = None

    def _call(self, row: int) -> None:
        """Note that the row's environment is called now, for whoever waits."""
        self._progress[0] = row
        self._progress[1] += 1
        _calls.began = time.monotonic()

    def _add(self, env: gym.Env[Any, Any]) -> None:
        if any(env.unwrapped is other.unwrapped for other in self.envs):
            raise SettingError(f"{self.name} returned one environment twice; every row needs its own: make it inside")
        self.envs.append(env)

    def _is_over(self, terminated: Any, truncated: Any) -> bool:
        """Whether either flag is set.

        Raises:
            SpaceError: one is an array of another number of entries than one.
        """
        try:
            return bool(terminated or truncated)
        except (ValueError, RuntimeError):  # numpy's, and torch's
            what, odd = ("terminated", terminated) if np.size(terminated) != 1 else ("truncated", truncated)
            raise SpaceError(f"{self.name} gave {what} {odd!r} from step(), expected one number") from None

    def _store(self, what: str, buffer: Array, column: list[Any]) -> None:
        try:
            array = np.asarray(column)
        except ValueError:  # ragged
            array = np.zeros((), object)
        if array.shape != buffer.shape or array.dtype.kind not in "biuf":
            odd = next((one for one in column if np.shape(one) or np.asarray(one).dtype.kind not in "biuf"), column[0])
            raise SpaceError(f"{self.name} gave {what} {odd!r} from step(), expected one number")
        buffer[:] = array

    def _reset(self, row: int, seed: int) -> Any:
        self._call(row)
        return first_of(self.envs[row], seed, self.name)[0]

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


def first_of(env: gym.Env[Any, Any], seed: int, name: str) -> tuple[Any, dict[str, Any]]:
    """What `reset(seed=seed)` gives, `(observation, info)`.

    Raises:
        SpaceError: something else.
    """
    result: Any = env.reset(seed=seed)
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], dict):
        kind = type(result).__name__
        said = f"{kind} of {', '.join(type(one).__name__ for one in result)}" if isinstance(result, tuple) else kind
        raise SpaceError(f"{name} gave {said} from reset(), expected (observation, info), info a dictionary")
    return result


# ----------------------------------------------------------------------------------------------------- action masks


class ActionMaskObservation(gym.Wrapper[Any, Any, Any, Any]):
    """Shows the mask of allowed actions as a part of the observation, `{"observation": ..., "action_mask": ...}`.

    A terminated episode allows everything: nothing is chosen there, and its environment may not answer.
    """

    def __init__(self, env: gym.Env[Any, Any], source: MaskSource) -> None:
        super().__init__(env)
        require_choice("source", source, MaskSource)
        self._source = source
        self._ones = np.ones(mask_length(env.action_space), np.int8)
        self.observation_space = masked_space(env.observation_space, env.action_space)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """As the environment's own, with the mask."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self._with_mask(observation, info), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """As the environment's own, with the mask."""
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
    """How many entries the mask of allowed actions has.

    Raises:
        SpaceError: actions that can't be masked.
    """
    if isinstance(action_space, spaces.Discrete):
        return int(action_space.n)
    if isinstance(action_space, spaces.MultiDiscrete):
        return int(np.sum(action_space.nvec))
    raise SpaceError(f"actions of {action_space} cannot be masked, expected Discrete or MultiDiscrete")


def masked_space(observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> spaces.Dict:
    """The space of observations that show the mask of allowed actions."""
    mask = spaces.MultiBinary(mask_length(action_space))
    return spaces.Dict({"observation": observation_space, "action_mask": mask})


def with_mask(env: gym.Env[Any, Any], source: MaskSource) -> gym.Env[Any, Any]:
    """The environment, its mask made a part of the observation if it has one."""
    return env if source is None else ActionMaskObservation(env, source)


def has_own_mask(observation_space: gym.Space[Any]) -> bool:
    """Whether the observations show a mask by themselves."""
    return isinstance(observation_space, spaces.Dict) and "action_mask" in observation_space.spaces
