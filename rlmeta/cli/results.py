"""Printed results of runs: tables, and learners that ended early."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlmeta.cli.terminal import say

if TYPE_CHECKING:
    from rlmeta.runs.run import Run


def console() -> Any:
    """Rich console for printing tables."""
    from rich.console import Console

    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 160)


def print_results(rows: Sequence[dict[str, Any]]) -> None:
    """Print a table of results; `rows` are those of `Run.summary()`."""
    from rlmeta.report.tables import result_table

    console().print(result_table(rows))


def print_ends(run: Run) -> None:
    """Print which learners ended early, and why the run stopped early."""
    state, target, score = run.state, run.experiment.budget.target, run.agent.score
    learners = zip(run.experiment.learner_labels, run.experiment.learners)
    for i, (label, (_, seed)) in enumerate(learners):
        if not bool(state["active"][i]):
            reached = "best" in state and bool(score.reaches(state["best"]["score"][i], target))
            why = f"reached {target:g}" if reached else "turned NaN and was frozen"
            name = f"learner {i} (seed {seed}{', ' + label if label else ''})"
            say(f"{name} {why} after {int(state['count']['env_steps'][i]):,} steps")
    if run.stopped:
        say(f"stopped: {run.stopped}")
