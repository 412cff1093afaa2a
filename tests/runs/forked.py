"""Work in a forked process, which may die, hang or fail: what came of it, as a value."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlmeta.errors import RlmetaError

ENDED, REFUSED, RAISED, DIED, HUNG = "ended", "refused", "raised", "died", "hung"
"""It gave a value; an error of rlmeta's; any other error; no word; nothing in time."""
PATIENCE = 120.0
"""Seconds after which work hangs."""
ROOM = 4 << 30
"""Bytes that a process may take besides those that it begins with."""

_write = os.write


@dataclass(frozen=True)
class Outcome:
    """What came of the work, and what it said: its value, which is JSON, or its error."""

    kind: str
    said: Any


def forked(work: Callable[[], Any], patience: float = PATIENCE) -> Outcome:
    """Do the work in a process of its own, which neither prints nor takes more than `ROOM`.

    Args:
        work: gives a value that is JSON.
        patience: seconds after which it is killed.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _answer(work, writing)
    os.close(writing)
    try:
        data, ended = _hear(reading, patience)
    finally:
        os.close(reading)
    if not ended:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not ended:
        return Outcome(HUNG, f"for {patience} s")
    return Outcome(*json.loads(data)) if data else Outcome(DIED, f"with status {os.waitstatus_to_exitcode(status)}")


def _hear(reading: int, patience: float) -> tuple[bytes, bool]:
    """What is written into the pipe, and whether that came to an end in time."""
    data, end = b"", time.monotonic() + patience
    while select.select([reading], [], [], max(0.0, end - time.monotonic()))[0]:
        block = os.read(reading, 1 << 16)
        if not block:
            return data, True
        data += block
    return data, False


def _answer(work: Callable[[], Any], writing: int) -> None:
    """Do the work and write what came of it; never returns."""
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (1, 2):
            os.dup2(nothing, stream)
        warnings.simplefilter("ignore")
        with open("/proc/self/statm") as statm:
            taken = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, taken + ROOM))
        try:
            answer = [ENDED, work()]
        except RlmetaError as error:
            answer = [REFUSED, f"{type(error).__name__}: {error}"]
        except BaseException as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            answer = [RAISED, f"{type(error).__name__}: {error} at {frame.filename}:{frame.lineno}"]
        rest = json.dumps(answer).encode()
        while rest:
            rest = rest[_write(writing, rest) :]
    finally:
        os._exit(0)
