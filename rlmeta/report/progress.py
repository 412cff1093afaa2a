"""Progress of a run: a live progress bar in a terminal, otherwise a line on stderr every half minute."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlmeta.engine.clock import clock
from rlmeta.errors import printable
from rlmeta.runs.listeners import Listener

if TYPE_CHECKING:
    from rlmeta.runs.experiment import Experiment
    from rlmeta.runs.run import Run

BAR_SECONDS = 0.2
"""Seconds between two updates of the bar."""
LINE_SECONDS = 30.0
"""Seconds between two lines without a terminal."""
WORTH_A_LINE = 0.1
"""Fraction of the run time from which the time of evaluation is reported at the end."""
WINDOW_SECONDS = 30.0
"""Length of the moving window over which the rate is measured."""
RETURNS = {
    "charts/episodic_return": "return",
    "eval/return": "evaluation",
    "eval/accuracy": "accuracy",
    "eval/squared_error": "squared error",
}
PARTS = ("act", "environment", "learn", "evaluate", "save", "other")


class Progress(Listener):
    """Progress bar on stderr: iterations, steps per second, returns, and the time that each part of the work takes."""

    _live: Live | None = None
    _evaluation_flags = ""
    """Flags that determine the time of evaluation."""

    def open(self, run: Run, iteration: int) -> None:
        """Start the display of a run, which a resume continues after `iteration` iterations."""
        iterations = run.stages[-1].last
        periodic = run.stream is None and run.experiment.budget.eval_every < iterations * run.env_steps_per_iteration
        self._evaluation_flags = ("--eval-every, " if periodic else "") + "--final-episodes, --eval-episodes"
        self.start(run.experiment, iterations, run.env_steps_per_iteration, iteration)

    def log(self, run: Run, iteration: int, log_entry: Mapping[str, Any]) -> None:
        """Update the display with an entry of the metric log."""
        self.update(iteration, log_entry, run.seconds, clock.seconds)

    def start(self, experiment: Experiment, iterations: int, steps_per_iteration: int, done: int = 0) -> None:
        """Start the display.

        Args:
            experiment: the experiment that is trained.
            iterations: number of iterations of the whole run.
            steps_per_iteration: environment steps of each learner in an iteration.
            done: iterations that a resumed run had done before.
        """
        self._iterations, self._steps = iterations, steps_per_iteration
        self._learners = len(experiment.learners)
        learners = f", {self._learners} learners" if self._learners > 1 else ""
        self._title = printable(f"{experiment.agent_name} on {experiment.problem.name}{learners}")
        self._done, self._seconds, self._shown, self._began = done, 0.0, done, done
        self._parts: Mapping[str, float] = {}
        self._returns: dict[str, float] = {}
        self._broken = 0
        self._due = time.monotonic()
        self._samples: deque[tuple[float, int]] = deque([(self._due, done)])
        console = Console(stderr=True)
        if console.file.isatty() and not console.is_dumb_terminal:
            # other output appears above the bar, unless stdout is a file or a pipe
            self._live = Live(
                console=console, auto_refresh=False, redirect_stdout=sys.stdout.isatty(), redirect_stderr=True
            )
            self._live.start()
        else:
            self._due += LINE_SECONDS

    def update(
        self, done: int, line: Mapping[str, Any] | None, seconds: float, parts: Mapping[str, float] | None = None
    ) -> None:
        """Update the numbers, and redraw if it is time to.

        Args:
            done: iterations so far.
            line: a new line of metrics, if there is one.
            seconds: wall time of the run so far, over all its resumes.
            parts: seconds by part of the work, as the clock measured them.
        """
        self._done, self._seconds, self._parts = done, seconds, parts or {}
        if line is not None:
            self._returns.update(_mean_returns(line))
            self._broken = broken_evaluations(line) if any(_evaluates(name) for name in line) else self._broken
        now = time.monotonic()
        if now >= self._due:
            self._show(now)

    def _show(self, now: float) -> None:
        self._shown = self._done
        self._samples.append((now, self._done))
        while self._samples[1][0] <= now - WINDOW_SECONDS:
            self._samples.popleft()
        if self._live is None:
            print(self._line(), file=sys.stderr, flush=True)
            self._due = now + LINE_SECONDS
        else:
            self._live.update(self._picture(), refresh=True)
            self._due = time.monotonic() + BAR_SECONDS

    def close(self) -> None:
        """Stop the display, and report if evaluation took much of the time."""
        if self._live is not None:
            try:
                if self._shown != self._done:
                    self._show(time.monotonic())
            finally:
                self._live.stop()
                self._live = None
        share = clock.seconds.get("evaluate", 0.0) / max(sum(clock.seconds.values()), 1e-9)
        if self._evaluation_flags and self._done > self._began and share >= WORTH_A_LINE:
            print(f"evaluation took {share:.0%} of the time ({self._evaluation_flags} set it)", file=sys.stderr)

    # ------------------------------------------------------------------ texts

    def _rate(self) -> float:
        """Iterations per second over the moving window."""
        (start, before), (end, after) = self._samples[0], self._samples[-1]
        return (after - before) / max(end - start, 1e-9)

    def _left(self) -> str:
        left = self._iterations - self._done
        rate = self._rate()
        if left and not rate:
            return "? left"
        return f"{_duration(left / rate)} left" if left else f"{_duration(self._seconds)} in all"

    def _numbers(self) -> str:
        done, whole = self._done * self._steps, self._iterations * self._steps
        rate = self._rate() * self._steps * self._learners
        returns = [
            f"{RETURNS[name]} {value:,.{1 if 'return' in name else 3}f}" for name, value in self._returns.items()
        ]
        if self._broken:
            returns.append(f"{self._broken} of {self._learners} evaluations not finite")
        return ", ".join([f"{done:,} of {whole:,} steps", f"{rate:,.0f} steps/s", *returns])

    def _line(self) -> str:
        share = f"{self._done / self._iterations:.0%}"
        return "; ".join(filter(None, [f"{self._title}: {share}, {self._numbers()}, {self._left()}", self._times()]))

    def _times(self) -> str:
        """Share of the time so far by part of the work, in percent."""
        total = sum(self._parts.values())
        shares = {part: round(100 * self._parts.get(part, 0.0) / total) for part in PARTS} if total else {}
        return ", ".join(f"{part} {share} %" for part, share in shares.items() if share)

    def _picture(self) -> RenderableType:
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        share = f"{self._done / self._iterations:.0%}"
        head.add_row(
            Text(self._title, "bold"),
            ProgressBar(self._iterations, self._done),
            Text(f"{share}  {self._left()}"),
        )
        rest = [Text(self._numbers()), Text(self._times(), "dim")]
        for text in rest:
            text.no_wrap, text.overflow = True, "ellipsis"
        return Group(head, *rest)


def _evaluates(name: str) -> bool:
    return name in RETURNS and name.startswith("eval/")


def broken_evaluations(line: Mapping[str, Any]) -> int:
    """Number of learners whose evaluation in a line of metrics is not finite; means leave these out."""
    return max(sum(not math.isfinite(value) for value in values) for name, values in line.items() if _evaluates(name))


def _mean_returns(line: Mapping[str, Any]) -> dict[str, float]:
    """Mean of each return over the learners that have a finite value."""
    means = {}
    for name in RETURNS:
        values = [value for value in line.get(name, ()) if math.isfinite(value)]
        if values:
            means[name] = sum(values) / len(values)
    return means


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
