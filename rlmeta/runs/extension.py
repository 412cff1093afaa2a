"""Extend a run's training budget when it is resumed with more steps."""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING, Any

from rlmeta.envs.streams import TaskStream
from rlmeta.errors import CheckpointError, SettingError
from rlmeta.learning.field_types import require_type
from rlmeta.learning.settings import require
from rlmeta.runs import folder as run_folder
from rlmeta.runs.experiment import Experiment

if TYPE_CHECKING:
    from rlmeta.runs.run import Run


def extended(experiment: Experiment, steps: int) -> Experiment:
    """The experiment with a longer budget of `steps` in total, and the same evaluation interval.

    Raises:
        SettingError: it cannot be trained for longer, or `steps` are fewer than before.
    """
    if isinstance(experiment.problem, TaskStream):
        raise SettingError(
            f"steps is {steps:,}, but the tasks of the stream {experiment.problem.name!r} come one after another, each "
            "for the budget that the run was begun with: train a new run"
        )
    if experiment.budget.epochs:
        raise SettingError(f"steps is {steps:,}, but the run counts epochs: train a new run")
    if steps < experiment.budget.steps:
        raise SettingError(
            f"steps is {steps:,}, fewer than the {experiment.budget.steps:,} that the run was begun with: give more"
        )
    return dataclasses.replace(experiment, budget=dataclasses.replace(experiment.budget, steps=steps))


def checked_steps(steps: Any) -> int:
    """The steps of a longer budget, as a plain whole number.

    Raises:
        SettingError: it is none, or below 1.
    """
    require_type(steps, int, "steps")
    require(int(steps) >= 1, f"steps is {steps}, expected at least 1")
    return int(steps)


def warn_of_schedules(run: Run) -> None:
    """Warn of schedules that depend on the budget."""
    over_budget = scheduled(run.experiment.variants[0])
    if over_budget:
        warnings.warn(
            f"scheduled over the budget: {', '.join(over_budget)}; the schedule goes on as if the budget had been "
            f"{run.experiment.budget.steps:,} steps from the start",
            RuntimeWarning,
            stacklevel=2,
        )


def discard_summary(run: Run) -> None:
    """Discard the final evaluation and summary of a run that goes on, once a checkpoint says so.

    Raises:
        CheckpointError: the summary cannot be removed.
    """
    run.evaluation = None
    if run.folder is not None:
        try:
            (run.folder / run_folder.SUMMARY).unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"{run.folder / run_folder.SUMMARY} can't be removed: {error.strerror}") from error


def scheduled(settings: Any) -> list[str]:
    """Names of the settings that are scheduled over the budget."""
    names = [f.name for f in dataclasses.fields(settings)]
    annealed = [name for name in names if name.endswith("_schedule") and getattr(settings, name) != "constant"]
    return annealed + [name for name in names if name == "exploration_fraction"]
