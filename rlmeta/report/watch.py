"""Watch a run: films of a learner's episodes, or a window in which they are shown."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlmeta.envs.episodes import Episode, EpisodeRecorder
from rlmeta.envs.filming import Camera, camera
from rlmeta.envs.kinds import evaluated
from rlmeta.envs.native.drawing import Picture
from rlmeta.envs.streams import TaskStream
from rlmeta.envs.task import Task
from rlmeta.envs.task import task as task_of
from rlmeta.errors import RunExistsError, SettingError, SpaceError, require_count
from rlmeta.functional import random
from rlmeta.learning.evaluate import Evaluation
from rlmeta.learning.method import effective_params
from rlmeta.learning.state import Params, State
from rlmeta.report.film import Window, check_film, require_display, write_film
from rlmeta.runs import stages
from rlmeta.runs.run import Run
from rlmeta.runs.surroundings import undisturbed

FOLDER = "videos"
"""Folder of films within a run's."""


@dataclass(frozen=True)
class Watched:
    """What was watched."""

    learner: int
    """Index of the learner."""
    returns: Tensor
    """Returns of the episodes, `[E]`, as `Run.evaluate` gives them; on a stream task by task."""
    lengths: Tensor
    """Their steps, `[E]`."""
    frames: int
    """Number of pictures: the steps and a first picture of each episode."""
    out: Path | None
    """The film, None after a window."""


@undisturbed()
def watch(
    run: Run,
    out: str | os.PathLike[str] | None = None,
    *,
    task: Any = None,
    episodes: int = 1,
    learner: int | None = None,
    best: bool = False,
    deterministic: bool = True,
    seed: int = 0,
    fps: int | None = None,
    live: bool = False,
) -> Watched:
    """Film a learner of a run as it plays, or show it in a window.

    The episodes are those of `run.evaluate(episodes, seed=seed)`, on a stream those of every task in turn.

    Args:
        run: the run of an agent.
        out: the film, .mp4 or .gif; None for videos/watch.mp4 in the run's folder.
        task: another task to play, with the same spaces; anything that `rl.task` accepts. None for the run's own.
        episodes: number of episodes, on a stream of each task.
        learner: the learner's index; by default the best in the final evaluation.
        best: use the parameters of its best periodic evaluation instead of the final ones.
        deterministic: take the policy's mode instead of sampling actions.
        seed: seed of the episodes.
        fps: pictures a second; None for the environment's own speed.
        live: show the episodes in a window instead of writing a film.

    Raises:
        SettingError: the run's learner does not act, the environment can't be drawn, there is no display for a window,
            or the film cannot be written.
        SpaceError: the task has other spaces than the run's.
        MissingExtraError: a package that draws or writes the film is not installed.
    """
    if not run.agent.acts:
        raise SettingError(f"a run of {run.experiment.agent_name} does not act: give one of an agent")
    for name, value in (("episodes", episodes), ("fps", 1 if fps is None else fps)):
        require_count(name, value)
    path = None if live else film_path(run, out)
    if live:
        require_display()
        if out is not None:
            raise SettingError(f"live shows a window and out is a film, {os.fspath(out)}: give one of them")
    chosen = run.chosen_learner(learner)
    state = run.best_state() if best else run.state
    return _shown(run, _Plan(state, chosen, _problem(run, task), episodes, deterministic, seed), path, live, fps or 0)


@undisturbed()
def film(run: Run, path: Path, learner: int) -> Watched:
    """Film an episode of a learner's present parameters, on a stream one of every task; replaces the film `path`."""
    return _shown(run, _Plan(run.state, learner, _problem(run, None), 1, True, 0), path)


def check_filmed(run: Run, path: Path) -> None:
    """Refuse a run that cannot be filmed, before it is trained: arguments are those of `film`.

    Raises:
        SettingError: the run's learner does not act, or its environment can't be drawn.
        MissingExtraError: a package that draws or writes the film is not installed.
    """
    if not run.agent.acts:
        raise SettingError(f"a run of {run.experiment.agent_name} does not act: there is nothing to film")
    check_film(path)
    for task in _Plan(run.state, 0, _problem(run, None), 1, True, 0).tasks:
        camera(task, False).close()


