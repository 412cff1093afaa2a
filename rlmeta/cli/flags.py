"""Parse command-line flags of settings dataclasses to text, which `rlmeta.runs.grammar` parses to values."""

from __future__ import annotations

import dataclasses
import types
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from rlmeta.cli.arguments import Answered
from rlmeta.errors import SettingError, did_you_mean
from rlmeta.runs.grammar import SWITCH, SWITCHES, docs, flag_of, forms, text_of


def read(
    prog: str, description: str, groups: Mapping[str, tuple[type, Mapping[str, Any]]], arguments: Sequence[str]
) -> dict[str, dict[str, str]]:
    """Parse the flags of several dataclasses; `--help` prints them and exits.

    Args:
        prog: the command, for the help.
        description: the description, for the help.
        groups: by group name, a dataclass and values that replace its defaults.
        arguments: the command line without positional arguments.

    Returns:
        The text of every flag, `{group: {field: text}}`, defaults included.

    Raises:
        SettingError: an unknown flag, a flag without its value, or one that is given twice.
    """
    fields = [(name, shape) for cls, _ in groups.values() for name, shape in forms(cls).items()]
    joined = _joined({flag_of(name): shape.metavar == SWITCH for name, shape in fields}, arguments, prog)
    import tyro

    classes = [_texts_class(tyro, title, cls, dict(replaced)) for title, (cls, replaced) in groups.items()]
    outer = dataclasses.make_dataclass(
        "Flags", [(title, cls, dataclasses.field(default_factory=cls)) for title, cls in zip(groups, classes)]
    )
    try:
        parsed: Any = tyro.cli(
            outer, prog=prog, description=description, args=joined, config=(tyro.conf.OmitArgPrefixes,)
        )
    except SystemExit as stop:  # after its help
        raise Answered(stop.code) from None
    return {title: dataclasses.asdict(getattr(parsed, title)) for title in groups}


def _texts_class(tyro: types.ModuleType, title: str, cls: type, replaced: Mapping[str, Any]) -> type:
    """Create a dataclass with the same fields, all as text, for tyro."""
    about, shapes = docs(cls), forms(cls)
    fields = []
    for field in dataclasses.fields(cls):
        shape = shapes[field.name]
        flag = tyro.conf.arg(
            name=flag_of(field.name).removeprefix("--"), help=about.get(field.name, ""), metavar=shape.metavar
        )
        default = text_of(replaced.get(field.name, field.default))
        fields.append((field.name, Annotated[str, flag], dataclasses.field(default=default)))
    text_class = dataclasses.make_dataclass(title.title().replace("_", ""), fields)
    text_class.__doc__ = (cls.__doc__ or "").strip().splitlines()[0]
    return text_class


def _joined(known: Mapping[str, bool], arguments: Sequence[str], prog: str) -> list[str]:
    """Normalise arguments to `--flag=value`.

    Args:
        known: whether a flag is a switch (boolean), by flag.
        arguments: the command line without positional arguments.
        prog: the command, for error messages.

    Raises:
        SettingError: an unknown flag, a flag without its value, or one that is given twice.
    """
    joined: dict[str, str] = {}
    rest = deque(arguments)
    while rest:
        token = rest.popleft()
        if token in ("-h", "--help"):
            return ["--help"]
        if not token.startswith("--"):
            raise SettingError(f"unexpected {token!r}: flags follow the names, see `{prog} --help`")
        flag, equals, value = token.partition("=")
        flag = flag.replace("_", "-")
        if flag not in known and known.get(flag.replace("--no-", "--", 1)):
            flag, equals, value = flag.replace("--no-", "--", 1), "=", "false"
        if flag not in known:
            raise SettingError(f"unknown flag {flag}{did_you_mean(flag, known) or f': see `{prog} --help`'}")
        if not equals:
            value = _value_after(flag, known[flag], rest)
        if flag in joined:
            raise SettingError(f"{flag} is given twice: values to compare are separated by commas")
        joined[flag] = value
    return [f"{flag}={value}" for flag, value in joined.items()]


def _value_after(flag: str, switch: bool, rest: deque[str]) -> str:
    """Take the value that follows a flag from the rest of the arguments; a switch without one is true."""
    if switch and not (rest and set(rest[0].split(",")) <= set(SWITCHES)):
        return "true"
    if not rest or rest[0].startswith("--"):
        raise SettingError(f"{flag} needs a value")
    return rest.popleft()
