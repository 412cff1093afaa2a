"""Tables that describe settings in `config.toml`, and the comparison of what is given again with what was saved."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Mapping
from typing import Any

import numpy as np

from rlmeta.data.demonstrations import Demonstrations, Unread
from rlmeta.runs import grammar

PLAIN = (str, bool, int, float, np.generic)
"""Types that TOML has a form for."""


def words_of(value: Any) -> str:
    """Description of a value that TOML has no form for: names of classes and functions, and their plain settings.

    It is the same in every process, unlike a repr with an address.
    """
    if isinstance(value, np.generic):
        return repr(value.item())
    if value is None or isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"({', '.join(map(words_of, value))})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type | Demonstrations):
        fields = [f"{f.name}={words_of(getattr(value, f.name))}" for f in dataclasses.fields(value)]
        return f"{object_name(type(value))}({', '.join(fields)})"
    return object_name(value)


def object_name(value: Any) -> str:
    """`package.module:Name` of a class or function, or of the class of another object."""
    named = value if isinstance(getattr(value, "__qualname__", None), str) else type(value)
    return f"{named.__module__}:{named.__qualname__}"


def settings_table(settings: Any) -> dict[str, Any]:
    """A variant's settings as a table for TOML; objects that TOML cannot hold are described in <>."""
    hints = typing.get_type_hints(type(settings), include_extras=True)
    entries = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    table = {name: entry_of(name, value, hints.get(name)) for name, value in entries.items()}
    return {name: value for name, value in table.items() if value is not None}


def entry_of(name: str, value: Any, hint: Any) -> Any:
    """Entry of one setting in its table, of the name and the type hint of its field."""
    if isinstance(value, Unread):
        return value.name
    if isinstance(value, Demonstrations):
        return os.path.abspath(value.path) if value.path else f"<{value}>"
    if dataclasses.is_dataclass(value) and "learner" in getattr(hint, "__metadata__", ()):
        return grammar.text_of(value)
    if isinstance(value, tuple) and all(isinstance(entry, PLAIN) for entry in value):
        return list(value)
    if name == "rewards" and isinstance(value, tuple | list):
        return [reward_table(reward) for reward in value]
    if isinstance(value, tuple) or dataclasses.is_dataclass(value):
        return f"<{words_of(value)}>"
    if callable(value):
        return object_name(value) if name == "network" else f"<{object_name(value)}>"
    return value


def reward_table(reward: Any) -> dict[str, Any]:
    """A reward's class and, of a dataclass, its settings; those that TOML cannot hold are described in <>."""
    if not dataclasses.is_dataclass(reward):
        return {"class": object_name(type(reward))}
    values = {f.name: getattr(reward, f.name) for f in dataclasses.fields(reward)}
    settings = {name: _plain_entry(value) for name, value in values.items() if value is not None}
    return {"class": object_name(type(reward)), "settings": settings}


def _plain_entry(value: Any) -> Any:
    if isinstance(value, tuple | list) and all(isinstance(entry, PLAIN) for entry in value):
        return list(value)
    return value if isinstance(value, PLAIN) else f"<{words_of(value)}>"


def is_described(entry: Any) -> bool:
    """Whether a table only describes a setting, in <>, so that it has to be given again."""
    return isinstance(entry, str) and entry[:1] == "<"


def same(before: Any, now: Any) -> bool:
    """Whether two values are equal and of the same types at every depth; NaN equals NaN, numpy's numbers plain ones."""
    before, now = (value.item() if isinstance(value, np.generic) else value for value in (before, now))
    if type(before) is not type(now):
        return False
    if isinstance(before, tuple | list):
        return len(before) == len(now) and all(map(same, before, now))
    if isinstance(before, dict):
        return list(before) == list(now) and all(map(same, before.values(), now.values()))
    if dataclasses.is_dataclass(before) and not isinstance(before, type | Demonstrations):
        return all(same(getattr(before, f.name), getattr(now, f.name)) for f in dataclasses.fields(before))
    return bool(before == now) or (before != before and now != now)


def difference(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first difference between saved settings and those given again, for an error message; '' if they agree."""
    for name in dict.fromkeys([*saved, *now]):
        before, given = (plain(table.get(name)) for table in (saved, now))
        if not same(before, given):
            words = ("nothing, or the default" if value is None else repr(value) for value in (before, given))
            return f"{name} = {', this one has '.join(words)}"
    return ""


def plain(value: Any) -> Any:
    """A value as it is read back from TOML: tuples as lists, numpy's numbers as plain ones."""
    if isinstance(value, tuple | list):
        return [plain(entry) for entry in value]
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items() if entry is not None}
    return value.item() if isinstance(value, np.generic) else value
