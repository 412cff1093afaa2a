"""Tables that describe settings in `config.toml`."""

from __future__ import annotations

import dataclasses
import os
import typing
from typing import Any

from rlmeta.data.demonstrations import Demonstrations, Unread
from rlmeta.learning.comparisons import PLAIN, object_name, words_of
from rlmeta.runs import grammar


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