def _shown(run: Run, plan: _Plan, path: Path | None, live: bool = False, fps: int = 0) -> Watched:
    """Play, then write the film `path`, or show it in a window."""
    with ExitStack() as closing:
        cameras = []
        for each in plan.tasks:
            cameras.append(camera(each, live, fps))
            closing.callback(cameras[-1].close)
        played = _play(run, plan)
        pace = fps or cameras[0].fps
        frames = _frames(cameras, played)
        count = _show(frames, run.experiment.problem.name, pace) if path is None else write_film(path, frames, pace)
    returns = torch.cat([part.evaluation.returns[plan.learner] for part in played])
    lengths = torch.cat([part.evaluation.lengths[plan.learner] for part in played])
    return Watched(plan.learner, returns, lengths, count, path)


class _Plan(NamedTuple):
    """What is played."""

    state: State
    learner: int
    problem: Task | TaskStream
    episodes: int
    deterministic: bool
    seed: int

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks, one or those of a stream."""
        return self.problem.tasks if isinstance(self.problem, TaskStream) else (self.problem,)


class _Played(NamedTuple):
    """The episodes of one task: its index `task`, what the learner did in them, and the evaluation of all learners."""

    task: int
    episodes: list[Episode]
    evaluation: Evaluation


def _play(run: Run, plan: _Plan) -> list[_Played]:
    """Evaluate as `Run.evaluate` does, and record the learner's episodes, task by task."""
    agent, key = run.agent, random.fold(random.fold(plan.state["key"], "evaluation"), plan.seed)
    problem, orders = plan.problem, run.experiment.orders
    world: Any = problem.world(tuple(key.shape), agent.evaluation_rows(plan.episodes, problem.native))

    def played(index: int, p: Params, fresh: Tensor) -> _Played:
        rounds = plan.episodes // world.num_envs * world.trial_episodes
        recorder = EpisodeRecorder(world, plan.learner, rounds, plan.tasks[index].native)
        result = agent.evaluate(p, recorder, fresh, plan.episodes, deterministic=plan.deterministic)
        return _Played(index, recorder.episodes, result)

    try:
        own = (run.world.observation_space, run.world.action_space)
        if (world.observation_space, world.action_space) != own:
            raise SpaceError(
                f"task {problem.name!r} has the spaces {world.observation_space}, {world.action_space}, the run's are "
                f"{own[0]}, {own[1]}: give a task with the same"
            )
        if not isinstance(problem, TaskStream):
            return [played(0, agent.effective_params(plan.state), key)]
        parts = []
        for position in range(orders.shape[-1]):
            shown = stages.tested_task(plan.state, world, problem, orders, position)
            p = effective_params(agent, plan.state, shown)
            parts.append(played(int(orders[plan.learner, position]), p, random.fold(key, position)))
        return parts
    finally:
        world.close()


def _frames(cameras: Sequence[Camera], played: Sequence[_Played]) -> Iterator[Picture | None]:
    """Pictures of all episodes, one after another."""
    for part in played:
        for episode in part.episodes:
            yield from cameras[part.task].frames(episode)


def _problem(run: Run, task: Any) -> Any:
    """The task that is given, or the run's problem, as it is evaluated.

    Raises:
        SettingError: it is neither a task nor a stream of tasks.
    """
    problem: Any = run.experiment.problem if task is None else task
    return evaluated(problem if isinstance(problem, Task | TaskStream) else task_of(problem))


def film_path(run: Run, out: str | os.PathLike[str] | None) -> Path:
    """Path of the film, checked: `out`, or one in the run's folder.

    Raises:
        SettingError: the run has no folder and `out` is None; or as `check_film`.
        RunExistsError: the file `out` exists.
    """
    if out is None and run.folder is None:
        raise SettingError("a run in memory has no folder for a film: give out=, such as out='film.mp4'")
    path = Path(out) if out is not None else run.folder / FOLDER / "watch.mp4"  # type: ignore[operator]
    check_film(path)
    if out is not None and os.path.lexists(path):
        raise RunExistsError(f"{path} exists: write the film into another file, or delete it first")
    return path


def _show(frames: Iterator[Picture | None], title: str, fps: int) -> int:
    """Show pictures in a window, or let gymnasium's do it; returns their number."""
    window, count = Window(title, fps), 0
    try:
        for frame in frames:
            count += 1
            if frame is not None:
                window.show(frame)
    finally:
        window.close()
    return count
