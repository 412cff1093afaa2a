"""Tables of `rlmeta list`: agents, tasks, families, streams, methods, and the runs in a folder."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from rlmeta.envs.names import names, read_toml
from rlmeta.errors import RlmetaError, printable
from rlmeta.runs import checkpoint
from rlmeta.runs import folder as run_folder

EXTRAS = {
    "box2d": ("Box2D", "rlmeta[box2d]"),
    "mujoco": ("mujoco", "rlmeta[mujoco]"),
    "phys2d": ("jax", "gymnasium[jax]"),
    "tabular": ("jax", "gymnasium[jax]"),
}
"""Package that a group of gymnasium's environments needs, and the extra that installs it."""

PREFIXED = (
    ("Atari's", "atari:NAME, as atari:Pong-v5", "ale_py", "atari"),
    ("MiniGrid's", "minigrid:NAME, as minigrid:DoorKey-5x5-v0", "minigrid", "minigrid"),
    ("EnvPool's", "envpool:NAME, as envpool:Pong-v5", "envpool", "envpool"),
)
"""Groups of environments whose names have a prefix, their package, and the extra that installs it."""


def agents_table() -> Table:
    """Table of agents and the tasks they have presets for."""
    from rlmeta.runs.presets import preset_files
    from rlmeta.runs.shipped import AGENTS

    table, presets = _table("agents", "name", "what", "presets for"), preset_files()
    for name, cls in AGENTS.items():
        table.add_row(name, (cls.__doc__ or "").split(".")[0], ", ".join(presets.get(name, [])))
    return table


def tasks_table() -> Table:
    """Table of named tasks, native environments, and gymnasium's environments by group."""
    from rlmeta.envs.native import NATIVE

    table = _table("tasks", "group", "names", "")
    for name, described in _named("task"):
        table.add_row("named", name, described)
    table.add_row("native, batched", ", ".join(sorted(NATIVE)), "fast; --no-native takes gymnasium's")
    for group, ids in sorted(gymnasium_groups().items()):
        package, extra = EXTRAS.get(group, ("", ""))
        missing = package and importlib.util.find_spec(package) is None
        table.add_row(f"gymnasium {group}", ", ".join(ids), f"missing: pip install '{extra}'" if missing else "")
    for group, name, package, extra in PREFIXED:
        missing = importlib.util.find_spec(package) is None
        table.add_row(group, name, f"missing: pip install 'rlmeta[{extra}]'" if missing else "")
    table.add_row("yours", "package.module:MyEnv-v0", "gymnasium imports package.module, which registers it")
    return table


def gymnasium_groups() -> dict[str, list[str]]:
    """Ids of registered environments, the newest version of each, by package."""
    import gymnasium as gym

    newest: dict[tuple[str | None, str], Any] = {}
    for spec in gym.registry.values():
        key = (spec.namespace, spec.name)
        importable = isinstance(spec.entry_point or spec.vector_entry_point, str)
        if importable and (key not in newest or (spec.version or 0) > (newest[key].version or 0)):
            newest[key] = spec
    groups: dict[str, list[str]] = {}
    for spec in newest.values():
        path = str(spec.entry_point or spec.vector_entry_point).split(":")[0].split(".")
        groups.setdefault(path[2] if path[:2] == ["gymnasium", "envs"] else path[0], []).append(spec.id)
    return {group: sorted(ids) for group, ids in groups.items()}


def families_table() -> Table:
    """Table of named task families."""
    return _described("families", "family")


def streams_table() -> Table:
    """Table of named streams of tasks."""
    return _described("streams", "stream")


def methods_table() -> Table:
    """Table of lifelong methods and their settings: `--lifelong NAME --NAME.SETTING VALUE`."""
    from rlmeta.runs.grammar import docs, text_of
    from rlmeta.runs.shipped import METHODS

    table = _table("methods", "name", "setting", "default", "what")
    for cls in METHODS.values():
        table.add_section()
        about: Any = cls
        for i, setting in enumerate(dataclasses.fields(about)):
            what = docs(cls).get(setting.name, "")
            table.add_row(
                "" if i else cls.name, f"--{cls.name}.{setting.name.replace('_', '-')}", text_of(setting.default), what
            )
    return table


def runs_table(folder: Path = Path("runs")) -> Table:
    """Table of the runs in a folder: agent, task, seeds, steps, whether they have ended, and their scores.

    Args:
        folder: a folder of runs, up to two levels deep, or that of a single run.
    """
    table = _table(printable(str(folder)), "run", "agent", "task", "seeds", "steps", "state", "IQM")
    for config in sorted(path for depth in ("", "*/", "*/*/") for path in folder.glob(f"{depth}config.toml")):
        run = config.parent
        try:
            content = run_folder.read_config(run)
            cells = [content["exp_name"], content["env_id"], len(content["seeds"]), _steps(run, content)]
            row = [*map(str, cells), *_outcome(run, run_folder.run_id(content, run))]
        except Exception as error:  # a malformed file must not hide the other runs
            row = ["", "", "", "", f"unreadable: {error}", ""]
        table.add_row(*(Text(printable(cell)) for cell in (str(run), *row)))
    return table


TABLES: dict[str, Callable[[], Table]] = {
    "agents": agents_table,
    "tasks": tasks_table,
    "families": families_table,
    "streams": streams_table,
    "methods": methods_table,
    "runs": runs_table,
}
"""Tables of `rlmeta list` by kind."""


def _steps(run: Path, content: dict[str, Any]) -> Any:
    """Steps of a run's budget, also where a resume has extended it."""
    state = run / run_folder.STATE
    extended_to = checkpoint.about(state).get("extended_to") if checkpoint.is_saved(state) else 0
    return extended_to or content["budget"]["steps"]


def _outcome(run: Path, name: str) -> tuple[str, str]:
    """State of a run (unfinished, finished, or why it stopped), and the IQM of each setting."""
    content = run_folder.read_summary(run, name)
    if content is None:
        return "unfinished", ""
    scores = [_iqm(row) + (f" ({row['setting']})" if row["setting"] else "") for row in content["summary"]]
    return str(content["stopped"] or "finished"), "\n".join(scores)


def _iqm(row: dict[str, Any]) -> str:
    """IQM as text, with the score's name unless it is a return."""
    score = row.get("score", "return")
    return f"{row['iqm']:.1f}" if score == "return" else f"{row['iqm']:.3f} {score}"


def _named(kind: str) -> Iterator[tuple[str, str]]:
    """Name and description of every file of a kind in the `envs` folders."""
    for name, path in sorted(names("envs").items()):
        try:
            content = read_toml(path)
        except RlmetaError as error:
            content = {"kind": kind, "description": f"unreadable: {error}"}
        if content.get("kind", "task") == kind:
            yield name, str(content.get("description", ""))


def _described(title: str, kind: str) -> Table:
    table = _table(title, "name", "what")
    for row in _named(kind):
        table.add_row(*row)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
