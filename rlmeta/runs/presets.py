"""Presets: tuned hyperparameters of an agent, a table for each task, in `agents/NAME.toml`.

    [defaults]              # for every task of this file
    max_grad_norm = 0.5

    ["CartPole-v1"]         # on top, for one task, and for the named tasks and families made of it
    steps = 100_000
    num_steps = 32
    hidden_sizes = [64, 64]
    chosen_on_seeds = [0, 1, 2]

Keys are the agent's settings, `steps`, the budget they are meant for, and `chosen_on_seeds`, the seeds on which they
were tuned, which no table of results may use ([] for published settings of others). A list for a per-learner number
compares its values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from rlmeta.envs import trusted
from rlmeta.envs.names import names, read_named, read_toml
from rlmeta.errors import SettingError, unknown_name
from rlmeta.learning.numbers import whole
from rlmeta.learning.settings import check_names, name_of, per_learner_names
from rlmeta.runs import grammar
from rlmeta.runs.shipped import AGENTS, agent_class

DEFAULTS = "defaults"
SEEDS = "chosen_on_seeds"


class Preset(NamedTuple):
    """Tuned settings of an agent on a task, as read from a file."""

    settings: dict[str, Any]
    """Keyword arguments of the agent's settings."""
    steps: int | None
    """The budget they are meant for."""
    path: Path | None
    """The file, or None without a preset."""
    table: str
    """The most specific table that was applied, or ''."""
    chosen_on_seeds: tuple[int, ...] = ()
    """The seeds on which the settings were tuned; () if the file does not say."""


NOTHING = Preset({}, None, None, "")


def preset(agent: str, task: str) -> Any:
    """Load the tuned settings of an agent on a task, such as `preset("ppo", "CartPole-v1")`.

    Raises:
        UnknownNameError: there is no such agent, or no preset for it on this task.
        SettingError: the preset's file is wrong.
    """
    cls = agent_class(agent)
    tuned = load_preset(cls, task)
    if tuned.path is None:
        raise unknown_name(f"preset of {agent} for task", task, sorted(_tables(_own_file(cls))))
    return cls(**tuned.settings)


def load_preset(agent: type, task: str, source: str | None = None) -> Preset:
    """Load the preset of an agent for a task.

    Args:
        agent: the settings class.
        task: the name of a task, family or stream.
        source: None for the agent's own file; "none" for no preset; a TOML file; the name of a file in the `agents`
            folders; or the name of a table in the agent's own file, to use another task's settings.

    Raises:
        SettingError: the file is not TOML, a key is not a setting, a value is malformed, or the file that was asked
            for has no table for the task.
        UnknownNameError: `source` names nothing.
    """
    if source == "none":
        return NOTHING
    path, table = _find(agent, source)
    tables = _tables(path)
    table = table or next((name for name in _names_of(task) if name in tables), "")
    if path is None or (not table and DEFAULTS not in tables):
        if source is None:
            return NOTHING
        raise SettingError(f"{path} has no table for {task!r}: it has {', '.join(sorted(tables)) or 'none at all'}")
    settings: dict[str, Any] = {}
    for name in (DEFAULTS, table):
        settings |= _checked(agent, tables.get(name, {}), f"{path} [{name}]")
    steps, seeds = settings.pop("steps", None), settings.pop(SEEDS, ())
    _check_together(agent, settings, f"{path} [{table or DEFAULTS}]")
    return Preset(settings, steps, path, table or DEFAULTS, seeds)


def _find(agent: type, source: str | None) -> tuple[Path | None, str]:
    """Resolve `source` to a file, and to a table in it if it names one."""
    own = _own_file(agent)
    if source is None:
        return own, ""
    if source.endswith(".toml"):
        if not Path(source).is_file():
            raise SettingError(f"preset {source} is not a file")
        return Path(source), ""
    if source in names("agents"):
        return names("agents")[source], ""
    tables = [name for name in _tables(own) if name != DEFAULTS]
    if source not in tables:
        raise unknown_name("preset", source, [*names("agents"), *tables, "none"])
    return own, source


def _own_file(agent: type) -> Path | None:
    """The agent's preset file, or None; a user's class does not get the presets of rlmeta's class of the same name."""
    name = name_of(agent)
    return names("agents").get(name) if AGENTS.get(name, agent) is agent else None


def _tables(path: Path | None) -> dict[str, dict[str, Any]]:
    if path is None:
        return {}
    content = read_toml(path)
    for name, table in content.items():
        if not isinstance(table, dict):
            raise SettingError(f"{path}: {name!r} is not in a table: put it below [{DEFAULTS}] or a task's name")
    return content


def _names_of(task: str) -> list[str]:
    """Names under which a task may have a table: its own, then that of the environment it consists of."""
    described = read_named("envs", task) or {}
    entries = described.get("tasks", [described])
    made_of = {entry if isinstance(entry, str) else entry.get("env", task) for entry in entries}
    return [task, *made_of] if len(made_of) == 1 else [task]


def _checked(agent: type, table: dict[str, Any], where: str) -> dict[str, Any]:
    """Parse a table's values to the types of the settings, after a check of its keys."""
    check_names(agent, {name: value for name, value in table.items() if name not in ("steps", SEEDS)}, where)
    compared = per_learner_names(agent)
    checked: dict[str, Any] = {}
    for name, value in table.items():
        where_entry = f"{where}: {name}"
        if name in ("steps", SEEDS):
            checked[name] = _steps(value, where_entry) if name == "steps" else _seeds(value, where_entry)
            continue
        joined = isinstance(value, list) and name not in compared
        with trusted.reading(where):
            values = grammar.values(agent, name, grammar.text_of(tuple(value) if joined else value), where_entry)
        if len(values) > 1 and name not in compared:
            raise SettingError(
                f"{where_entry} has {len(values)} values, expected one: compare such settings on the command line"
            )
        checked[name] = values if len(values) > 1 else values[0]
    return checked


def _steps(value: Any, where: str) -> int:
    try:
        return whole(grammar.text_of(value))
    except ValueError:
        raise SettingError(f"{where} is {value!r}, expected a whole number") from None


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    fits = isinstance(value, list) and all(type(seed) is int and seed >= 0 for seed in value)
    if not fits or len(set(value)) < len(value):
        raise SettingError(f"{where} is {value!r}, expected different whole numbers, such as [0, 1, 2], or []")
    return tuple(value)


def _check_together(agent: type, settings: dict[str, Any], where: str) -> None:
    try:
        agent(**settings)
    except SettingError as error:
        raise SettingError(f"{where}: {error}") from None


def preset_files() -> dict[str, list[str]]:
    """Tasks that have a preset, by agent."""
    return {name: [table for table in _tables(path) if table != DEFAULTS] for name, path in names("agents").items()}
