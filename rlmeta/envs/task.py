"""Tasks: environments of a single problem, and families, distributions over such problems."""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.envs.families import NamedFamily
from rlmeta.envs.families import from_table as named_family
from rlmeta.envs.gymnasium import protocols
from rlmeta.envs.gymnasium.rows import WORKER_TIMEOUT, require_timeout
from rlmeta.envs.gymnasium.sources import ENVPOOL, evaluation_settings, is_envpool, is_multi_agent
from rlmeta.envs.names import read_named
from rlmeta.envs.native import NATIVE, NativeEnv, NativeWorld, TrialWorld
from rlmeta.envs.task_families import Split, task_keys
from rlmeta.envs.world import World
from rlmeta.errors import SettingError, require_choice, require_count, unknown_name
from rlmeta.functional import random

Mode = Literal["sync", "async"]


@dataclass(frozen=True)
class Task:
    """Reinforcement-learning task, which creates the environments of any number of learners.

    `source` is a native environment, a gymnasium id, `envpool:NAME`, `atari:NAME`, `minigrid:NAME`, an EnvSpec, or a
    factory of an environment or VectorEnv (a factory, because a run needs separate environments for training and
    evaluation).
    """

    name: str
    source: Any
    settings: dict[str, Any] = field(default_factory=dict)
    """Constants of a native environment, or keyword arguments of a gymnasium environment."""
    mode: Mode = "sync"
    """Whether gymnasium environments run in this process or in worker processes."""
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Ranges of a native environment's constants, drawn uniformly in every environment at every reset or trial."""
    max_episode_steps: int | None = None
    """Time limit of a factory's environments; others take it as a setting."""
    worker_timeout: float = WORKER_TIMEOUT
    """Seconds that a call of an environment in a worker process may take before the run fails."""
    episodes: int = 1
    """Number of episodes of a native environment in a trial, which is one episode to the agent; see `trials`."""

    def __post_init__(self) -> None:
        require_choice("mode", self.mode, Mode)
        require_count("episodes", self.episodes)
        if self.episodes > 1 and not self.native:
            raise SettingError(
                f"task {self.name!r} has trials of {self.episodes} episodes, which need a native environment: "
                "`rlmeta list tasks` shows them, envs/my_native_env.py how to write one"
            )
        if self.ranges:
            check_ranges(f"task {self.name!r}", self.source, self.ranges)
        if self.max_episode_steps is not None:
            require_count("max_episode_steps", self.max_episode_steps)
        require_timeout(self.worker_timeout)

    def world(self, learner_shape: tuple[int, ...], num_envs: int) -> World:
        """Create the environments `[*L, N]`."""
        if isinstance(self.source, NativeEnv):
            physics = self._redraw if self.ranges else None
            if self.episodes > 1:
                return TrialWorld(self.source, learner_shape, num_envs, physics, episodes=self.episodes)
            return NativeWorld(self.source, learner_shape, num_envs, physics)
        from rlmeta.envs.gymnasium.world import GymnasiumWorld

        return GymnasiumWorld(
            self.source,
            learner_shape,
            num_envs,
            mode=self.mode,
            settings=self.settings,
            max_episode_steps=self.max_episode_steps,
            worker_timeout=self.worker_timeout,
        )

    def _redraw(self, key: Tensor) -> dict[str, Tensor]:
        return draw_constants(key, "physics", self.source, self.ranges)

    def evaluated(self) -> Task:
        """The task as it is evaluated: whole episodes and their own rewards, without what helps training (Atari's
        lives)."""
        settings = evaluation_settings(self.source, self.settings)
        return self if settings == self.settings else dataclasses.replace(self, settings=settings)

    @property
    def native(self) -> bool:
        """Whether the environments are native: rlmeta's own, in torch."""
        return isinstance(self.source, NativeEnv)

    def describe(self) -> dict[str, Any]:
        """Serialisable description from which the task can be created again; user code is named, never stored."""
        source = self.source if isinstance(self.source, str) else getattr(self.source, "id", None)
        owner = type(self.source) if self.native else self.source
        described = {
            "name": self.name,
            "source": source or f"{getattr(owner, '__module__', '?')}:{getattr(owner, '__qualname__', '?')}",
            "settings": dict(self.settings),
            "mode": self.mode,
            "ranges": {name: list(bounds) for name, bounds in self.ranges.items()},
        }
        if self.native:
            described["constants"] = _plain_constants(self.source)
        if self.max_episode_steps is not None:
            described["max_episode_steps"] = self.max_episode_steps
        if self.episodes > 1:
            described["episodes"] = self.episodes
        if self.worker_timeout != WORKER_TIMEOUT:
            described["worker_timeout"] = self.worker_timeout
        return described


