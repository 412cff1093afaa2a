"""Changes to a run's folder that its checksums agree with, as somebody makes them who knows how."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w

from rlmeta.runs import folder as run_folder
from rlmeta.runs.files import sealed, sealed_lines, unsealed, unsealed_lines


def reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a file of JSON with a checksum."""
    content = unsealed(path.read_bytes())
    change(content)
    path.write_bytes(sealed(content, indent=1))


def accept_config(folder: Path) -> None:
    """Make the checkpoints in a run's folder those of the `config.toml` that is there now."""
    digest = run_folder.config_digest(folder)
    for path in (folder / "state").glob("manifest*.json"):
        reseal(path, lambda content: content["about"].update(config=digest))


def change_plan(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the plan of a folder of several runs, with a checksum that agrees."""
    content = tomllib.loads(unsealed_lines(path.read_bytes()).decode())
    change(content)
    path.write_bytes(sealed_lines(tomli_w.dumps(content).encode()))
