"""What listens to every run: trackers, and the pictures in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlmeta.report.curves import write_curve
from rlmeta.report.matrices import write_matrix
from rlmeta.report.trackers import Tracker, TrackerFactory
from rlmeta.runs.listeners import Listener
from rlmeta.runs.run import Run


class Tracking(Listener):
    """Hands metrics on to a tracker, which `factory` opens once the run and its folder are there."""

    def __init__(self, factory: TrackerFactory) -> None:
        self._factory = factory
        self._tracker: Tracker | None = None

    def open(self, run: Run, done: int) -> None:
        """Open the tracker."""
        self._tracker = self._factory(run)

    def line(self, run: Run, done: int, line: Mapping[str, Any]) -> None:
        """Log what has a number for every learner."""
        assert self._tracker is not None
        self._tracker.log(line["env_steps"], {name: value for name, value in line.items() if isinstance(value, list)})

    def close(self) -> None:
        """Close the tracker, if it was opened."""
        if self._tracker is not None:
            self._tracker.close()


class Pictures(Listener):
    """Draws the learning curve of a run that has ended, and its matrix where it is on a stream, into its folder."""

    def finish(self, run: Run) -> None:
        """Draw them."""
        if run.folder is None:
            return
        write_curve(run)
        if run.stream is not None:
            write_matrix(run)