def check_ranges(where: str, source: Any, ranges: Any) -> None:
    """Validate ranges of a native environment's constants.

    Raises:
        SettingError: the environment is not native or has no such constant; a range is not two finite numbers in order.
    """
    if not isinstance(source, NativeEnv):
        shown = source if isinstance(source, str) else getattr(source, "id", getattr(source, "__name__", source))
        raise SettingError(
            f"{where} draws constants of a native environment, {shown!r} is gymnasium's: `rlmeta list tasks` shows the "
            "native ones, envs/my_native_env.py how to write one"
        )
    if not isinstance(ranges, dict):
        raise SettingError(f"{where}: ranges are {ranges!r}, expected a dictionary such as {{'gravity': (9.0, 11.0)}}")
    constants, hints = [f.name for f in dataclasses.fields(source)], _hints(type(source))  # type: ignore[arg-type]
    for constant, bounds in ranges.items():
        if constant not in constants:
            raise SettingError(f"{where}: {unknown_name('constant', constant, constants)}")
        if not _fits(bounds, Sequence[float]) or len(bounds) != 2:
            raise SettingError(f"{where}: the range of {constant} is {bounds!r}, expected [low, high]")
        low, high = bounds
        if not -math.inf < low <= high < math.inf:
            raise SettingError(
                f"{where}: the range of {constant} is {bounds!r}, expected finite numbers, the lower first"
            )
        if hints.get(constant, float) not in (float, Sequence[float]):
            raise SettingError(
                f"{where}: constant {constant} is {_in_words(hints[constant])}, expected a number to draw from a range"
            )


def draw_constants(
    key: Tensor, stream: str, env: NativeEnv, ranges: dict[str, tuple[float, float]]
) -> dict[str, Tensor]:
    """Draw constants uniformly from their ranges.

    Args:
        key: random keys `[*L, ...]`, one for each draw.
        stream: name of the random stream.
        env: the environment with these constants.
        ranges: `{name: (low, high)}`.

    Returns:
        `{name: [*L, ...]}` float64, or `[*L, ..., entries]` for a constant that is a list.
    """
    shapes = {name: env.constants()[name].shape for name in ranges}
    draws = random.uniform(key, stream, 0, (sum(shape.numel() for shape in shapes.values()),), torch.float64)
    parts = dict(zip(ranges, torch.split(draws, [shape.numel() for shape in shapes.values()], -1)))
    return {
        name: (low + (high - low) * parts[name]).reshape(*key.shape, *shapes[name])
        for name, (low, high) in ranges.items()
    }


def _plain_constants(env: NativeEnv) -> dict[str, Any]:
    """Collect the constants that differ from the default and are numbers, lists of them, booleans or text."""
    fields = {f.name: f.default for f in dataclasses.fields(env)}  # type: ignore[arg-type]
    values = {name: getattr(env, name) for name in fields}
    return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items() if _is_plain(v) and v != fields[n]}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(each, int | float) for each in value)
    return isinstance(value, bool | int | float | str)


