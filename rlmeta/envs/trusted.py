"""Trust: which code may be imported because a file names it. Run folders, presets and TOML files are data.

Code that is named in a command or a program is imported. While a file is read (`reading`), a name resolves only to
rlmeta's own code, to Gymnasium's registry and to the packages of `EXTRAS`; any other module must be allowed by the user
(`allowing`), by `--code` on the command line or `code=` in Python.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from rlmeta.errors import SettingError

EXTRAS = frozenset(
    {
        "ale_py",
        "atari",
        "envpool",
        "gymnasium",
        "gymnasium_robotics",
        "highway_env",
        "metaworld",
        "minigrid",
        "miniworld",
        "panda_gym",
        "rlmeta.envs.native.register",
    }
)
"""Modules that a file may name in front of an environment's id, because importing them registers environments, and the
prefix `atari`, for which nothing of this name is imported."""
OWN = ("rlmeta.nn", "rlmeta.rewards")
"""Packages of rlmeta from which a file may name classes and functions."""

_file: ContextVar[str] = ContextVar("file", default="")
_modules: ContextVar[tuple[str, ...]] = ContextVar("modules", default=())
_names: ContextVar[frozenset[str]] = ContextVar("names", default=frozenset())


@contextlib.contextmanager
def reading(file: str) -> Iterator[None]:
    """Context in which names come from a file and are not trusted."""
    before = _file.set(file)
    try:
        yield
    finally:
        _file.reset(before)


@contextlib.contextmanager
def allowing(code: Sequence[str], names: Iterable[str] = ()) -> Iterator[None]:
    """Context in which files may name code of certain modules, or certain names.

    Args:
        code: modules, or packages with all modules in them.
        names: single classes or functions, as `package.module:Name`.

    Raises:
        SettingError: an entry of `code` is no name of a module.
    """
    allowed = [code] if isinstance(code, str) else list(code)
    for name in allowed:
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise SettingError(f"code is {name!r}, expected the names of modules, such as package.module")
    before = _modules.set((*_modules.get(), *allowed)), _names.set(_names.get() | frozenset(names))
    try:
        yield
    finally:
        _modules.reset(before[0])
        _names.reset(before[1])


def is_allowed(named: str) -> bool:
    """Whether the user has allowed `package.module:Name`, by its name or its module."""
    module = named.rpartition(":")[0]
    return named in _names.get() or any(f"{module}.".startswith(f"{allowed}.") for allowed in _modules.get())


def from_file() -> bool:
    """Whether names come from a file, within `reading`."""
    return bool(_file.get())


def check_module(module: str, *, for_id: bool = True) -> None:
    """Refuse to import a module that a file names and that is not trusted.

    Args:
        module: its name.
        for_id: whether the module precedes an environment's id, so that it may be one of `EXTRAS`.

    Raises:
        SettingError: the module is not rlmeta's, none of `EXTRAS`, and nothing in it is allowed.
    """
    known = (for_id and module in EXTRAS) or _within_own(module)
    named = any(allowed.rpartition(":")[0] == module for allowed in _names.get())
    if from_file() and not known and not named and not is_allowed(f"{module}:"):
        raise SettingError(_refusal(module))


def check_object(value: Any, named: str) -> None:
    """Refuse an object that a file names in rlmeta but that is defined elsewhere, such as an imported module.

    Args:
        value: the object.
        named: as `package.module:Name`.

    Raises:
        SettingError: the object is not defined in rlmeta, and the user has not allowed it.
    """
    home = getattr(value, "__module__", None)
    owned = isinstance(home, str) and _within_own(home)
    if from_file() and not owned and not is_allowed(named):
        raise SettingError(_refusal(named.rpartition(":")[0]))


def check_id(identifier: str) -> None:
    """Refuse an environment's id from a file if its module is not trusted.

    Raises:
        SettingError: the module is none of `EXTRAS`, and the user has not allowed it.
    """
    module, colon, _ = identifier.rpartition(":")
    if from_file() and colon and module not in EXTRAS and not is_allowed(identifier):
        raise SettingError(_refusal(module))


def _within_own(module: str) -> bool:
    return f"{module}.".startswith(tuple(f"{package}." for package in OWN))


def _refusal(module: str) -> str:
    return (
        f"{_file.get()} names code in the module {module!r}, and a file alone never makes rlmeta import any: if you "
        f"trust it, add --code {module} to the command (in Python code=[{module!r}])"
    )


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings from a file that name an environment in a module that gymnasium would import.

    Raises:
        SettingError: as `check_id`.
    """
    for name, value in settings.items():
        if isinstance(value, Mapping):
            check_settings(value)
        elif isinstance(value, str) and (name == "env_id" or re.search(r":.*-v\d+$", value)):
            check_id(value)
