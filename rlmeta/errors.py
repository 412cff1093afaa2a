"""One exception class per kind of mistake; each message says what was given, what was expected and what to do."""

from __future__ import annotations

import difflib
import importlib.util
import re
import sys
from collections.abc import Iterable
from numbers import Integral
from typing import Any, Literal, get_args, get_origin

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal obeys instead of showing it, and halves of letters, which can't be written; not tab and newline."""


def printable(text: str) -> str:
    """A text as a terminal may show it, with control characters escaped (`\\x1b`): names, messages, folders, cells."""
    return _CONTROLS.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


class RlmetaError(Exception):
    """Base of every error a user of rlmeta can cause; the command line prints it as one line and exits with 2."""

    def __str__(self) -> str:
        return printable(super().__str__())


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


class EnvironmentFailedError(RlmetaError):
    """An environment raised, or its worker process died; the message holds its error and where, a note the traceback of
    a worker."""


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


def require_count(what: str, value: object) -> None:
    """Refuse a value that is no whole number of at least 1.

    Args:
        what: the caller's name for it, which the message repeats.
        value: what was given.

    Raises:
        SettingError: it is another.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise SettingError(f"{what} is {value!r}, expected a whole number, at least 1")


LONGEST_LIST = 600
"""Characters of all the known names in a message; more of them are left to `rlmeta list`."""


def nearest_names(name: str, known: Iterable[str], most: int = 4) -> list[str]:
    """Those of the `known` names that `name` may have been meant for, the nearest first; often none.

    Near is what a slip of the finger or two makes of a name, what shares most of its letters in their order, and what
    a name of some length is a part of; the case of letters does not count.
    """
    lowered = {candidate.lower(): candidate for candidate in sorted(known, reverse=True)}
    given = name.lower()
    alike = difflib.get_close_matches(given, lowered, n=20, cutoff=0.5)
    slips = {candidate: _slips(given, candidate) for candidate in sorted(alike, reverse=True)}  # v1 before v0
    near = sorted((one for one, count in slips.items() if _is_near(given, one, count)), key=slips.__getitem__)
    whole = [candidate for candidate in sorted(lowered) if len(given) >= 4 and given in candidate]
    return [lowered[candidate] for candidate in dict.fromkeys([*near, *whole])][:most]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`: did you mean ...?`, or nothing where nothing is near; the dashes of flags make nothing alike."""
    bare = {candidate.removeprefix("--"): candidate for candidate in known}
    nearest = [bare[match] for match in nearest_names(name.removeprefix("--"), bare)]
    return f": did you mean {', '.join(nearest)}?" if nearest else ""


def _is_near(one: str, other: str, slips: int) -> bool:
    length = max(len(one), len(other))
    return slips <= max(1, length // 4) or difflib.SequenceMatcher(None, one, other).ratio() >= 0.75


def _slips(one: str, other: str) -> int:
    """Letters to insert, delete, replace, or exchange with their neighbour to turn one text into the other."""
    rows = [list(range(len(other) + 1))]
    for i, a in enumerate(one, 1):
        row = [i]
        for j, b in enumerate(other, 1):
            cost = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (a != b))
            if i > 1 and j > 1 and a == other[j - 2] and one[i - 2] == b:
                cost = min(cost, rows[-2][j - 2] + 1)
            row.append(cost)
        rows.append(row)
    return rows[-1][-1]


def unknown_name(kind: str, name: str, known: Iterable[str], listed_by: str = "`rlmeta list`") -> UnknownNameError:
    """An `UnknownNameError` for `name` that lists the nearest of the `known` names, or all where none is near.

    Args:
        kind: of name.
        name: as it was given.
        known: what it could have been.
        listed_by: what shows them where they are too many for a message.
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
