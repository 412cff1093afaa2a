"""A task is one problem to act in, a family a distribution over such problems."""

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
from rlmeta.envs.gymnasium.rows import WORKER_TIMEOUT, require_timeout
from rlmeta.envs.gymnasium.sources import ENVPOOL, is_envpool, several_agents
from rlmeta.envs.names import read_named
from rlmeta.envs.native import NATIVE, NativeEnv, NativeWorld, TrialWorld
from rlmeta.envs.task_families import Split, task_keys
from rlmeta.envs.world import World
from rlmeta.errors import SettingError, require_choice, require_count, unknown_name
from rlmeta.functional import random

Mode = Literal["sync", "async"]


@dataclass(frozen=True)
class Task:
    """One problem: makes the environments of any number of learners.

    `source` is a native environment, a gymnasium id, `envpool:NAME`, an EnvSpec, a factory of an environment, or a
    factory of a VectorEnv (a factory, because a run needs one set of environments to train in and one to be evaluated
    in).
    """

    name: str
    source: Any
    settings: dict[str, Any] = field(default_factory=dict)
    """Constants of a native environment, or keyword arguments of a gymnasium one."""
    mode: Mode = "sync"
    """Foreign environments in this process, or divided over worker processes."""
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Constants of a native environment drawn uniformly, for every row, at every reset, or for every trial."""
    max_episode_steps: int | None = None
    """Where to cut the episodes that a factory's environments don't end; others take their limit as a setting."""
    worker_timeout: float = WORKER_TIMEOUT
    """Seconds that one call of an environment may take in a worker process, before the run fails and names it."""
    episodes: int = 1
    """Episodes of a native environment that are one trial, and one episode to the agent; see `trials`."""

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
        """The environments `[*L, N]`."""
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
        return drawn(key, "physics", self.source, self.ranges)

    @property
    def native(self) -> bool:
        """Whether the environments are rlmeta's own, in torch."""
        return isinstance(self.source, NativeEnv)

    def describe(self) -> dict[str, Any]:
        """What a saved configuration needs to make the task again; a user's own code is named, never stored."""
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
    """Refuse ranges that no constants of a native environment can be drawn from.

    Raises:
        SettingError: the environment is not native or has no such constant; a range is not two finite numbers in order.
    """
    if not isinstance(source, NativeEnv):
        said = source if isinstance(source, str) else getattr(source, "id", getattr(source, "__name__", source))
        raise SettingError(
            f"{where} draws constants of a native environment, {said!r} is gymnasium's: `rlmeta list tasks` shows the "
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
                f"{where}: constant {constant} is {_said(hints[constant])}, which no range can be drawn of"
            )


def drawn(key: Tensor, stream: str, env: NativeEnv, ranges: dict[str, tuple[float, float]]) -> dict[str, Tensor]:
    """Constants drawn uniformly within their ranges, `[*key]` float64, or `[*key, entries]` where one is a list.

    Args:
        key: one for each draw.
        stream: of the random numbers.
        env: whose constants they are.
        ranges: `{name: (low, high)}`.
    """
    shapes = {name: env.constants()[name].shape for name in ranges}
    draws = random.uniform(key, stream, 0, (sum(shape.numel() for shape in shapes.values()),), torch.float64)
    parts = dict(zip(ranges, torch.split(draws, [shape.numel() for shape in shapes.values()], -1)))
    return {
        name: (low + (high - low) * parts[name]).reshape(*key.shape, *shapes[name])
        for name, (low, high) in ranges.items()
    }


def _plain_constants(env: NativeEnv) -> dict[str, Any]:
    """The constants that are numbers, lists of them, switches or text and not the default."""
    fields = {f.name: f.default for f in dataclasses.fields(env)}  # type: ignore[arg-type]
    values = {name: getattr(env, name) for name in fields}
    return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items() if _is_plain(v) and v != fields[n]}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(each, int | float) for each in value)
    return isinstance(value, bool | int | float | str)


