"""Import of the user's modules from the current folder: those that are named, and what they import, nothing else.

A folder on `sys.path` serves every import of every package, so that a stray `dill.py` in it would run as soon as torch
looks for dill. Here an entry of `sys.path` names the modules that may come from a folder; worker processes inherit it.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FrameType, ModuleType

from rlmeta.envs.names import folders

PREFIX = "rlmeta-own-code:"
"""What an entry of `sys.path` begins with: `rlmeta-own-code:NAME,NAME:FOLDER`."""

_MACHINERY = ("importlib", "_frozen_importlib", "_frozen_importlib_external", "pkgutil")
"""Modules that stand between an import and the finder."""


class OwnFinder:
    """The finder of one folder, which knows only some modules.

    Args:
        names: top-level modules that may be imported from it; what these import is added.
        folder: where they are.
    """

    def __init__(self, names: frozenset[str], folder: str) -> None:
        self.names, self.folder = names, folder

    def find_spec(self, name: str, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module of this name, if it is a known one or one of those imports it."""
        importer = pkgutil.get_importer(self.folder)
        if importer is None or (name not in self.names and _importing_module() not in self.names):
            return None
        found: ModuleSpec | None = importer.find_spec(name, target)
        if found is not None and name not in self.names:
            allow(name)
        return found


def allow(module: str) -> None:
    """Let a module, or its package, be imported from the current folder and the `envs` and `agents` folders."""
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
    """The top-level name of the module whose import is being served."""
    frame: FrameType | None = sys._getframe(2)  # of who asks the finder
    while frame is not None:
        name = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if name not in _MACHINERY:
            return name
        frame = frame.f_back
    return ""


def _hook(entry: str) -> OwnFinder:
    if not entry.startswith(PREFIX):
        raise ImportError(entry)
    _, names, folder = entry.split(":", 2)
    return OwnFinder(frozenset(names.split(",")), folder)


def _install() -> None:
    if _hook not in sys.path_hooks:
        sys.path_hooks.insert(0, _hook)


def inherit(path: list[str]) -> None:
    """Search for modules where another process does: a worker takes over what its parent had allowed."""
    sys.path[:] = path
    if any(entry.startswith(PREFIX) for entry in path):
        _install()
        sys.path_importer_cache.clear()


inherit(list(sys.path))  # of a process that was started by one that had allowed some
