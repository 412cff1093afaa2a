"""User code named as `package.module:name`: agents, environments, streams, families, networks, methods, populations.

A run folder names such code and never loads it by itself: to load the run, the user gives the names again, or allows
the modules (`rlmeta.envs.trusted`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym

from rlmeta.agents.agent import NetworkFactory
from rlmeta.envs import trusted, user_modules
from rlmeta.envs.gymnasium.sources import has_prefix
from rlmeta.envs.kinds import is_problem
from rlmeta.envs.native import NativeEnv
from rlmeta.errors import SettingError, unknown_name
from rlmeta.learning.method import Method
from rlmeta.learning.populations import Population
from rlmeta.learning.settings import check_names, per_learner_names
from rlmeta.runs import folder as run_folder
from rlmeta.runs import grammar
from rlmeta.runs.configuration import methods_again
from rlmeta.runs.objects import load_module, load_object
from rlmeta.runs.populations import POPULATIONS
from rlmeta.runs.shipped import AGENTS, METHODS, agent_class

# ---------------------------------------------------------------------- modules


def user_names(text: str | None) -> list[str]:
    """Names of user code, `package.module:Name`, in a text joined by commas or +; rlmeta's and extras' are left out."""
    names = [name.strip() for name in re.split(r"[,+]", text or "")]
    users = [name for name in names if ":" in name and not name.startswith("rlmeta.")]
    return [name for name in users if _module(name) not in trusted.EXTRAS]


def modules_of(text: str | None) -> list[str]:
    """Modules of the user code that a text names."""
    return [_module(name) for name in user_names(text)]


def _module(name: str) -> str:
    return name.rpartition(":")[0]


def names_in(text: str) -> list[str]:
    """Split names joined by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


@contextlib.contextmanager
def allowed_here(modules: Iterable[str], names: Sequence[str] = ()) -> Iterator[None]:
    """Allow files to name user code of these modules, or these single names, also from the current folder.

    Raises:
        SettingError: `modules` are not names of modules.
    """
    module_names = [modules] if isinstance(modules, str) else list(modules)
    with trusted.allowing(module_names, names):
        for module in (*module_names, *map(_module, names)):
            user_modules.allow(module)
        yield


# ---------------------------------------------------------------------- problems


def source_of(name: str, settings: Mapping[str, Any]) -> Any:
    """Resolve a problem's name on the command line: the user's object if it names one, else the name itself."""
    return user_problem(load_object(name), settings, name) if _is_object(name) else name


def _is_object(name: str) -> bool:
    """Whether a name is that of an object in a user's module.

    Other names are rlmeta's, gymnasium's, EnvPool's, a protocol's, or ids that the module has registered.

    Raises:
        SettingError: there is no such module, or neither such an object in it nor such an id.
    """
    module, colon, attribute = name.partition(":")
    if not colon or has_prefix(name):
        return False
    there = hasattr(load_module(module), attribute)  # importing it registers its ids
    identifies = attribute in gym.registry or re.search(r"-v\d+$", attribute) is not None
    return there or not identifies


def user_problem(loaded: Any, settings: Mapping[str, Any], name: str) -> Any:
    """The user's problem: an environment factory stays as it is, a factory of a stream or family is called.

    Only a call shows whether a function creates an environment, a stream or a family, so it is called once, with the
    settings as arguments.

    Raises:
        SettingError: settings for a problem that has its own, or that a family does not take.
    """
    if isinstance(loaded, type):
        if issubclass(loaded, NativeEnv):
            return loaded()
        return _called(loaded, settings, name) if is_problem(loaded) else loaded
    created = loaded
    if isinstance(loaded, types.FunctionType | functools.partial):
        created = _called(loaded, settings, name)
        if not is_problem(created):
            getattr(created, "close", lambda: None)()  # it is an environment
            return loaded
    if is_problem(created) and settings:
        raise SettingError(f"--env.{next(iter(settings))}: {name!r} already has its settings, leave the flag out")
    return created


def _called(factory: Any, settings: Mapping[str, Any], name: str) -> Any:
    try:
        inspect.signature(factory).bind(**settings)
    except TypeError as error:
        raise SettingError(f"{name} takes other settings: {error}") from None
    return factory(**settings)


def user_env(folder: Path, name: str | None) -> Any:
    """Load the user's environment, stream or family of a saved run, with its saved settings; None for no name."""
    if name is None:
        return None
    if not _is_object(name):
        return name
    loaded, saved = load_object(name), run_folder.read_config(folder).get("task", {})
    if isinstance(loaded, type) and issubclass(loaded, NativeEnv):
        return loaded(**saved.get("constants", {}))
    if saved.get("kind") in ("stream", "family", "data"):
        return user_problem(loaded, saved.get("settings", {}) if isinstance(loaded, type) else {}, name)
    return loaded


def user_agent(name: str | None) -> type | None:
    """Load an agent's settings class by name; None for no name."""
    return None if name is None else agent_class(name)


