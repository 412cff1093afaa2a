"""Names on the command line: TOML files in ./agents and ./envs, then $RLMETA_PATH, then the copies that are shipped."""

from __future__ import annotations

import os
import sysconfig
import tomllib
from pathlib import Path
from typing import Any, Literal

from rlmeta.errors import SettingError

Kind = Literal["agents", "envs"]


def folders(kind: Kind) -> list[Path]:
    """Where names of this kind are looked up, first come first served."""
    roots = [Path.cwd(), *(Path(root) for root in os.environ.get("RLMETA_PATH", "").split(os.pathsep) if root)]
    roots += [Path(__file__).parents[2], Path(sysconfig.get_path("data")) / "share" / "rlmeta"]
    return [root / kind for root in dict.fromkeys(roots) if (root / kind).is_dir()]


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