@dataclass(frozen=True)
class TaskFamily:
    """Family of tasks: a native environment with constants drawn from ranges (domain randomisation).

    An agent trains on it directly, with constants redrawn at every reset; a meta-learner draws tasks with fixed ones.
    """

    name: str
    base: Task
    ranges: dict[str, tuple[float, float]]
    """Range of each constant; if it is a list, of every entry."""
    episodes: int = 1
    """Number of episodes in a trial, for an agent that learns the family as one task; see `trials`."""

    def __post_init__(self) -> None:
        if not isinstance(self.base, Task):
            raise SettingError(
                f"family {self.name!r}: its base is {self.base!r}, expected a task, such as rl.task(...)"
            )
        check_ranges(f"family {self.name!r}", self.base.source, self.ranges)

    def sample(self, key: Tensor) -> dict[str, Tensor]:
        """Draw the constants of a task for every learner, `{name: [*L]}` float64, or `[*L, entries]` for a list."""
        return draw_constants(key, "family", self.base.source, self.ranges)

    def world(self, physics: dict[str, Tensor], learner_shape: tuple[int, ...], num_envs: int) -> World:
        """Create environments `[*L, N]` with the constants of each learner, as drawn by `sample`."""
        axes = len(learner_shape)
        rows = {
            name: value.unsqueeze(axes).expand(*learner_shape, num_envs, *value.shape[axes:])
            for name, value in physics.items()
        }
        return NativeWorld(self.base.source, learner_shape, num_envs, rows)

    @property
    def observation_space(self) -> gym.Space:
        """Observation space of every task."""
        return self.base.source.observation_space

    @property
    def action_space(self) -> gym.Space:
        """Action space of every task."""
        return self.base.source.action_space

    def tasks(self, key: Tensor, counter: int | Tensor, count: int, split: Split) -> dict[str, Tensor]:
        """Draw the constants of K = `count` tasks for every learner, `{name: [*L, K]}`, for a meta-learner."""
        return self.sample(task_keys(key, counter, count, split))

    def task(self) -> Task:
        """Task with constants that are redrawn at every reset, or for every trial."""
        return dataclasses.replace(self.base, name=self.name, ranges=self.ranges, episodes=self.episodes)


def task(
    source: str | gym.envs.registration.EnvSpec | Callable[[], Any] | NativeEnv,
    *,
    name: str | None = None,
    settings: dict[str, Any] | None = None,
    mode: Mode = "sync",
    native: bool = True,
    max_episode_steps: int | None = None,
    worker_timeout: float = WORKER_TIMEOUT,
) -> Task:
    """Create a task from a name, a gymnasium id, an EnvSpec, a factory, or a native environment.

    Args:
        source: a name (`rlmeta list`), a gymnasium id such as `LunarLander-v3` or `mypkg:MyEnv-v0`, `envpool:Pong-v5`
            of EnvPool, `atari:Pong-v5` or `minigrid:DoorKey-5x5-v0` by their protocols, an EnvSpec, a function that
            returns an environment or a VectorEnv, or a native environment.
        name: of the task; by default derived from the source.
        settings: constants of a native environment, or keyword arguments of a gymnasium environment.
        mode: "async" runs gymnasium environments in worker processes.
        native: use rlmeta's own batched environment if there is one with this id; False takes gymnasium's.
        max_episode_steps: time limit of an episode; None leaves it to the environment. Without any limit episodes may
            never end in training; evaluation and `record` truncate them after 10,000 steps, with a warning.
        worker_timeout: with "async", seconds that a call of an environment may take before the run fails; a warning
            names a slow environment after 30 s or a twentieth of this time.

    Raises:
        UnknownNameError: nothing has this name; the nearest names are listed.
        SettingError: an environment instance (every learner needs its own), an environment of several agents, or a
            setting that does not exist.
    """
    require_choice("mode", mode, Mode)
    settings = dict(settings or {})
    if isinstance(source, type) and issubclass(source, NativeEnv):
        source = source()
    if isinstance(source, NativeEnv | str | gym.envs.registration.EnvSpec):
        settings = _with_limit(settings, max_episode_steps)
    else:
        _check_source(source)
        name = name or getattr(source, "__name__", "env").replace("<lambda>", "custom")
        return Task(name, source, settings, mode, {}, max_episode_steps, worker_timeout)
    if isinstance(source, NativeEnv):
        return Task(name or type(source).__name__, _with_constants(source, settings), settings)
    if isinstance(source, str):
        return dataclasses.replace(
            _named(source, name or source, settings, mode, native), worker_timeout=worker_timeout
        )
    return Task(name or source.id, source, settings, mode, worker_timeout=worker_timeout)


