"""Ctrl-C and SIGTERM during a run: the iteration is finished and the run saved, then it ends."""

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
"""Seconds after which a call of an environment may never end: nobody should wait for its iteration."""

SAID = {
    signal.SIGINT: "finishing this iteration and saving; Ctrl-C again stops at once",
    signal.SIGTERM: "terminated: finishing this iteration and saving",
}


class Interruption:
    """Whether the user, or the system, wants the run to end.

    The first signal waits for the iteration, or ends at once what `at_once` marks (the final evaluation, before which
    the run was saved); so does a Ctrl-C where an environment has not answered for `HANGS` seconds. A second one is
    handled as if the run had no handlers. After SIGTERM the process ends by it once everything is closed, as whoever
    sent it expects.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._at_once = False

    def __bool__(self) -> bool:
        return self.received is not None

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Within, signals are noted; afterwards handlers are as before, and SIGTERM reaches them."""
        try:
            for number in STOPPING:
                self._before[number] = signal.signal(number, self._note)
        except ValueError:  # not in the main thread: whoever runs us handles them
            self._before = {}
        try:
            yield
        finally:
            self._restore()
        if self.received is signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, a signal raises KeyboardInterrupt."""
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
        # by the file's number: a print in a signal handler may meet another one half done
        with contextlib.suppress(OSError):
            os.write(2, f"{SAID[self.received]}\n".encode())

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
