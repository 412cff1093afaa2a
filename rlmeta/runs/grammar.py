"""Parse and format settings as text: the command-line flags of a settings dataclass.

Every field is a flag, `--learning-rate` for `learning_rate`; its help is the string below the field. The same grammar
reads the command line and the saved plan of a run: 100k, 1M and 1_000_000 are numbers, layers are joined by x (64x64),
a comma separates values to compare.
"""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import inspect
import itertools
import textwrap
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from rlmeta.errors import SettingError
from rlmeta.learning.numbers import number, whole
from rlmeta.learning.settings import check_names
from rlmeta.runs.objects import load_object
from rlmeta.runs.shipped import agent_class, name_on_command_line

C = TypeVar("C")

SWITCHES = {"true": True, "false": False}
"""Values of a boolean flag, which may also be given without a value."""
SWITCH = "[true|false]"
"""Metavar of a boolean flag."""


@dataclass(frozen=True)
class Form:
    """Text format of one field: its metavar in the help, what an error says is expected, and its parser."""

    metavar: str
    expected: str
    parse: Callable[[str], Any]
    """Parses one value; raises ValueError for malformed text."""
    splits: bool = True
    """Whether a comma separates values."""


# ------------------------------------------------------------------------------------------------- values and texts


def learner(text: str, cls: type | None = None) -> Any:
    """Parse a learner's settings from text such as `reinforce num_steps=100 baseline=batch`; None for `none`.

    Args:
        text: a name, then settings.
        cls: the settings class, if it is known already.

    Raises:
        SettingError, UnknownNameError: there is no such learner, setting or value.
    """
    name, *words = text.split()
    if name == "none":
        return None
    cls, texts = cls or agent_class(name), dict(word.split("=", 1) for word in words if "=" in word)
    if len(texts) < len(words):
        raise SettingError(f"{text!r}: every word behind {name} is SETTING=VALUE, each setting once")
    check_names(cls, texts, text)
    return build(cls, texts)


def scalar(text: str) -> int | float | bool | str:
    """Parse text as a TOML scalar: an integer, float or boolean; anything else stays a string."""
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = table["value"]
    return value if len(table) == 1 and isinstance(value, (int, float, bool, str)) else text


def text_of(value: Any) -> str:
    """Format a value as text that parses back to it; a list is values to compare, a tuple joins layers or names."""
    if isinstance(value, list):
        return ",".join(text_of(item) for item in value)
    if isinstance(value, tuple):
        between = "+" if any(isinstance(item, str) for item in value) else "x"
        return between.join(text_of(item) for item in value) or "none"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        words = [
            f"{f.name}={text_of(changed[f.name])}" for f in dataclasses.fields(value) if changed[f.name] != f.default
        ]
        return " ".join([name_on_command_line(type(value)), *words])
    if callable(value):
        return f"{value.__module__}:{value.__qualname__}"
    return str(value)


def _layers(text: str) -> tuple[int, ...]:
    return () if text == "none" else tuple(whole(part) for part in text.split("x"))


def _names(choices: Mapping[str, Any], text: str) -> tuple[Any, ...]:
    return () if text == "none" else tuple(_lookup(choices, part.strip()) for part in text.split("+"))


def load_objects(text: str) -> tuple[Any, ...]:
    """Load the objects of names `package.module:Name` joined by +; a class is instantiated with its defaults."""
    loaded = () if text == "none" else tuple(load_object(part.strip()) for part in text.split("+"))
    try:
        return tuple(entry() if isinstance(entry, type) else entry for entry in loaded)
    except TypeError as error:
        raise SettingError(f"{text} can't be made with its defaults ({error}): give every setting one") from error


