"""Handling of Ctrl-C and SIGTERM: finish the iteration, save the run, then stop."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

from rlmeta.envs.gymnasium.rows import seconds_in_call

STOPPING = (signal.SIGINT, signal.SIGTERM)
HANGS = 3.0
"""Seconds after which a call of an environment counts as hanging, so that Ctrl-C does not wait for its iteration."""

MESSAGES = {
    signal.SIGINT: "finishing this iteration and saving; Ctrl-C again stops at once",
    signal.SIGTERM: "terminated: finishing this iteration and saving",
}


class Interruption:
    """Signal handlers of a run for Ctrl-C (SIGINT) and SIGTERM; true once a signal has asked it to stop.

    The first signal lets the iteration finish. It raises KeyboardInterrupt immediately within `at_once` (the final
    evaluation, before which the run was saved), as does Ctrl-C if an environment has not answered for `HANGS` seconds.
    A second signal is handled as before the run (usually it stops at once). After SIGTERM the process terminates by
    that signal once everything is closed.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._at_once = False

    def __bool__(self) -> bool:
        return self.received is not None

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Install the handlers for the block; afterwards restore the old ones, and re-send SIGTERM if it came."""
        try:
            for number in STOPPING:
                self._before[number] = signal.signal(number, self._note)
        except ValueError:  # only the main thread may install handlers
            self._before = {}
        try:
            yield
        finally:
            self._restore()
        if self.received is signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Make a signal raise KeyboardInterrupt within the block."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()
        if self._at_once or (seconds_in_call() >= HANGS and self.received is signal.SIGINT):
            raise KeyboardInterrupt
        # os.write: a print in a signal handler may interrupt another print
        with contextlib.suppress(OSError):
            os.write(2, f"{MESSAGES[self.received]}\n".encode())

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
