"""Trust: which code may be imported because a file names it. A run folder, a preset, an environment's file are data.

Names that a command or a program gives are its own and are imported. While a file is read (`reading`), a name resolves
to what is rlmeta's, to Gymnasium's registry and to the packages of `EXTRAS`; any other module needs the user's word
(`allowing`), which is `--code` on the command line and `code=` in Python.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
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
_allowed: ContextVar[tuple[str, ...]] = ContextVar("allowed", default=())


@contextlib.contextmanager
def reading(file: str) -> Iterator[None]:
    """Within, names come from this file."""
    before = _file.set(file)
    try:
        yield
    finally:
        _file.reset(before)


@contextlib.contextmanager
def allowing(code: Sequence[str]) -> Iterator[None]:
    """Within, files may name these modules, and modules in these packages.

    Raises:
        SettingError: what is given are no names of modules.
    """
    given = [code] if isinstance(code, str) else list(code)
    for name in given:
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise SettingError(f"code is {name!r}, expected the names of modules, such as package.module")
    before = _allowed.set((*_allowed.get(), *given))
    try:
        yield
    finally:
        _allowed.reset(before)


def is_allowed(module: str) -> bool:
    """Whether the user has allowed the module."""
    return any(f"{module}.".startswith(f"{one}.") for one in _allowed.get())


def from_file() -> bool:
    """Whether names come from a file now."""
    return bool(_file.get())


def check_module(module: str, *, for_id: bool = True) -> None:
    """Refuse to import a module that only a file names.

    Args:
        module: its name.
        for_id: whether an environment's id follows, for which a known extra may be imported, or another name.

    Raises:
        SettingError: it is none of rlmeta's, no known extra, and the user has not allowed it.
    """
    known = (for_id and module in EXTRAS) or f"{module}.".startswith(tuple(f"{one}." for one in OWN))
    if not from_file() or known or is_allowed(module):
        return
    raise SettingError(refusal(module))


def refusal(module: str) -> str:
    """What is said of a module that only a file names."""
    return (
        f"{_file.get()} names code in the module {module!r}, and a file alone never makes rlmeta import any: if you "
        f"trust it, add --code {module} to the command (in Python code=[{module!r}])"
    )


def check_object(found: Any, module: str) -> None:
    """Refuse what a file names in a module of rlmeta's and is not rlmeta's own, such as a module that it imports.

    Raises:
        SettingError: it is something else.
    """
    home = getattr(found, "__module__", None)
    owned = isinstance(home, str) and f"{home}.".startswith(tuple(f"{one}." for one in OWN))
    if from_file() and not owned and not is_allowed(module):
        raise SettingError(refusal(module))


def check_id(identifier: str) -> None:
    """Refuse an environment's id from a file whose module may not be imported.

    Raises:
        SettingError: as `check_module`.
    """
    module, colon, _ = identifier.rpartition(":")
    if colon:
        check_module(module)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings from a file that name an environment of another package, which gymnasium would import.

    Raises:
        SettingError: as `check_module`.
    """
    for name, value in settings.items():
        if isinstance(value, Mapping):
            check_settings(value)
        elif isinstance(value, str) and (name == "env_id" or re.search(r":.*-v\d+$", value)):
            check_id(value)
