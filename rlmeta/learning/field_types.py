"""Whether the values of a settings class are of the kinds that its fields declare."""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import types
import typing
from numbers import Integral, Real
from typing import Any

from rlmeta.errors import SettingError


def check_types(settings: Any) -> None:
    """Refuse a value of another kind than its field's: numbers, whole numbers, switches, choices, layers, functions.

    True is no number here, NaN is none either, and a number is no switch. What a range allows is for `require_range`.

    Raises:
        SettingError: names the field, what it is and what is expected.
    """
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        expected = _expected(value, hints[f.name])
        if expected:
            raise SettingError(f"{type(settings).__name__}: {f.name} is {shown(value)}, expected {expected}")


def shown(value: Any) -> str:
    """A value as a sentence shows it: by its kind where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"a {type(value).__name__}"


def _expected(value: Any, hint: Any) -> str:
    """What a field of this hint expects, '' where the value is that, or where the hint says nothing we know."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if "per learner" in getattr(hint, "__metadata__", ()):
        one = value if isinstance(value, list | tuple) and len(value) else [value]
        return "" if all(map(_is_number, one)) else "a number, or some to compare"
    if origin in (typing.Union, types.UnionType):
        known = [_expected(value, argument) for argument in arguments if argument is not type(None)]
        none = type(None) in arguments
        return "" if not all(known) or (none and value is None) else f"{known[0]}{' or None' if none else ''}"
    if origin is typing.Literal:
        return "" if value in arguments else f"one of {', '.join(map(str, arguments))}"
    if origin is tuple and arguments[0] is int:
        fits = isinstance(value, list | tuple) and all(_is_whole(size) and size >= 1 for size in value)
        return "" if fits else "a tuple of whole numbers from 1, such as (64, 64), or ()"
    if origin is collections.abc.Callable:
        return "" if callable(value) else "a function"
    if hint in (int, float) and isinstance(value, list | tuple):
        return "one number: a list compares settings that are per learner, others are trained one after another"
    kinds = {
        bool: (isinstance(value, bool), "True or False"),
        int: (_is_whole(value), "a whole number"),
        float: (_is_number(value), "a number"),
        str: (isinstance(value, str), "text"),
    }
    fits, expected = kinds.get(hint, (True, ""))
    return "" if fits else expected


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)
