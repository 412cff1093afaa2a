"""Listeners: event hooks of the training loop, for progress bars, curves and trackers (see `rlmeta.report`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlmeta.runs.run import Run


class Listener:
    """Event hooks of a run; each does nothing unless overridden."""

    def open(self, run: Run, iteration: int) -> None:
        """Called when training starts, or resumes after `iteration` iterations; the folder has a checkpoint by then."""

    def log(self, run: Run, iteration: int, log_entry: Mapping[str, Any]) -> None:
        """Called with every entry of the metric log: `iteration`, `env_steps`, and lists with one number a learner."""

    def finish(self, run: Run) -> None:
        """Called after the final evaluation, once the summary is written."""

    def close(self) -> None:
        """Called last, however the run ended."""
