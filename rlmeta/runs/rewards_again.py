"""Restore the rewards of a run: rlmeta's own and those of allowed modules by class and settings, others as given."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rlmeta.envs import trusted
from rlmeta.errors import CheckpointError, SettingError
from rlmeta.learning.comparisons import difference, is_described
from rlmeta.learning.field_types import check_values
from rlmeta.learning.settings import check_names
from rlmeta.rewards import check_rewards
from rlmeta.runs.descriptions import reward_table
from rlmeta.runs.folder import CONFIG
from rlmeta.runs.objects import load_object
from rlmeta.runs.shipped import REWARDS


def rewards_again(tables: Any, own: Any, where: str) -> tuple[Any, ...]:
    """Rewards of a saved configuration, in order.

    Args:
        tables: the configuration's `rewards`.
        own: rewards that the user gives again, which may leave out those of rlmeta; a class takes the saved settings.
        where: the run's folder, for error messages.

    Raises:
        CheckpointError: `tables` are malformed.
        SettingError: a reward is missing, or one is given that the run did not have.
    """
    if not isinstance(tables, list) or not all(_is_table(table) for table in tables):
        raise CheckpointError(f"{where}/{CONFIG}: rewards are {tables!r}, expected tables: restore it from a copy")
    given = list(own if isinstance(own, list | tuple) else check_rewards(own))
    rewards = []
    for table in tables:
        place = next((i for i, reward in enumerate(given) if _class_name(reward) == _name(table["class"])), None)
        rewards.append(_restored(table, where) if place is None else _taken(given.pop(place), table, where))
    if given:
        had = ", ".join(_name(table["class"]) for table in tables) or "(none)"
        raise SettingError(f"{where} had the rewards {had}, got also {_class_name(given[0])}: give the same")
    return tuple(rewards)


def check_rewards_again(saved: Any, compared: Sequence[Any], where: str) -> int:
    """Index of the variant, among the tables of those that are given again, whose rewards are the saved ones.

    Raises:
        SettingError: there is none; the message names the first setting that differs.
    """
    settings = [[table.get("settings", {}) for table in tables] for tables in (saved, *compared)]
    differences = [list(map(difference, settings[0], given)) for given in settings[1:]]
    for index, of_variant in enumerate(differences):
        if not any(of_variant):
            return index
    named, differs = next((table["class"], text) for table, text in zip(saved, differences[0]) if text)
    raise SettingError(
        f"{where} had the reward {_name(named)} with {differs}: give the same, or train another run with the change"
    )


def _is_table(table: Any) -> bool:
    fits = isinstance(table, dict) and isinstance(table.get("class"), str)
    return fits and isinstance(table.get("settings", {}), dict)


def _name(named: str) -> str:
    return named.partition(":")[2]


def _class_name(reward: Any) -> str:
    cls: type = reward if isinstance(reward, type) else type(reward)
    return cls.__qualname__


def _taken(reward: Any, table: dict[str, Any], where: str) -> Any:
    """A reward that is given again; of a class, with the saved settings."""
    return _built(reward, table, where) if isinstance(reward, type) else reward


def _restored(table: dict[str, Any], where: str) -> Any:
    """A reward of rlmeta's, or of a module that the user has allowed."""
    named = table["class"]
    complete = not any(map(is_described, table.get("settings", {"": "<"}).values()))
    if complete and (named in REWARDS or trusted.is_allowed(named)):
        return _built(REWARDS.get(named) or load_object(named), table, where)
    words = ", ".join(f"{name}={value}" for name, value in table.get("settings", {}).items())
    raise SettingError(
        f"{where} had the rewards <{named}({words})>, which a configuration only describes: pass it again as "
        f"own={{'rewards': ...}} (on the command line --rewards){or_allow(named) if complete else ''}"
    )


def _built(cls: Any, table: dict[str, Any], where: str) -> Any:
    """A reward of a class with the saved settings.

    Raises:
        SettingError: it has no such settings, or ends up with others.
    """
    settings, about = table.get("settings", {}), f"{where}/{CONFIG}: rewards: {table['class']}"
    if not isinstance(cls, type):
        raise CheckpointError(f"{about} is {cls!r}, expected the class of a reward: restore it from a copy")
    if dataclasses.is_dataclass(cls):
        check_names(cls, dict(settings), about)
        check_values(cls, settings, about)
    try:
        reward = cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()})
    except TypeError as error:
        raise SettingError(f"{about} can't be made again ({error}): pass it again as own={{'rewards': ...}}") from error
    differs = difference(settings, reward_table(reward).get("settings", {}))
    if differs:
        raise SettingError(f"{about} had {differs}: pass it again as own={{'rewards': ...}}")
    return reward


def or_allow(named: str) -> str:
    """Hint for an error message: allow the module of `package.module:Name`; '' if it cannot be imported."""
    module = named.partition(":")[0]
    can_be_imported = all(part.isidentifier() for part in module.split(".")) and module != "__main__"
    if "<" in named or not can_be_imported:
        return ""
    return f", or allow the module as code=[{module!r}] (on the command line --code {module})"
