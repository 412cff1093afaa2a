"""Exception classes; every message says what was given, what is expected and what to do."""

from __future__ import annotations

import difflib
import importlib.util
import re
import sys
from collections.abc import Iterable
from numbers import Integral
from typing import Any, Literal, get_args, get_origin

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters other than tab and newline, and unpaired surrogates, which cannot be encoded."""


def printable(text: str) -> str:
    """Escape the control characters of a text (`\\x1b`), so that it is safe to print in a terminal."""
    return _CONTROLS.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


class RlmetaError(Exception):
    """Base class of errors that a user can cause; the command line prints them on one line and exits with 2."""

    def __str__(self) -> str:
        return printable(super().__str__())


class SettingError(RlmetaError, ValueError):
    """Invalid or unknown settings, or settings that contradict each other."""


class SpaceError(RlmetaError, TypeError):
    """An observation or action space that is not supported, or differs from the expected one."""


class UnknownNameError(RlmetaError, LookupError):
    """An unknown name; `unknown_name` creates it with a list of the nearest names."""


class CheckpointError(RlmetaError):
    """A checkpoint that is missing, truncated, corrupted, or of another run."""


class RunExistsError(RlmetaError, FileExistsError):
    """A run folder that exists already and would be overwritten."""


class MissingExtraError(RlmetaError, ImportError):
    """A required optional package that is not installed."""


class DemonstrationError(RlmetaError, ValueError):
    """Demonstrations that are broken, empty, truncated, not finite, or of other spaces than the task's."""


class HookError(RlmetaError, TypeError):
    """A hook of a lifelong method that returned something that the learner cannot use."""


class EnvironmentFailedError(RlmetaError):
    """An environment raised, or its worker process died.

    The message has its error and source line; a note has the traceback in a worker process.
    """


class InexactResumeError(RlmetaError):
    """An environment that cannot be brought back to its state in a checkpoint."""


def require_choice(what: str, value: object, choices: Any) -> None:
    """Check that a value is one of a `Literal`.

    Args:
        what: name of the setting, for the message.
        value: to check.
        choices: a `Literal`, or a `Literal | None`.

    Raises:
        SettingError: the value is none of the choices.
    """
    parts = (choices,) if get_origin(choices) is Literal else get_args(choices)
    known = [choice for part in parts for choice in (get_args(part) or (None,))]
    if not (isinstance(value, str | None) and value in known):
        raise SettingError(f"{what} is {value!r}, expected one of {', '.join(map(repr, known))}")


def require_count(what: str, value: object, least: int = 1) -> None:
    """Check that a value is a whole number of at least `least`.

    Args:
        what: name of the setting, for the message.
        value: to check.
        least: smallest allowed.

    Raises:
        SettingError: the value is no such number.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise SettingError(f"{what} is {value!r}, expected a whole number, at least {least}")


LONGEST_LIST = 600
"""Largest number of characters of the known names in a message; longer lists are left to `rlmeta list`."""


def nearest_names(name: str, known: Iterable[str], most: int = 4) -> list[str]:
    """Known names that are similar to `name`, the nearest first; often none.

    A name is similar by an edit distance of one or two, by sharing most letters in order, or by containing `name`;
    case is ignored.
    """
    lowered = {candidate.lower(): candidate for candidate in sorted(known, reverse=True)}
    lower_name = name.lower()
    alike = difflib.get_close_matches(lower_name, lowered, n=20, cutoff=0.5)
    slips = {match: _edit_distance(lower_name, match) for match in sorted(alike, reverse=True)}  # v1 before v0
    near = [match for match in sorted(slips, key=slips.__getitem__) if _is_near(lower_name, match, slips[match])]
    whole = [candidate for candidate in sorted(lowered) if len(lower_name) >= 4 and lower_name in candidate]
    return [lowered[candidate] for candidate in dict.fromkeys([*near, *whole])][:most]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggestion `: did you mean ...?` of similar names, or empty; the dashes of flags are ignored."""
    bare = {candidate.removeprefix("--"): candidate for candidate in known}
    nearest = [bare[match] for match in nearest_names(name.removeprefix("--"), bare)]
    return f": did you mean {', '.join(nearest)}?" if nearest else ""


def _is_near(first: str, second: str, slips: int) -> bool:
    length = max(len(first), len(second))
    return slips <= max(1, length // 4) or difflib.SequenceMatcher(None, first, second).ratio() >= 0.75


def _edit_distance(first: str, second: str) -> int:
    """Edit distance (Damerau-Levenshtein): insertions, deletions, replacements and swaps of neighbouring letters."""
    rows = [list(range(len(second) + 1))]
    for i, a in enumerate(first, 1):
        row = [i]
        for j, b in enumerate(second, 1):
            cost = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (a != b))
            if i > 1 and j > 1 and a == second[j - 2] and first[i - 2] == b:
                cost = min(cost, rows[-2][j - 2] + 1)
            row.append(cost)
        rows.append(row)
    return rows[-1][-1]


def unknown_name(kind: str, name: str, known: Iterable[str], listed_by: str = "`rlmeta list`") -> UnknownNameError:
    """Create an `UnknownNameError` that lists similar known names, or all if none is similar.

    Args:
        kind: of thing that is named, such as "task".
        name: the unknown name.
        known: all known names.
        listed_by: command that lists them, for the message if there are too many.
    """
    known = sorted(known)
    nearest = nearest_names(name, known)
    everything = ", ".join(known)
    if nearest:
        hint = f"did you mean {', '.join(nearest)}?"
    elif len(everything) > LONGEST_LIST:
        hint = f"{listed_by} shows what can be named"
    else:
        hint = f"expected one of {everything}" if known else "there is none"
    return UnknownNameError(f"unknown {kind} {name!r}: {hint}")


def missing_extra(package: str, extra: str, purpose: str) -> MissingExtraError:
    """Create a `MissingExtraError` that names the extra with `package`."""
    return MissingExtraError(f"{purpose} needs {package}, which is not installed: pip install 'rlmeta[{extra}]'")


def require_extra(package: str, extra: str, purpose: str) -> None:
    """Check that an optional package is installed, without importing it.

    Raises:
        MissingExtraError: the package is not installed.
    """
    there = sys.modules[package] is not None if package in sys.modules else importlib.util.find_spec(package)
    if not there:
        raise missing_extra(package, extra, purpose)