def trials(problem: str | Task | TaskFamily, *, episodes: int) -> Task:
    """Create a task of trials: several episodes in a row of the same draw from a family (RL², Duan et al., 2016).

    A recurrent agent learns within a trial by its memory. To the agent a trial is one episode: its memory is kept, and
    rewards of later episodes count for earlier actions. Records and evaluations score every episode.

    Args:
        problem: a family of a native environment's constants, a native task, or the name of either.
        episodes: number of episodes in a trial.

    Raises:
        SettingError: the problem is no native task or family of such tasks, or `episodes` is less than 1.
    """
    base = problem.task() if isinstance(problem, TaskFamily) else task(problem) if isinstance(problem, str) else problem
    if not isinstance(base, Task):
        raise SettingError(f"trials of {problem!r}: expected a family of environments, a native task, or a name of one")
    return dataclasses.replace(base, name=f"{base.name} x {episodes}", episodes=episodes)


def _with_limit(settings: dict[str, Any], steps: int | None) -> dict[str, Any]:
    """Add the time limit of episodes to settings, as native environments, ids and EnvPool names take it."""
    if steps is None:
        return settings
    require_count("max_episode_steps", steps)
    if settings.get("max_episode_steps", steps) != steps:
        raise SettingError(
            f"max_episode_steps is {steps}, and {settings['max_episode_steps']!r} in the settings: give it once"
        )
    return {**settings, "max_episode_steps": steps}


def _check_source(source: Any) -> None:
    """Refuse sources that are no factory, environment instances above all; the message names what to pass instead."""
    if isinstance(source, gym.Env | gym.vector.VectorEnv):
        raise SettingError(f"a task can't be {_instance_message(source)}")
    if not isinstance(source, type) and is_multi_agent(source):
        raise SettingError(
            f"a task can't be {type(source).__name__}: environments of several agents, such as PettingZoo's, are not "
            "supported"
        )
    if isinstance(source, list | tuple):
        kind = type(source).__name__
        raise SettingError(f"a task can't be of type {kind}: rl.stream([...]) creates a stream of tasks")
    if not callable(source):
        raise SettingError(
            f"a task can't be {source!r}, expected a name (`rlmeta list tasks`), a gymnasium id, an EnvSpec, a native "
            "environment, or a function that returns an environment"
        )


def _instance_message(env: Any) -> str:
    """Write the message about an environment instance: why learners cannot share it, what to pass instead."""
    vector, spec = isinstance(env, gym.vector.VectorEnv), env.spec
    identifier = spec.id if isinstance(spec, gym.envs.registration.EnvSpec) else None
    what = f"the {'vector ' if vector else ''}environment {identifier or type(env.unwrapped).__name__}"
    if is_envpool(env.unwrapped):
        return f"{what}, which has its seeds already: name it, rl.task('{ENVPOOL}...-v1')"
    named = identifier if identifier in gym.registry or identifier in NATIVE else None
    maker = f"gym.make_vec({named!r}, num_envs=num_envs)" if vector else f"gym.make({named!r})"
    function = f"rl.task({'lambda num_envs' if vector else 'lambda'}: {maker if named else '...'})"
    ways = ([f"its name, rl.task({named!r})"] if named else []) + [f"a function that makes one, {function}"]
    return f"{what}, which is made already, and every learner needs its own: give {', or '.join(ways)}"


def _named(source: str, name: str, settings: dict[str, Any], mode: Mode, native: bool) -> Task:
    table = read_named("envs", source)
    if table is not None:
        if table.get("kind") == "stream":
            raise SettingError(f"{source!r} is a stream of tasks, expected one task: use rl.stream({source!r})")
        described = from_table(source, table)
        resolved = described.task() if isinstance(described, TaskFamily) else described
        if settings:
            again = task(resolved.source, name=name, settings={**resolved.settings, **settings})
            resolved = dataclasses.replace(again, ranges=resolved.ranges, episodes=resolved.episodes)
        return dataclasses.replace(resolved, mode=mode)
    if native and source in NATIVE:
        return Task(name, _with_constants(NATIVE[source], settings), settings)
    if ":" not in source and source not in gym.registry:
        protocols.import_registering(source, source)
        if source.startswith("rlmeta/"):
            from rlmeta.envs.native import register  # noqa: F401 - registers the ids
        if source not in gym.registry and not _has_version(source):
            raise unknown_name("task", source, known_tasks())
    return Task(name, source, settings, mode)


def _has_version(source: str) -> bool:
    """Whether gymnasium resolves an id without version (`CartPole` is its newest version)."""
    try:
        gym.spec(source)
    except gym.error.Error:
        return False
    return True