def own_class(settings: Any) -> type | None:
    """The class of settings, or of a learner's settings within them, if it is user code; else None."""
    classes = [type(owner) for owner in (settings, getattr(settings, "learner", None)) if owner is not None]
    return next((cls for cls in classes if cls not in AGENTS.values()), None)


def user_network(name: str | None) -> NetworkFactory | None:
    """Load a network factory by name; None for no name."""
    return None if name is None else load_object(name)


# ---------------------------------------------------------------------- lifelong methods


def method_named(name: str) -> Any:
    """Look up a lifelong method by name: the class, or a class or instance in user code, `package.module:name`.

    Raises:
        UnknownNameError: there is no such method.
        SettingError: no such module or name, or the object is not a method.
    """
    if ":" not in name:
        if name not in METHODS:
            raise unknown_name("lifelong method", name, [*METHODS, "package.module:MyMethod"])
        return METHODS[name]
    method = load_object(name)
    if not isinstance(method, Method) and not (isinstance(method, type) and issubclass(method, Method)):
        raise SettingError(f"--lifelong: {name} is {method!r}, expected a class that extends rlmeta's Method")
    return method


def methods_named(text: str) -> list[Any]:
    """Look up lifelong methods by their names, joined by commas."""
    return [method_named(name) for name in names_in(text)]


def build_method(method: Any, settings: Mapping[str, Any]) -> Method:
    """Build a lifelong method from its class and settings of the command line; an instance takes no settings.

    Raises:
        SettingError: it has no such setting, or a value is malformed.
    """
    name: str = method.name
    if isinstance(method, type) and dataclasses.is_dataclass(method):
        cls: Any = method
        built: Method = cls(**_parsed(cls, name, settings))
        return built
    _refuse_settings(name, settings)
    return method if isinstance(method, Method) else method()


def _refuse_settings(name: str, settings: Mapping[str, Any]) -> None:
    if settings:
        raise SettingError(f"--{name}.{next(iter(settings))}: {name} has no settings here, leave the flag out")


def _parsed(cls: Any, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the dotted flags `--NAME.SETTING` of a method's or reward's class.

    Raises:
        SettingError: it has no such setting, or a value is malformed.
    """
    check_names(cls, dict(settings), f"--{name}")
    values: dict[str, Any] = {}
    for key, value in settings.items():
        parsed = grammar.values(cls, key, grammar.text_of(value), where := f"--{name}.{key.replace('_', '-')}")
        if len(parsed) > 1 and key not in per_learner_names(cls):
            raise SettingError(f"{where} is {value!r}, expected one value: learners of one batch share it")
        values[key] = parsed if len(parsed) > 1 else parsed[0]
    return values


# ---------------------------------------------------------------------- rewards


def rewards_named(text: str | None) -> list[Any]:
    """Load the classes or rewards of names `package.module:Name` joined by + or commas; none for `none`."""
    names = [name.strip() for name in re.split(r"[,+]", text or "")]
    return [load_object(name) for name in names if name not in ("", "none")]


def reward_names(text: str | None) -> list[str]:
    """Names of the rewards that a text names, whose settings are `--NAME.SETTING` on the command line."""
    names = [getattr(reward, "name", None) for reward in rewards_named(text)]
    return [name for name in names if isinstance(name, str)]


def with_reward_settings(settings: Any, of_rewards: Mapping[str, Mapping[str, Any]]) -> Any:
    """An agent's settings whose rewards take settings of the command line, by reward.

    Raises:
        SettingError: a reward has no such setting, or a value is malformed.
    """
    if not of_rewards:
        return settings
    rewards = [_with_settings(reward, of_rewards.get(reward.name, {})) for reward in settings.rewards]
    return dataclasses.replace(settings, rewards=tuple(rewards))


def _with_settings(reward: Any, settings: Mapping[str, Any]) -> Any:
    name: str = reward.name
    if dataclasses.is_dataclass(reward):
        return dataclasses.replace(reward, **_parsed(type(reward), name, settings))  # type: ignore[type-var]
    _refuse_settings(name, settings)
    return reward


# ---------------------------------------------------------------------- populations


def population_class(name: str) -> Any:
    """Look up a population's class by name: rlmeta's, or user code `package.module:Name`.

    Raises:
        UnknownNameError, SettingError: there is no such population.
    """
    if ":" in name:
        return load_object(name)
    if name not in POPULATIONS:
        raise unknown_name("population", name, [*POPULATIONS, "package.module:MyPopulation"])
    return POPULATIONS[name]


def population_named(name: str, settings: Mapping[str, Any] | None = None) -> Population:
    """Build a population by name, with settings from the command line."""
    cls = population_class(name)
    check_names(cls, dict(settings or {}), f"--{cls.name}")
    texts = {key: grammar.text_of(value) for key, value in (settings or {}).items()}
    population: Population = grammar.build(cls, texts)
    return population


def user_methods(folder: Path, text: str) -> tuple[Method, ...]:
    """Restore a run's lifelong methods with their saved settings, with user code by the names in a text; () for ''."""
    methods = methods_named(text)
    if not methods:
        return ()
    tables = run_folder.read_config(folder).get("methods", [])
    return methods_again(tables, str(folder), {method.name: method for method in methods})