@dataclass(frozen=True)
class TaskFamily:
    """A distribution over tasks: ranges of a native environment's constants.

    Train on it directly (the constants are redrawn at every reset), or draw tasks that keep theirs.
    """

    name: str
    base: Task
    ranges: dict[str, tuple[float, float]]
    """Of a constant that is a list, the range of each of its entries."""
    episodes: int = 1
    """Of a trial, for an agent that learns the family as one task; see `trials`."""

    def __post_init__(self) -> None:
        if not isinstance(self.base, Task):
            raise SettingError(
                f"family {self.name!r}: its base is {self.base!r}, expected a task, such as rl.task(...)"
            )
        check_ranges(f"family {self.name!r}", self.base.source, self.ranges)

    def sample(self, key: Tensor) -> dict[str, Tensor]:
        """The constants of one task for every learner, `{name: [*L]}` float64, or `[*L, entries]` of a list."""
        return drawn(key, "family", self.base.source, self.ranges)

    def world(self, physics: dict[str, Tensor], learner_shape: tuple[int, ...], num_envs: int) -> World:
        """Environments `[*L, N]` in which each learner has the constants that `sample` drew for it."""
        axes = len(learner_shape)
        rows = {
            name: value.unsqueeze(axes).expand(*learner_shape, num_envs, *value.shape[axes:])
            for name, value in physics.items()
        }
        return NativeWorld(self.base.source, learner_shape, num_envs, rows)

    @property
    def observation_space(self) -> gym.Space:
        """Of every task."""
        return self.base.source.observation_space

    @property
    def action_space(self) -> gym.Space:
        """Of every task."""
        return self.base.source.action_space

    def tasks(self, key: Tensor, counter: int | Tensor, count: int, split: Split) -> dict[str, Tensor]:
        """The constants of K = `count` tasks for every learner, `{name: [*L, K]}`, for a meta-learner."""
        return self.sample(task_keys(key, counter, count, split))

    def task(self) -> Task:
        """The task whose constants are redrawn at every reset, or for every trial."""
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
    """A task from a name, a gymnasium id, an EnvSpec, a factory, or a native environment.

    Args:
        source: a name (`rlmeta list`), a gymnasium id such as `LunarLander-v3` or `mypkg:MyEnv-v0`, `envpool:Pong-v5`
            for EnvPool's, an EnvSpec, a function that makes an environment or a VectorEnv, or a native environment.
        name: what to call it; by default derived from the source.
        settings: constants of a native environment, or keyword arguments of a gymnasium one.
        mode: "async" divides foreign environments over worker processes.
        native: use rlmeta's own batched environment where there is one for the id; False takes gymnasium's.
        max_episode_steps: cut episodes after so many steps; None leaves it to the environment. An episode that never
            ends goes on for ever in training; evaluation and `record` cut it after 10,000 steps, and say so.
        worker_timeout: with "async", seconds that one call of an environment may take before the run fails; a warning
            names the environment that is waited for long before, after 30 s or a twentieth of it.

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
    """The task whose episodes are trials: so many episodes in a row of one draw of a family, for an agent that learns
    within them by its memory (RL², Duan et al., 2016).

    To the agent a trial is one episode: its memory stays, and rewards of later episodes count for earlier actions. In
    the records and in evaluations every episode is scored.

    Args:
        problem: a family of a native environment's constants, a native task, or the name of one.
        episodes: of a trial.

    Raises:
        SettingError: it is no native task or family of such tasks, or there is no episode.
    """
    base = problem.task() if isinstance(problem, TaskFamily) else task(problem) if isinstance(problem, str) else problem
    if not isinstance(base, Task):
        raise SettingError(f"trials of {problem!r}: expected a family of environments, a native task, or a name of one")
    return dataclasses.replace(base, name=f"{base.name} x {episodes}", episodes=episodes)


def _with_limit(settings: dict[str, Any], steps: int | None) -> dict[str, Any]:
    """The settings with the limit of episodes, which native environments, ids and EnvPool's names take as one."""
    if steps is None:
        return settings
    require_count("max_episode_steps", steps)
    if settings.get("max_episode_steps", steps) != steps:
        raise SettingError(
            f"max_episode_steps is {steps}, and {settings['max_episode_steps']!r} in the settings: give it once"
        )
    return {**settings, "max_episode_steps": steps}


