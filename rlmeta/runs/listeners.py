"""Listeners: event hooks of the training loop, for progress bars, curves and trackers (see `rlmeta.report`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlmeta.runs.run import Run


class Listener:
    """Event hooks of a run; each does nothing unless overridden."""

    def open(self, run: Run, done: int) -> None:
        """Called when training starts, or resumes after `done` iterations; the folder has a checkpoint by then."""

    def line(self, run: Run, done: int, line: Mapping[str, Any]) -> None:
        """Called with every line of metrics: `iteration`, `env_steps`, and lists with one number a learner."""

    def finish(self, run: Run) -> None:
        """Called after the final evaluation, once the summary is written."""

    def close(self) -> None:
        """Called last, however the run ended."""
