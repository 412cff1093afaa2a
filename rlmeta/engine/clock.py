"""Time split: seconds spent acting, in environments, learning and evaluating, by one stopwatch."""

from __future__ import annotations

import threading
import time


class Clock(threading.local):
    """Seconds by part, every thread its own. `switch(part)` ends the running part and starts another."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._part = ""
        self._since = time.perf_counter()

    def switch(self, part: str) -> None:
        """From now on the time counts for `part`."""
        now = time.perf_counter()
        if self._part:
            self.seconds[self._part] = self.seconds.get(self._part, 0.0) + now - self._since
        self._part, self._since = part, now

    def reset(self) -> None:
        """Forget what was measured."""
        self.seconds, self._part = {}, ""


clock = Clock()
"""The stopwatch of the calling thread."""