def _with_constants(env: NativeEnv, settings: dict[str, Any]) -> NativeEnv:
    known, owner = [f.name for f in dataclasses.fields(env)], type(env).__name__  # type: ignore[arg-type]
    hints = _hints(type(env)) if settings else {}
    for name, value in settings.items():
        if name not in known:
            raise SettingError(str(unknown_name(f"constant of {owner}", name, known)))
        if not _fits(value, hints.get(name, Any)):
            raise SettingError(f"constant {name} of {owner} is {value!r}, expected {_in_words(hints[name])}")
    return dataclasses.replace(env, **settings)  # type: ignore[type-var]


def _hints(cls: type) -> dict[str, Any]:
    """Resolve the types of a class's fields; empty if a user's class names a type for type checkers alone."""
    try:
        return get_type_hints(cls)
    except NameError:
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; types other than numbers, booleans, text and sequences of them are not checked."""
    if hint in (float, int):
        return isinstance(value, Real if hint is float else Integral) and not isinstance(value, bool)
    if hint in (bool, str, type(None)):
        return isinstance(value, hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in arguments)
    if origin is Literal:
        return isinstance(value, str | int | None) and value in arguments
    if origin is collections.abc.Sequence:
        if isinstance(value, list | tuple):
            return all(_fits(part, arguments[0]) for part in value)
        return isinstance(value, Iterable) and not isinstance(value, str)
    return True


def _in_words(hint: Any) -> str:
    """Describe a type for an error message."""
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "None"}
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_in_words(part) for part in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin is collections.abc.Sequence:
        several = {float: "numbers", int: "whole numbers", str: "texts"}
        return f"a list of {several.get(arguments[0], arguments[0])}"
    return words.get(hint) or str(hint)


def from_table(name: str, table: dict[str, Any]) -> Task | TaskFamily:
    """Create a task or family from a TOML table.

    Keys: `kind` ("task" or "family"), `env`, `settings`, and for a family `ranges` (name = [low, high]) and `episodes`
    (of a trial).

    Raises:
        SettingError: the kind or a key is unknown, or the ranges do not fit the environment.
    """
    kinds = {"task": {"env", "settings"}, "family": {"env", "settings", "ranges", "episodes"}}
    kind = table.get("kind", "task")
    if kind not in kinds:
        raise SettingError(f"envs/{name}.toml: kind is {kind!r}, expected one of {', '.join([*kinds, 'stream'])}")
    unknown = set(table) - kinds[kind] - {"kind", "description", "threshold"}
    if unknown:
        raise SettingError(f"envs/{name}.toml: {unknown_name('key', min(unknown), kinds[kind])}")
    base = task(table["env"], name=name, settings=table.get("settings"))
    if kind == "task":
        return base
    check_ranges(f"envs/{name}.toml", base.source, table["ranges"])
    ranges = {k: (float(low), float(high)) for k, (low, high) in table["ranges"].items()}
    return TaskFamily(name, base, ranges, table.get("episodes", 1))


def family(name: str, settings: dict[str, Any] | None = None) -> TaskFamily | NamedFamily:
    """Create a family from its name: of environments, or of supervised or optimisation tasks with these settings."""
    if not isinstance(name, str):
        raise SettingError(f"family is {name!r}, expected a name; pass a family of your own to train directly")
    table = require_named(name)
    if "family" in table:
        return named_family(name, table, settings)
    created = from_table(name, table) if table.get("kind") == "family" else None
    if not isinstance(created, TaskFamily):
        raise SettingError(f"{name!r} is a {table.get('kind', 'task')}, expected a family of tasks")
    return created


def is_data_family(name: str) -> bool:
    """Whether a name is that of a family of supervised or optimisation tasks."""
    return "family" in (read_named("envs", name) or {})


def require_named(name: str) -> dict[str, Any]:
    """Read the TOML table of a family or stream.

    Raises:
        UnknownNameError: nothing has this name; the nearest names are listed.
    """
    table = read_named("envs", name)
    if table is None:
        from rlmeta.envs.names import names

        raise unknown_name("family or stream", name, names("envs"))
    return table


def known_tasks() -> list[str]:
    """List every name that `task` resolves: of TOML files, native environments, and gymnasium ids."""
    from rlmeta.envs.names import names

    return sorted({*names("envs"), *NATIVE, *(str(spec) for spec in gym.registry)})