def _check_source(source: Any) -> None:
    """Refuse what no environment can be made from: one that is made already, above all; the message says what can."""
    if isinstance(source, gym.Env | gym.vector.VectorEnv):
        raise SettingError(f"a task can't be {_made_already(source)}")
    if not isinstance(source, type) and several_agents(source):
        raise SettingError(
            f"a task can't be {type(source).__name__}: environments of several agents, such as PettingZoo's, are not "
            "supported"
        )
    if isinstance(source, list | tuple):
        raise SettingError(f"a task can't be a {type(source).__name__}: rl.stream([...]) makes a stream of tasks")
    if not callable(source):
        raise SettingError(
            f"a task can't be {source!r}, expected a name (`rlmeta list tasks`), a gymnasium id, an EnvSpec, a native "
            "environment, or a function that makes an environment"
        )


def _made_already(env: Any) -> str:
    """An environment, why it is none that learners can share, and what to give instead."""
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
    found = read_named("envs", source)
    if found is not None:
        if found.get("kind") == "stream":
            raise SettingError(f"{source!r} is a stream of tasks, expected one task: use rl.stream({source!r})")
        described = from_table(source, found)
        made = described.task() if isinstance(described, TaskFamily) else described
        if settings:
            again = task(made.source, name=name, settings={**made.settings, **settings})
            made = dataclasses.replace(again, ranges=made.ranges, episodes=made.episodes)
        return dataclasses.replace(made, mode=mode)
    if native and source in NATIVE:
        return Task(name, _with_constants(NATIVE[source], settings), settings)
    if ":" not in source and source not in gym.registry:
        if source.startswith("rlmeta/"):
            from rlmeta.envs.native import register  # noqa: F401 - registers the ids
        if source not in gym.registry and not _has_version(source):
            raise unknown_name("task", source, known_tasks())
    return Task(name, source, settings, mode)


def _has_version(source: str) -> bool:
    """Whether gymnasium itself resolves the id (`CartPole` means the newest version)."""
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
            raise SettingError(f"constant {name} of {owner} is {value!r}, expected {_said(hints[name])}")
    return dataclasses.replace(env, **settings)  # type: ignore[type-var]


def _hints(cls: type) -> dict[str, Any]:
    """The types of the fields; none where a user's class refers to a name that only type checkers see."""
    try:
        return get_type_hints(cls)
    except NameError:
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type; what is no number, switch, text or sequence of those is not looked at."""
    if hint in (float, int):
        return isinstance(value, Real if hint is float else Integral) and not isinstance(value, bool)
    if hint in (bool, str, type(None)):
        return isinstance(value, hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is Literal:
        return isinstance(value, str | int | None) and value in arguments
    if origin is collections.abc.Sequence:
        if isinstance(value, list | tuple):
            return all(_fits(one, arguments[0]) for one in value)
        return isinstance(value, Iterable) and not isinstance(value, str)
    return True


def _said(hint: Any) -> str:
    """The type in words."""
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "None"}
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_said(one) for one in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin is collections.abc.Sequence:
        several = {float: "numbers", int: "whole numbers", str: "texts"}
        return f"a list of {several.get(arguments[0], arguments[0])}"
    return words.get(hint) or str(hint)


def from_table(name: str, table: dict[str, Any]) -> Task | TaskFamily:
    """The task or family that a TOML table describes.

    Keys: `kind` ("task" or "family"), `env`, `settings`, and for a family `ranges` (name = [low, high]) and `episodes`
    (of a trial).
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
    """The named family: of environments' constants, or of supervised and optimisation tasks with these settings."""
    if not isinstance(name, str):
        raise SettingError(f"family is {name!r}, expected a name; a family of your own is passed to train as it is")
    table = require_named(name)
    if "family" in table:
        return named_family(name, table, settings)
    made = from_table(name, table) if table.get("kind") == "family" else None
    if not isinstance(made, TaskFamily):
        raise SettingError(f"{name!r} is a {table.get('kind', 'task')}, expected a family of tasks")
    return made


def is_data_family(name: str) -> bool:
    """Whether a family of supervised or optimisation tasks has this name."""
    return "family" in (read_named("envs", name) or {})


def require_named(name: str) -> dict[str, Any]:
    """The TOML table of a family or stream.

    Raises:
        UnknownNameError: nothing has this name; the nearest names are listed.
    """
    found = read_named("envs", name)
    if found is None:
        from rlmeta.envs.names import names

        raise unknown_name("family or stream", name, names("envs"))
    return found


def known_tasks() -> list[str]:
    """Every name that `task` resolves: the named ones, the native ones, gymnasium's."""
    from rlmeta.envs.names import names

    return sorted({*names("envs"), *NATIVE, *(str(spec) for spec in gym.registry)})
