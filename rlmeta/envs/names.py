"""Names on the command line: TOML files in ./agents and ./envs, then $RLMETA_PATH, then the copies that are shipped."""

from __future__ import annotations

import os
import sysconfig
import tomllib
from pathlib import Path
from typing import Any, Literal

from rlmeta.errors import SettingError, require_choice

Kind = Literal["agents", "envs"]


def folders(kind: Kind) -> list[Path]:
    """Where names of this kind are looked up, first come first served."""
    require_choice("kind", kind, Kind)
    roots = [Path.cwd(), *(Path(root) for root in os.environ.get("RLMETA_PATH", "").split(os.pathsep) if root)]
    return [root / kind for root in dict.fromkeys([*roots, *_shipped()]) if (root / kind).is_dir()]


def _shipped() -> list[Path]:
    """The checkout, or where pip puts the copies: into the environment, the user's folder, or beside a --target."""
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
    return None if path is None else read_toml(path)


def read_toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file; a `SettingError` that names the file and the line where it is not TOML."""
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"{path}: not valid TOML: {error}") from None
