"""Import of user code from the current folder: named modules and their own imports, nothing else.

A folder on `sys.path` serves every import of every package, so that a stray `dill.py` in it would run as soon as torch
tries to import dill. Here an entry of `sys.path` names the modules that may come from a folder; worker processes
inherit it.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FrameType, ModuleType

from rlmeta.envs.names import folders

PREFIX = "rlmeta-user-code:"
"""Prefix of an entry of `sys.path`: `rlmeta-user-code:NAME,NAME:FOLDER`."""

_MACHINERY = ("importlib", "_frozen_importlib", "_frozen_importlib_external", "pkgutil")
"""Modules of Python whose frames lie between an import and the finder."""


class UserFinder:
    """Import finder of a folder that finds only allowed modules.

    Args:
        names: top-level modules that may be imported from the folder; modules that these import are added.
        folder: that contains them.
    """

    def __init__(self, names: frozenset[str], folder: str) -> None:
        self.names, self.folder = names, folder

    def find_spec(self, name: str, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find the spec of a module that is allowed, or is imported by an allowed one; else None."""
        importer = pkgutil.get_importer(self.folder)
        if importer is None or (name not in self.names and _importing_module() not in self.names):
            return None
        spec: ModuleSpec | None = importer.find_spec(name, target)
        if spec is not None and name not in self.names:
            allow(name)
        return spec


def allow(module: str) -> None:
    """Allow the import of a module, or its package, from the current folder and the `envs` and `agents` folders."""
    _install()
    importlib.invalidate_caches()
    name = module.partition(".")[0]
    entries = {entry.split(":", 2)[2]: place for place, entry in enumerate(sys.path) if entry.startswith(PREFIX)}
    for folder in map(str, (Path.cwd(), *folders("envs"), *folders("agents"))):
        if folder not in entries:
            sys.path.append(f"{PREFIX}{name}:{folder}")
            continue
        names = sys.path[entries[folder]].split(":", 2)[1].split(",")
        sys.path[entries[folder]] = f"{PREFIX}{','.join(dict.fromkeys([*names, name]))}:{folder}"


def _importing_module() -> str:
    """Find the top-level name of the module that contains the current import statement."""
    frame: FrameType | None = sys._getframe(2)  # the caller of the finder
    while frame is not None:
        name = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if name not in _MACHINERY:
            return name
        frame = frame.f_back
    return ""


def _hook(entry: str) -> UserFinder:
    if not entry.startswith(PREFIX):
        raise ImportError(entry)
    _, names, folder = entry.split(":", 2)
    return UserFinder(frozenset(names.split(",")), folder)


def _install() -> None:
    if _hook not in sys.path_hooks:
        sys.path_hooks.insert(0, _hook)


def inherit(path: list[str]) -> None:
    """Take over the module search path of a parent process, with the modules it had allowed."""
    sys.path[:] = path
    if any(entry.startswith(PREFIX) for entry in path):
        _install()
        sys.path_importer_cache.clear()


inherit(list(sys.path))  # this process may be a child of one that had allowed modules
