"""Comparison of settings with those that a file holds: equal at every depth, and described alike in every process."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from rlmeta.data.demonstrations import Demonstrations

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


def is_described(entry: Any) -> bool:
    """Whether a table only describes a setting, in <>, so that it has to be given again."""
    return isinstance(entry, str) and entry[:1] == "<"


def same(before: Any, now: Any, *, strict: bool = True) -> bool:
    """Whether two values are equal and of the same types at every depth; NaN equals NaN, numpy's numbers plain ones.

    Args:
        strict: whether 1 and 1.0 are two values.
    """
    before, now = (value.item() if isinstance(value, np.generic) else value for value in (before, now))
    if not strict and all(type(value) in (int, float) for value in (before, now)):
        return bool(before == now) or (before != before and now != now)
    if type(before) is not type(now):
        return False
    if isinstance(before, tuple | list):
        return len(before) == len(now) and all(map(partial(same, strict=strict), before, now))
    if isinstance(before, dict):
        return list(before) == list(now) and all(map(partial(same, strict=strict), before.values(), now.values()))
    if dataclasses.is_dataclass(before) and not isinstance(before, type | Demonstrations):
        return all(same(getattr(before, f.name), getattr(now, f.name)) for f in dataclasses.fields(before))
    return bool(before == now) or (before != before and now != now)


MODULE = re.compile(r"[\w.]+:(?=[\w<])")
"""Matches the module in `package.module:Name`."""


def _without_modules(value: Any) -> Any:
    """A description without modules: a script's `__main__:f` is `script:f` where it is imported."""
    return MODULE.sub("", value) if is_described(value) else value


def difference(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first difference between saved settings and those given again, for an error message; '' if they agree."""
    for name in dict.fromkeys([*saved, *now]):
        before, given = (_without_modules(plain(table.get(name))) for table in (saved, now))
        if not same(before, given, strict=False):
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
