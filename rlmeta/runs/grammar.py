"""Settings as text: the flags of a dataclass, how a value is written, and what a text means.

A flag is a field, `--learning-rate` for `learning_rate`; its help is the string below the field. The same grammar reads
the command line and the saved plan of a run: 100k, 1M and 1_000_000 are numbers, layers are joined by x (64x64), a
comma separates values to compare.
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
"""What a flag that may stand alone can be."""
SWITCH = "[true|false]"
"""What the help shows behind a flag that may stand alone."""


@dataclass(frozen=True)
class Form:
    """How the values of one field look."""

    metavar: str
    expected: str
    parse: Callable[[str], Any]
    """From text to one value; a ValueError where it is none."""
    splits: bool = True
    """Whether a comma separates values."""


# ------------------------------------------------------------------------------------------------- values and texts


def learner(text: str, cls: type | None = None) -> Any:
    """The settings that `reinforce num_steps=100 baseline=batch` names; None for `none`.

    Args:
        text: a name, then settings.
        cls: what the name stands for, where that is known already.

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
    """A text as TOML reads it: an int, a float, a bool; anything else is a string."""
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = table["value"]
    return value if len(table) == 1 and isinstance(value, (int, float, bool, str)) else text


def text_of(value: Any) -> str:
    """The text that reads back as the value; a list is values to compare, a tuple joins layers or names."""
    if isinstance(value, list):
        return ",".join(text_of(one) for one in value)
    if isinstance(value, tuple):
        between = "+" if any(isinstance(one, str) for one in value) else "x"
        return between.join(text_of(one) for one in value) or "none"
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
    """What the names joined by + stand for; a class is made with its defaults."""
    loaded = () if text == "none" else tuple(load_object(part.strip()) for part in text.split("+"))
    return tuple(one() if isinstance(one, type) else one for one in loaded)


def form(hint: Any) -> Form:
    """How the values of a type hint look."""
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
    """The form of every field of a dataclass."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: form(hints[f.name]) for f in dataclasses.fields(cls)}


def values(cls: type, name: str, text: str, where: str = "") -> list[Any]:
    """The comma-separated values of one field.

    Raises:
        SettingError: a value has another form than the field's, or is given twice.
    """
    expected = forms(cls)[name]
    found: list[Any] = []
    for part in text.split(",") if expected.splits else [text]:
        try:
            value = expected.parse(part.strip())
        except SettingError as error:
            raise SettingError(f"{where or flag_of(name)}: {error}") from None
        except ValueError:
            raise SettingError(f"{where or flag_of(name)} is {part!r}, expected {expected.expected}") from None
        if value in found:
            layers = isinstance(value, tuple) and not any(isinstance(one, str) for one in value)
            hint = "; layers are joined by x, such as 64x64" if layers else ""
            raise SettingError(f"{where or flag_of(name)} compares {part!r} with itself: give each value once{hint}")
        found.append(value)
    return found


def build(cls: type[C], texts: Mapping[str, str]) -> C:
    """An instance of a dataclass whose fields take one value each.

    Raises:
        SettingError: a value has another form than the field's, or there are several.
    """
    parsed = {name: values(cls, name, text) for name, text in texts.items()}
    for name, found in parsed.items():
        if len(found) > 1:
            raise SettingError(
                f"{flag_of(name)} is {texts[name]!r}, expected one value: only the agent's settings compare"
            )
    return cls(**{name: found[0] for name, found in parsed.items()})


def combinations(cls: type[C], texts: Mapping[str, str], per_learner: Sequence[str]) -> list[C]:
    """The settings: one for every combination of the static values, those per learner stay lists."""
    parsed = {name: values(cls, name, text) for name, text in texts.items()}
    one_batch = {name: found if len(found) > 1 else found[0] for name, found in parsed.items() if name in per_learner}
    static = {name: found for name, found in parsed.items() if name not in per_learner}
    return [cls(**one_batch, **dict(zip(static, chosen))) for chosen in itertools.product(*static.values())]


def flag_of(name: str) -> str:
    """`learning_rate` as `--learning-rate`; `async_` as `--async`."""
    return "--" + name.rstrip("_").replace("_", "-")


def docs(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass and of the one it extends, on one line."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__[:-1]):
        found |= _own_docs(owner)
    return found


def _own_docs(cls: type) -> dict[str, str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):
        return {}
    body = typing.cast(ast.ClassDef, tree.body[0]).body
    found = {}
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            found[field.target.id] = " ".join(str(getattr(below.value, "value", "")).split())
    return found
