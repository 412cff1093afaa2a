"""Trust: which code may be imported because a file names it. A run folder, a preset, an environment's file are data.

Names that a command or a program gives are its own and are imported. While a file is read (`reading`), a name resolves
to what is rlmeta's, to Gymnasium's registry and to the packages of `EXTRAS`; any other module needs the user's word
(`allowing`), which is `--code` on the command line and `code=` in Python.
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
"""Modules that a file may name in front of an environment's id, because importing them registers environments."""
OWN = ("rlmeta.nn", "rlmeta.rewards")
"""Packages of rlmeta's whose classes and functions a file may name."""

_file: ContextVar[str] = ContextVar("file", default="")
_modules: ContextVar[tuple[str, ...]] = ContextVar("modules", default=())
_names: ContextVar[frozenset[str]] = ContextVar("names", default=frozenset())


@contextlib.contextmanager
def reading(file: str) -> Iterator[None]:
    """Within, names come from this file."""
    before = _file.set(file)
    try:
        yield
    finally:
        _file.reset(before)


@contextlib.contextmanager
def allowing(code: Sequence[str], names: Iterable[str] = ()) -> Iterator[None]:
    """Within, files may name whatever is in some modules, or some names alone.

    Args:
        code: modules, or packages with all modules in them.
        names: of single things, as `package.module:Name`.

    Raises:
        SettingError: what is given are no names of modules.
    """
    given = [code] if isinstance(code, str) else list(code)
    for name in given:
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise SettingError(f"code is {name!r}, expected the names of modules, such as package.module")
    before = _modules.set((*_modules.get(), *given)), _names.set(_names.get() | frozenset(names))
    try:
        yield
    finally:
        _modules.reset(before[0])
        _names.reset(before[1])


def is_allowed(named: str) -> bool:
    """Whether the user has allowed `package.module:Name`, by itself or with its module."""
    module = named.rpartition(":")[0]
    return named in _names.get() or any(f"{module}.".startswith(f"{one}.") for one in _modules.get())


def from_file() -> bool:
    """Whether names come from a file now."""
    return bool(_file.get())


def check_module(module: str, *, for_id: bool = True) -> None:
    """Refuse to import a module that only a file names.

    Args:
        module: its name.
        for_id: whether an environment's id follows, for which a known extra may be imported, or another name.

    Raises:
        SettingError: it is none of rlmeta's, no known extra, and the user has allowed nothing in it.
    """
    known = (for_id and module in EXTRAS) or _within_own(module)
    named = any(one.rpartition(":")[0] == module for one in _names.get())
    if from_file() and not known and not named and not is_allowed(f"{module}:"):
        raise SettingError(_refusal(module))


def check_object(found: Any, named: str) -> None:
    """Refuse what a file names in a module of rlmeta's and is not rlmeta's own, such as a module that it imports.

    Args:
        found: the object.
        named: as `package.module:Name`.

    Raises:
        SettingError: it is something else, and the user has not allowed it.
    """
    home = getattr(found, "__module__", None)
    owned = isinstance(home, str) and _within_own(home)
    if from_file() and not owned and not is_allowed(named):
        raise SettingError(_refusal(named.rpartition(":")[0]))


def check_id(identifier: str) -> None:
    """Refuse an environment's id from a file whose module may not be imported.

    Raises:
        SettingError: the module is no known extra, and the user has not allowed it.
    """
    module, colon, _ = identifier.rpartition(":")
    if from_file() and colon and module not in EXTRAS and not is_allowed(identifier):
        raise SettingError(_refusal(module))


def _within_own(module: str) -> bool:
    return f"{module}.".startswith(tuple(f"{one}." for one in OWN))


def _refusal(module: str) -> str:
    return (
        f"{_file.get()} names code in the module {module!r}, and a file alone never makes rlmeta import any: if you "
        f"trust it, add --code {module} to the command (in Python code=[{module!r}])"
    )


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings from a file that name an environment of another package, which gymnasium would import.

    Raises:
        SettingError: as `check_id`.
    """
    for name, value in settings.items():
        if isinstance(value, Mapping):
            check_settings(value)
        elif isinstance(value, str) and (name == "env_id" or re.search(r":.*-v\d+$", value)):
            check_id(value)
