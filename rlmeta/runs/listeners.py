"""Listeners: what hears of a run and is no part of it, such as progress, curves and trackers (`rlmeta.report`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlmeta.runs.run import Run


class Listener:
    """Hears of a run; every hook does nothing unless it is overridden."""

    def open(self, run: Run, done: int) -> None:
        """The run begins, or goes on after `done` iterations; its folder is there, with a checkpoint."""

    def line(self, run: Run, done: int, line: Mapping[str, Any]) -> None:
        """A line of metrics after `done` iterations: `iteration`, `env_steps`, lists of a number for every learner."""

    def finish(self, run: Run) -> None:
        """The final parameters are evaluated, the summary is written."""

    def close(self) -> None:
        """The run has ended, whichever way; nothing follows."""
