"""Names of agents and environments: TOML files in ./agents and ./envs, then $RLMETA_PATH, then the installed ones."""

from __future__ import annotations

import os
import sysconfig
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rlmeta.envs import trusted
from rlmeta.errors import SettingError, require_choice

FolderName = Literal["agents", "envs"]


def folders(kind: FolderName) -> list[Path]:
    """List the folders in which names of a kind are looked up; earlier ones take precedence."""
    require_choice("kind", kind, FolderName)
    roots = [Path.cwd(), *(Path(root) for root in os.environ.get("RLMETA_PATH", "").split(os.pathsep) if root)]
    return [root / kind for root in dict.fromkeys([*roots, *shipped()]) if (root / kind).is_dir()]


def shipped() -> list[Path]:
    """List the parents of rlmeta's own `agents` and `envs` folders: the checkout, or where pip installs copies.

    Those are the Python environment, the user's folder, or the folder of a --target.
    """
    beside = Path(__file__).parents[2]
    prefixes = [Path(sysconfig.get_path("data")), Path(sysconfig.get_path("data", f"{os.name}_user")), beside]
    checkout = [beside] if (beside / "pyproject.toml").is_file() else []
    return checkout + [prefix / "share" / "rlmeta" for prefix in prefixes]


def names(kind: FolderName) -> dict[str, Path]:
    """Map every name to its TOML file; a name in an earlier folder hides the same name in a later one."""
    paths: dict[str, Path] = {}
    for folder in folders(kind):
        for path in sorted(folder.glob("*.toml")):
            paths.setdefault(path.stem, path)
    return paths


def read_named(kind: FolderName, name: str) -> dict[str, Any] | None:
    """Read the TOML file of a name; None if there is none."""
    path = names(kind).get(name)
    if path is None:
        return None
    table = read_toml(path)
    if kind == "envs":
        check_problem(table, str(path))
    return table


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(bound) in (int, float) for bound in value)


def _is_task(value: Any) -> bool:
    if isinstance(value, dict):
        return isinstance(value.get("env"), str) and isinstance(value.get("settings", {}), dict)
    return isinstance(value, str)


def _is_group(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(label) is int for label in value)


def _all(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(fits, value))


ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("kind", "env", "family", "data", "description", "scenario"), (lambda x: isinstance(x, str), "text")
    ),
    "settings": (lambda x: isinstance(x, dict), "a table"),
    "ranges": (lambda x: isinstance(x, dict) and all(map(_is_range, x.values())), "a table of name = [low, high]"),
    "threshold": (lambda x: type(x) in (int, float), "a number"),
    "degrees": (lambda x: type(x) in (int, float), "a number"),
    "tasks": (lambda x: _all(x, _is_task), "a list of names, or of tables with env and settings"),
    "reveals": (lambda x: _all(x, lambda text: isinstance(text, str)), "a list of texts"),
    "split": (lambda x: _all(x, _is_group), "a list of lists of classes, none of them empty"),
    **dict.fromkeys(
        ("permute", "rotate", "samples", "episodes"), (lambda x: type(x) is int and x >= 1, "a whole number above 0")
    ),
    "observe_identity": (lambda x: isinstance(x, bool), "true or false"),
}
"""Type checks and descriptions of the entries of a problem's TOML file."""
NEEDED = {"task": "env", "family": "env or family", "stream": "tasks or data"}
"""Required entries of a problem's TOML file, by its kind."""


def check_problem(table: dict[str, Any], where: str) -> None:
    """Validate the TOML table of a task, family or stream.

    Raises:
        SettingError: an entry is missing, of another type, or names code that is not trusted; the message names it.
    """
    for name, value in table.items():
        fits, expected = ENTRIES.get(name, (lambda _: True, ""))
        if not fits(value):
            raise SettingError(f"{where}: {name} is {value!r}, expected {expected}")
    needed = NEEDED.get(table.get("kind", "task"), "")
    if needed and not set(needed.split(" or ")) & set(table):
        raise SettingError(f"{where}: a {table.get('kind', 'task')} needs {needed}")
    if table.get("kind") == "family" and "env" in table and "ranges" not in table:
        raise SettingError(f"{where}: a family of an env needs ranges")
    with trusted.reading(where):
        _check_code(table)


def _check_code(table: dict[str, Any]) -> None:
    """Refuse environments from code that a file names and the user has not allowed."""
    for entry in (table, *table.get("tasks", [])):
        named, settings = (entry, {}) if isinstance(entry, str) else (entry.get("env", ""), entry.get("settings", {}))
        trusted.check_id(named)
        trusted.check_settings(settings)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; a `SettingError` names file and line of a syntax error."""
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"{path}: not valid TOML: {error}") from None
