"""Films during training: the best learner after evaluations, in the run's folder."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rlmeta.engine.clock import clock
from rlmeta.errors import CheckpointError, SettingError, require_count
from rlmeta.report.watch import FOLDER, check_filmed, film
from rlmeta.runs import budgets
from rlmeta.runs.files import Damaged, put, read_bytes
from rlmeta.runs.listeners import Listener
from rlmeta.runs.run import Run

FILE = "videos.json"
"""File in the run's folder that says how often it is filmed, for a resume."""
_LIMIT = 1 << 12


class Films(Listener):
    """Films an episode of the best learner after the first evaluation of every `every` steps, and after the last one.

    What is filmed depends on the run's state alone, and nothing in it changes, so a resumed run makes the same films.
    A film that fails is warned of, and ends the filming and not the run.
    """

    def __init__(self, every: int) -> None:
        require_count("video_every", every)
        self._every, self._fails = every, False

    def open(self, run: Run, iteration: int) -> None:
        """Note how often the run is filmed."""
        assert run.folder is not None
        put(run.folder / FILE, json.dumps({"every": self._every}) + "\n")

    def log(self, run: Run, iteration: int, log_entry: Mapping[str, Any]) -> None:
        """Film after an evaluation, if it is due."""
        scores, size = log_entry.get(run.agent.score.metric), run.env_steps_per_iteration
        if scores is not None and iteration * size // self._every > _evaluated_before(run, iteration) // self._every:
            self._film(run, torch.tensor(scores, dtype=torch.float64, device="cpu"))

    def finish(self, run: Run) -> None:
        """Film the final parameters."""
        self._film(run, run.scores)

    def _film(self, run: Run, scores: torch.Tensor) -> None:
        if self._fails or run.folder is None or not bool(scores.isfinite().any()):
            return
        clock.switch("evaluate")
        try:
            film(run, run.folder / FOLDER / f"steps-{run.env_steps:012d}.mp4", run.agent.score.best(scores))
        except Exception as error:
            self._fails = True
            warnings.warn(f"no more films of this run: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=2)
        clock.switch("other")


def _evaluated_before(run: Run, iteration: int) -> int:
    """Steps of the last evaluation before that after `iteration` iterations; 0 if it is the first."""
    if run.stream is not None:
        before = [stage.last for stage in run.stages if stage.ends_task and stage.last < iteration]
    else:
        last = run.stages[-1].last
        population, size = run.experiment.population, run.env_steps_per_iteration
        periods = budgets.periods(run.experiment.budget, population, last, size)
        before = [(iteration - 1) // period * period for period in periods]
    return max(before, default=0) * run.env_steps_per_iteration


def films(run: Run, every: int) -> list[Listener]:
    """Listeners that film a run which is about to be trained; [] if `every` is 0.

    Raises:
        SettingError: it is not a number of steps, the run is in memory, or it can't be filmed; it is closed then.
        MissingExtraError: a package that draws or writes the films is not installed; likewise.
    """
    if not every:
        return []
    try:
        filming = Films(every)
        if run.folder is None:
            raise SettingError("video_every films into the run's folder, and a run in memory has none: give out=")
        check_filmed(run, run.folder / FOLDER / "film.mp4")
        return [filming]
    except BaseException:
        run.close()
        raise


def films_again(folder: str | os.PathLike[str]) -> list[Listener]:
    """Listeners that go on filming the run in a folder, as often as before; [] if it was not filmed.

    Raises:
        CheckpointError: the file that says how often cannot be read.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return []
    try:
        return [Films(json.loads(read_bytes(path, _LIMIT))["every"])]
    except (Damaged, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} does not say how often the run is filmed ({error}): delete it") from error
