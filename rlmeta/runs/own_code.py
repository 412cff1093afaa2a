"""What is the user's own and named as `package.module:name`: agents, environments, streams, families,
networks, methods.

A run folder names such code and never loads it by itself: whoever reads the run gives the names again, or allows the
modules (`rlmeta.envs.trusted`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym

from rlmeta.agents.agent import NetworkFactory
from rlmeta.envs import own_folders, trusted
from rlmeta.envs.gymnasium.sources import ENVPOOL
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


def own_names(text: str | None) -> list[str]:
    """The user's names, `package.module:Name`, in a text that joins them by commas or +; none of rlmeta's or extras."""
    found = [one.strip() for one in re.split(r"[,+]", text or "")]
    return [one for one in found if ":" in one and not one.startswith("rlmeta.") and _module(one) not in trusted.EXTRAS]


def modules_of(text: str | None) -> list[str]:
    """The modules of the user's names in a text."""
    return [_module(one) for one in own_names(text)]


def _module(name: str) -> str:
    return name.rpartition(":")[0]


def names_in(text: str) -> list[str]:
    """The names joined by commas."""
    return [one.strip() for one in text.split(",") if one.strip()]


@contextlib.contextmanager
def allowed_here(modules: Iterable[str], names: Sequence[str] = ()) -> Iterator[None]:
    """Within, files may name what the words of a command name: modules, and single names; the current folder may have
    them.

    Raises:
        SettingError: what is given are no names of modules.
    """
    given = [modules] if isinstance(modules, str) else list(modules)
    with trusted.allowing(given, names):
        for module in (*given, *map(_module, names)):
            own_folders.allow(module)
        yield


# ---------------------------------------------------------------------- problems


def source_of(name: str, settings: Mapping[str, Any]) -> Any:
    """What a problem's name on the command line stands for: the user's object where it is one, else the name itself."""
    return made(load_object(name), settings, name) if _is_object(name) else name


def _is_object(name: str) -> bool:
    """Whether it names an object in a module; else it is rlmeta's, gymnasium's, EnvPool's, or an id that the module has
    registered with gymnasium.

    Raises:
        SettingError: there is no such module, or neither such an object in it nor such an id.
    """
    module, colon, attribute = name.partition(":")
    if not colon or name.startswith(ENVPOOL):
        return False
    there = hasattr(load_module(module), attribute)  # importing it registers its ids
    identifies = attribute in gym.registry or re.search(r"-v\d+$", attribute) is not None
    return there or not identifies


def made(found: Any, settings: Mapping[str, Any], name: str) -> Any:
    """The user's object; a stream or family in place of the function or class that makes it.

    Whether a function makes an environment, a stream or a family shows only when it is called, so it is, once.

    Raises:
        SettingError: settings for a problem that has its own, or that a family does not take.
    """
    if isinstance(found, type):
        if issubclass(found, NativeEnv):
            return found()
        return _called(found, settings, name) if is_problem(found) else found
    problem = found
    if isinstance(found, types.FunctionType | functools.partial):
        problem = _called(found, settings, name)
        if not is_problem(problem):
            getattr(problem, "close", lambda: None)()  # an environment
            return found
    if is_problem(problem) and settings:
        raise SettingError(f"--env.{next(iter(settings))}: {name!r} has its settings made already")
    return problem


def _called(found: Any, settings: Mapping[str, Any], name: str) -> Any:
    try:
        inspect.signature(found).bind(**settings)
    except TypeError as error:
        raise SettingError(f"{name} takes other settings: {error}") from None
    return found(**settings)


def env_again(folder: Path, name: str | None) -> Any:
    """The user's environment, stream or family that a run had, with the settings it had there; None for no name."""
    if name is None:
        return None
    if not _is_object(name):
        return name
    found, had = load_object(name), run_folder.read_config(folder).get("task", {})
    if isinstance(found, type) and issubclass(found, NativeEnv):
        return found(**had.get("constants", {}))
    if had.get("kind") in ("stream", "family", "data"):
        return made(found, had.get("settings", {}) if isinstance(found, type) else {}, name)
    return found


def agent_again(name: str | None) -> type | None:
    """The settings class of a name."""
    return None if name is None else agent_class(name)


def own_class(settings: Any) -> type | None:
    """The class of the settings, or of those of a learner within them, where it is the user's own."""
    classes = [type(one) for one in (settings, getattr(settings, "learner", None)) if one is not None]
    return next((cls for cls in classes if cls not in AGENTS.values()), None)


def network_again(name: str | None) -> NetworkFactory | None:
    """The network factory of a name."""
    return None if name is None else load_object(name)


# ---------------------------------------------------------------------- lifelong methods


def method_named(name: str) -> Any:
    """The class of a lifelong method, or the user's own class or instance where the name is `package.module:name`.

    Raises:
        UnknownNameError: there is no such method.
        SettingError: no such module or name, or what it names is no method.
    """
    if ":" not in name:
        if name not in METHODS:
            raise unknown_name("lifelong method", name, [*METHODS, "package.module:MyMethod"])
        return METHODS[name]
    found = load_object(name)
    if not isinstance(found, Method) and not (isinstance(found, type) and issubclass(found, Method)):
        raise SettingError(f"--lifelong: {name} is {found!r}, expected a class that extends rlmeta's Method")
    return found


def methods_named(text: str) -> list[Any]:
    """The methods of the names joined by commas."""
    return [method_named(name) for name in names_in(text)]


def made_method(found: Any, settings: Mapping[str, Any]) -> Method:
    """A lifelong method with these settings, given as the command line's; a comma compares, as in the agent's.

    Raises:
        SettingError: it has no such setting, or the setting no such value.
    """
    name = found.name
    if isinstance(found, Method) or not hasattr(found, "__dataclass_fields__"):
        if settings:
            raise SettingError(f"--{name}.{next(iter(settings))}: {name} has no settings, or they are made already")
        return found if isinstance(found, Method) else found()
    check_names(found, dict(settings), f"--{name}")
    values: dict[str, Any] = {}
    for key, value in settings.items():
        given = grammar.values(found, key, grammar.text_of(value), where := f"--{name}.{key.replace('_', '-')}")
        if len(given) > 1 and key not in per_learner_names(found):
            raise SettingError(f"{where} is {value!r}, expected one value: learners of one batch share it")
        values[key] = given if len(given) > 1 else given[0]
    one: Method = found(**values)
    return one


def population_class(name: str) -> Any:
    """The class of a population's name, or of the user's own, `package.module:Name`.

    Raises:
        UnknownNameError, SettingError: there is none.
    """
    if ":" in name:
        return load_object(name)
    if name not in POPULATIONS:
        raise unknown_name("population", name, [*POPULATIONS, "package.module:MyPopulation"])
    return POPULATIONS[name]


def population_named(name: str, settings: Mapping[str, Any] | None = None) -> Population:
    """A population with these settings, given as the command line's."""
    cls = population_class(name)
    check_names(cls, dict(settings or {}), f"--{cls.name}")
    texts = {key: grammar.text_of(value) for key, value in (settings or {}).items()}
    population: Population = grammar.build(cls, texts)
    return population


def own_methods_again(folder: Path, text: str) -> tuple[Method, ...]:
    """The lifelong methods that a run had, with its settings, where the user's own are named again; () for no name."""
    found = methods_named(text)
    if not found:
        return ()
    tables = run_folder.read_config(folder).get("methods", [])
    return methods_again(tables, str(folder), {one.name: one for one in found})