def form(hint: Any) -> Form:
    """Text format of a field's type hint."""
    if typing.get_origin(hint) is Annotated and "learner" in hint.__metadata__:
        return Form("NAME [SETTING=VALUE ...]", "a learner, with settings behind its name", learner, splits=False)
    if typing.get_origin(hint) is Annotated:  # PerLearner: a float, or floats to compare
        return Form("NUMBER[,...]", "a number", number)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union) and type(None) in arguments:
        some = form(next(argument for argument in arguments if argument is not type(None)))
        parse = some.parse
        return dataclasses.replace(some, parse=lambda text: None if text == "none" else parse(text))
    if origin is typing.Literal:
        choices = {str(choice): choice for choice in arguments}
        return Form("|".join(choices), f"one of {', '.join(choices)}", lambda text: _lookup(choices, text))
    if origin is tuple and typing.get_origin(arguments[0]) is typing.Literal:
        known = {choice: choice for choice in typing.get_args(arguments[0])}
        expected = f"{', '.join(known)} joined by +, or none"
        return Form(f"{'|'.join(known)}[+...]", expected, lambda text: _names(known, text))
    if origin is tuple and arguments[0] is not int:
        return Form("PACKAGE.MODULE:NAME[+...]", "package.module:Name, joined by +, or none", load_objects)
    if origin is tuple:
        return Form("INTxINT", "whole numbers joined by x, such as 64x64, or none", _layers)
    if origin is collections.abc.Callable:
        return Form("PACKAGE.MODULE:NAME", "package.module:Name", load_object)
    if hint is bool:
        return Form(SWITCH, "true or false", lambda text: _lookup(SWITCHES, text))
    if hint is int:
        return Form("INT", "a whole number", whole)
    if hint is float:
        return Form("NUMBER", "a number", number)
    return Form("TEXT", "text", str, splits=False)


def _lookup(choices: Mapping[str, Any], text: str) -> Any:
    if text not in choices:
        raise ValueError(text)
    return choices[text]


def forms(cls: type) -> dict[str, Form]:
    """Text format of every field of a dataclass, by name."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: form(hints[f.name]) for f in dataclasses.fields(cls)}


def values(cls: type, name: str, text: str, where: str = "") -> list[Any]:
    """Parse the comma-separated values of one field; errors name the flag, or `where`.

    Raises:
        SettingError: a value is malformed, or is given twice.
    """
    expected = forms(cls)[name]
    parsed: list[Any] = []
    for part in text.split(",") if expected.splits else [text]:
        try:
            value = expected.parse(part.strip())
        except SettingError as error:
            raise SettingError(f"{where or flag_of(name)}: {error}") from None
        except ValueError:
            raise SettingError(f"{where or flag_of(name)} is {part!r}, expected {expected.expected}") from None
        if value in parsed:
            layers = isinstance(value, tuple) and not any(isinstance(item, str) for item in value)
            hint = "; layers are joined by x, such as 64x64" if layers else ""
            raise SettingError(f"{where or flag_of(name)} compares {part!r} with itself: give each value once{hint}")
        parsed.append(value)
    return parsed


def build(cls: type[C], texts: Mapping[str, str]) -> C:
    """Build an instance of a dataclass from text, one value for each field.

    Raises:
        SettingError: a value is malformed, or there are several.
    """
    parsed = {name: values(cls, name, text) for name, text in texts.items()}
    for name, parsed_values in parsed.items():
        if len(parsed_values) > 1:
            raise SettingError(
                f"{flag_of(name)} is {texts[name]!r}, expected one value: only the agent's settings compare"
            )
    return cls(**{name: parsed_values[0] for name, parsed_values in parsed.items()})


def combinations(cls: type[C], texts: Mapping[str, str], per_learner: Sequence[str]) -> list[C]:
    """Build settings for every combination of the static values; per-learner values stay lists in each of them."""
    parsed = {name: values(cls, name, text) for name, text in texts.items()}
    batched = {name: listed if len(listed) > 1 else listed[0] for name, listed in parsed.items() if name in per_learner}
    static = {name: listed for name, listed in parsed.items() if name not in per_learner}
    return [cls(**batched, **dict(zip(static, chosen))) for chosen in itertools.product(*static.values())]


def flag_of(name: str) -> str:
    """Flag of a field: `learning_rate` is `--learning-rate`, `async_` is `--async`."""
    return "--" + name.rstrip("_").replace("_", "-")


def docs(cls: type) -> dict[str, str]:
    """Docstring below each field of a dataclass and of its base class, joined to one line."""
    texts: dict[str, str] = {}
    for owner in reversed(cls.__mro__[:-1]):
        texts |= _own_docs(owner)
    return texts


def _own_docs(cls: type) -> dict[str, str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):
        return {}
    body = typing.cast(ast.ClassDef, tree.body[0]).body
    texts = {}
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            texts[field.target.id] = " ".join(str(getattr(below.value, "value", "")).split())
    return texts
