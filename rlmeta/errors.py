"""One exception class per kind of mistake; each message says what was given, what was expected and what to do."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin


class RlmetaError(Exception):
    """Base of every error a user of rlmeta can cause; the command line prints it as one line and exits with 2."""


class SettingError(RlmetaError, ValueError):
    """A wrong value, an unknown setting, or settings that contradict each other."""


class SpaceError(RlmetaError, TypeError):
    """An observation or action space that is not supported, or not the one that was expected."""


class UnknownNameError(RlmetaError, LookupError):
    """A name that resolves to nothing; build it with `unknown_name` to list the nearest ones."""


class CheckpointError(RlmetaError):
    """A checkpoint that is missing, truncated, corrupted, or of something else."""


class RunExistsError(RlmetaError, FileExistsError):
    """A run folder that is there already and would be overwritten."""


class MissingExtraError(RlmetaError, ImportError):
    """An optional package that is needed now and not installed."""


class DemonstrationError(RlmetaError, ValueError):
    """Demonstrations that are broken, empty, cut, not numbers, or of other spaces than the task's."""


class HookError(RlmetaError, TypeError):
    """A hook of a lifelong method that gave back something else than the learner can use."""


class InexactResumeError(RlmetaError):
    """An environment that could not be brought back to where the checkpoint left it."""


def require_choice(what: str, value: object, choices: Any) -> None:
    """Refuse a value that is none of a `Literal`'s.

    Args:
        what: the caller's name for it, which the message repeats.
        value: what was given.
        choices: the `Literal`, or one `| None`.

    Raises:
        SettingError: it is another.
    """
    parts = (choices,) if get_origin(choices) is Literal else get_args(choices)
    known = [choice for part in parts for choice in (get_args(part) or (None,))]
    if not (isinstance(value, str | None) and value in known):
        raise SettingError(f"{what} is {value!r}, expected one of {', '.join(map(repr, known))}")


LONGEST_LIST = 600
"""Characters of all the known names in a message; more of them are left to `rlmeta list`."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """An `UnknownNameError` for `name` that lists the nearest of the `known` names, or all where none is near."""
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    if not nearest:
        lowered = {candidate.lower(): candidate for candidate in known}
        nearest = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=4, cutoff=0.5)]
    everything = ", ".join(known)
    if nearest:
        hint = f"did you mean {', '.join(nearest)}?"
    elif len(everything) > LONGEST_LIST:
        hint = "`rlmeta list` shows what can be named"
    else:
        hint = f"expected one of {everything}" if known else "there is none"
    return UnknownNameError(f"unknown {kind} {name!r}: {hint}")


def missing_extra(package: str, extra: str, purpose: str) -> MissingExtraError:
    """A `MissingExtraError` that says which extra brings `package`."""
    return MissingExtraError(f"{purpose} needs {package}, which is not installed: pip install 'rlmeta[{extra}]'")


def require_extra(package: str, extra: str, purpose: str) -> None:
    """Refuse to go on without an optional package, which is not imported yet.

    Raises:
        MissingExtraError: it is not installed.
    """
    there = sys.modules[package] is not None if package in sys.modules else importlib.util.find_spec(package)
    if not there:
        raise missing_extra(package, extra, purpose)
