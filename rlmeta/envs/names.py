"""Names on the command line: TOML files in ./agents and ./envs, then $RLMETA_PATH, then the copies that are shipped."""

from __future__ import annotations

import os
import sysconfig
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rlmeta.envs import trusted
from rlmeta.errors import SettingError, require_choice

Kind = Literal["agents", "envs"]


def folders(kind: Kind) -> list[Path]:
    """Where names of this kind are looked up, first come first served."""
    require_choice("kind", kind, Kind)
    roots = [Path.cwd(), *(Path(root) for root in os.environ.get("RLMETA_PATH", "").split(os.pathsep) if root)]
    return [root / kind for root in dict.fromkeys([*roots, *shipped()]) if (root / kind).is_dir()]


def shipped() -> list[Path]:
    """Where rlmeta's own `agents` and `envs` are: the checkout, or where pip puts the copies.

    That is into the environment, the user's folder, or beside a --target.
    """
    beside = Path(__file__).parents[2]
    prefixes = [Path(sysconfig.get_path("data")), Path(sysconfig.get_path("data", f"{os.name}_user")), beside]
    checkout = [beside] if (beside / "pyproject.toml").is_file() else []
    return checkout + [prefix / "share" / "rlmeta" for prefix in prefixes]


def names(kind: Kind) -> dict[str, Path]:
    """Every name with its file; a name in an earlier folder hides the same in a later one."""
    found: dict[str, Path] = {}
    for folder in folders(kind):
        for path in sorted(folder.glob("*.toml")):
            found.setdefault(path.stem, path)
    return found


def read_named(kind: Kind, name: str) -> dict[str, Any] | None:
    """The table in `name`'s TOML file, or None where there is no such file."""
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
    return isinstance(value, list) and len(value) > 0 and all(type(one) is int for one in value)


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
    "reveals": (lambda x: _all(x, lambda one: isinstance(one, str)), "a list of texts"),
    "split": (lambda x: _all(x, _is_group), "a list of lists of classes, none of them empty"),
    **dict.fromkeys(
        ("permute", "rotate", "samples", "episodes"), (lambda x: type(x) is int and x >= 1, "a whole number above 0")
    ),
    "observe_identity": (lambda x: isinstance(x, bool), "true or false"),
}
"""What the entries of a problem's table are."""
NEEDED = {"task": "env", "family": "env or family", "stream": "tasks or data"}
"""What a table must have, by its kind."""


def check_problem(table: dict[str, Any], where: str) -> None:
    """Refuse the table of a task, family or stream in which an entry is missing, of another type, or names code.

    Raises:
        SettingError: with the entry's name.
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
    """Refuse environments that only code which the file names would make."""
    for entry in (table, *table.get("tasks", [])):
        named, settings = (entry, {}) if isinstance(entry, str) else (entry.get("env", ""), entry.get("settings", {}))
        trusted.check_id(named)
        trusted.check_settings(settings)


def read_toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file; a `SettingError` that names the file and the line where it is not TOML."""
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"{path}: not valid TOML: {error}") from None
