"""Type checks of settings: values must be of the types that the fields of the class declare."""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from rlmeta.errors import SettingError


def check_types(settings: Any) -> None:
    """Check the types of all fields: numbers, whole numbers, switches, choices, layers, functions.

    True is no number here, NaN is none either, and a number is no switch. What a range allows is for `require_range`.

    Raises:
        SettingError: names the field, what it is and what is expected.
    """
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    check_values(type(settings), values, type(settings).__name__)


def check_values(settings_class: type, values: Mapping[str, Any], where: str) -> None:
    """Check the types of values before they become settings; names without a field are ignored."""
    hints = typing.get_type_hints(settings_class, include_extras=True)
    for name, value in values.items():
        if name in hints:
            require_type(value, hints[name], f"{where}: {name}")


def require_type(value: Any, hint: Any, where: str) -> None:
    """Check that a value is of a type; `where` begins the error message."""
    expected = _expected(value, hint)
    if expected:
        raise SettingError(f"{where} is {shown(value)}, expected {expected}")


def shown(value: Any) -> str:
    """Format a value for an error message: a long one by its type."""
    text = repr(value)
    return text if len(text) <= 80 else f"a {type(value).__name__}"


def _expected(value: Any, hint: Any) -> str:
    """Describe what a field of this type hint expects; '' if the value fits, or the hint is unknown."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if "per learner" in getattr(hint, "__metadata__", ()):
        values = value if isinstance(value, list | tuple) and len(value) else [value]
        return "" if all(map(_is_number, values)) else "a number, or some to compare"
    if origin in (typing.Union, types.UnionType):
        known = [_expected(value, argument) for argument in arguments if argument is not type(None)]
        none = type(None) in arguments
        return "" if not all(known) or (none and value is None) else f"{known[0]}{' or None' if none else ''}"
    if origin is typing.Literal:
        fits = isinstance(value, str | int) and value in arguments
        return "" if fits else f"one of {', '.join(map(str, arguments))}"
    if origin is tuple and arguments[:1] == (int,):
        fits = isinstance(value, list | tuple) and all(_is_whole(size) and size >= 1 for size in value)
        return "" if fits else "a tuple of whole numbers from 1, such as (64, 64), or ()"
    if origin is tuple and typing.get_origin(arguments[0]) is typing.Literal:
        choices = typing.get_args(arguments[0])
        fits = isinstance(value, list | tuple) and all(isinstance(each, str) and each in choices for each in value)
        return "" if fits else f"a tuple of {', '.join(choices)}, or ()"
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
    return isinstance(value, Integral) and not isinstance(value, bool) and abs(int(value)) < 1 << 63


def _is_number(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return not math.isnan(float(value))
    except OverflowError:  # a whole number beyond what a float can hold
        return False
