"""Listeners that forward metrics to trackers and plot finished runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlmeta.errors import RlmetaError, SettingError
from rlmeta.report.curves import write_curve
from rlmeta.report.matrices import write_matrix
from rlmeta.report.trackers import Tracker, TrackerFactory
from rlmeta.runs.listeners import Listener
from rlmeta.runs.run import Run


class Tracking(Listener):
    """Forwards metrics to a tracker, which `factory` opens once the run's folder exists."""

    def __init__(self, factory: TrackerFactory) -> None:
        self._factory = factory
        self._tracker: Tracker | None = None

    def open(self, run: Run, iteration: int) -> None:
        """Open the tracker.

        Raises:
            RlmetaError: it cannot be opened; the run is saved by then, and the message says how to resume it.
        """
        try:
            self._tracker = self._factory(run)
        except RlmetaError as error:
            if run.folder is None:
                raise
            saved = f"the run is saved, resume it with `rlmeta resume {run.folder}`"
            raise type(error)(f"{error}; {saved}") from error
        except OSError as error:
            why = f"a tracker can't be opened ({error})"
            raise SettingError(f"{why}; the run is saved, resume it with `rlmeta resume {run.folder}`") from error

    def log(self, run: Run, iteration: int, log_entry: Mapping[str, Any]) -> None:
        """Pass the metrics that have a number for every learner to the tracker."""
        assert self._tracker is not None
        metrics = {name: value for name, value in log_entry.items() if isinstance(value, list)}
        self._tracker.log(log_entry["env_steps"], metrics)

    def close(self) -> None:
        """Close the tracker, if it was opened."""
        if self._tracker is not None:
            self._tracker.close()


class Pictures(Listener):
    """Plots a finished run's learning curve, and its score matrix on a stream, into its folder."""

    def finish(self, run: Run) -> None:
        """Write `curve.png`, and `matrix.png` for a stream."""
        if run.folder is None:
            return
        write_curve(run)
        if run.stream is not None:
            write_matrix(run)
