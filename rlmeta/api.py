"""Train, resume and load runs: the main functions of rlmeta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlmeta.agents.agent import NetworkFactory
from rlmeta.errors import SettingError
from rlmeta.learning.method import Method
from rlmeta.learning.populations import Population
from rlmeta.report.films import films, films_again
from rlmeta.report.listeners import Pictures, Tracking
from rlmeta.report.progress import Progress
from rlmeta.report.trackers import TrackerFactory
from rlmeta.runs import run as saved_run
from rlmeta.runs import train as runs
from rlmeta.runs import user_code
from rlmeta.runs.experiment import Budget
from rlmeta.runs.listeners import Listener
from rlmeta.runs.loop import Callback
from rlmeta.runs.run import Run
from rlmeta.runs.shipped import agent_class
from rlmeta.runs.surroundings import undisturbed


@undisturbed()
def train(
    agent: Any,
    problem: Any,
    *,
    steps: int | None = None,
    epochs: float | None = None,
    seeds: int | Sequence[int] = 1,
    out: str | Path | None = None,
    eval_every: int | None = None,
    eval_episodes: int | None = None,
    final_episodes: int | None = None,
    target: float | None = None,
    checkpoint_seconds: float | None = None,
    log_points: int | None = None,
    budget: Budget | None = None,
    init: Run | str | Path | None = None,
    lifelong: Sequence[Method | str] = (),
    population: Population | str | None = None,
    callbacks: Sequence[Callback] = (),
    trackers: Sequence[TrackerFactory] = (),
    progress: bool = False,
    video_every: int = 0,
    device: str = "cpu",
    threads: int = 0,
    code: Sequence[str] = (),
) -> Run:
    """Train a learner with every setting and every seed in one batch, and evaluate the final parameters.

    Args:
        agent: a learner's settings, such as `PPO()`; lists in it compare values, each with all seeds. A name, `ppo` or
            `package.module:Name`, means the default settings.
        problem: a task, a task family, a stream of tasks, the name of one, or anything that `rl.task` accepts, such as
            a function that creates an environment. Of a family, an agent sees constants redrawn every episode.
        steps: environment steps (or samples) of each learner, on every task of a stream; 100,000 by default.
        epochs: instead of steps, epochs over the training samples of every task.
        seeds: number of seeds, or a sequence of seeds.
        out: folder of the run; None keeps the run in memory.
        eval_every, eval_episodes, final_episodes, target, checkpoint_seconds, log_points: as in `Budget`.
        budget: a `Budget`, instead of the arguments above.
        init: a run, or its folder, from which weights and normalisation statistics are initialised: learner by learner
            if it has equally many, else all from its best learner.
        lifelong: lifelong learning methods for a stream, or their names.
        population: population-based training among the compared settings, such as `PBT()`, or its name.
        callbacks: functions of (run, metrics) that stop the run by returning True.
        trackers: experiment trackers, such as `to_tensorboard()`.
        progress: show a progress bar.
        video_every: film the best learner after the first evaluation of every so many steps, into the folder `videos`
            of the run's; 0 for no films. A resume goes on filming.
        device: device of all tensors.
        threads: threads for torch; 0 for one a core.
        code: your own modules that a file of the `envs` folders may name and so import.

    Returns:
        The trained run with its final evaluation.

    Raises:
        SettingError, SpaceError, RunExistsError: before anything is trained or written.
    """
    fields = {"steps": steps, "epochs": epochs, "eval_every": eval_every, "eval_episodes": eval_episodes}
    fields |= {"final_episodes": final_episodes, "target": target}
    fields |= {"checkpoint_seconds": checkpoint_seconds, "log_points": log_points}
    _check_functions(callbacks=callbacks, trackers=trackers)
    with user_code.allowed_here(code):
        run = runs.prepare(
            agent_class(agent)() if isinstance(agent, str) else agent,
            user_code.source_of(problem, {}) if isinstance(problem, str) else problem,
            _budget(fields, budget),
            seeds=seeds,
            out=out,
            lifelong=_methods(lifelong),
            population=user_code.population_named(population) if isinstance(population, str) else population,
            device=device,
            threads=threads,
            init=init,
        )
    return runs.go(run, callbacks=callbacks, listeners=[*listeners(trackers, progress), *films(run, video_every)])


def _methods(lifelong: Any) -> Any:
    """Replace names of methods by methods with default settings; a value that is not a list is refused later."""
    if not isinstance(lifelong, list | tuple):
        return lifelong
    return [user_code.build_method(user_code.method_named(m), {}) if isinstance(m, str) else m for m in lifelong]


def _budget(fields: dict[str, Any], budget: Budget | None) -> Budget:
    """The budget, or one built from the separate arguments that are not None.

    Raises:
        SettingError: both are given, or both steps and epochs.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    if {"steps", "epochs"} <= fields.keys() or (budget is not None and fields):
        names = ", ".join([*fields, *(["budget"] if budget is not None else [])])
        raise SettingError(f"{names} say the same twice: give steps or epochs, and the rest beside it or in a budget")
    return Budget(**fields) if budget is None else budget


@undisturbed()
def resume(
    folder: str | Path,
    *,
    agent: type | str | None = None,
    network: NetworkFactory | str | None = None,
    env: Any = None,
    lifelong: Sequence[Method | str] = (),
    own: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    trackers: Sequence[TrackerFactory] = (),
    progress: bool = False,
    inexact: bool = False,
    steps: int | None = None,
    code: Sequence[str] = (),
) -> Run:
    """Resume a run from its newest checkpoint; the result is bit-identical to that of an uninterrupted run.

    Args:
        folder: the run's folder; a run that has ended needs `steps`.
        agent: settings class of your own agent, or its name `package.module:Name`. User code that the run used has to
            be given again, here and in the next four arguments, as a run folder names code but never loads any.
        network: your network factory, or its name.
        env: your environment factory, stream or family, or its name.
        lifelong: the lifelong methods, or the names of your own.
        own: other settings by name that are code or data: rewards, demonstrations. rlmeta's own rewards come back by
            themselves, yours also from the modules of `code`. What is given again must have the run's settings.
        callbacks: as for `train`.
        trackers: as for `train`.
        progress: as for `train`.
        inexact: start new episodes if the environments' state cannot be restored.
        steps: extend the budget to this many steps of each learner. The result equals that of a run with this budget
            from the start, except for schedules over the budget, which a warning names.
        code: as for `load`.

    Raises:
        CheckpointError: there is no run to resume.
        InexactResumeError: the environments' state cannot be restored, and `inexact` is false.
    """
    _check_functions(callbacks=callbacks, trackers=trackers)
    with user_code.allowed_here(code):
        return runs.resume(
            folder,
            **_again(folder, agent, network, env, lifelong),
            own=own,
            callbacks=callbacks,
            listeners=[*listeners(trackers, progress), *films_again(folder)],
            inexact=inexact,
            steps=steps,
        )


def load(
    folder: str | Path,
    *,
    agent: type | str | None = None,
    network: NetworkFactory | str | None = None,
    env: Any = None,
    lifelong: Sequence[Method | str] = (),
    own: Mapping[str, Any] | None = None,
    code: Sequence[str] = (),
) -> Run:
    """Load a run from its folder, to inspect it, act with it or evaluate it.

    Demonstrations and rewards, which only training needs, are not required; `resume` requires them.

    Args:
        folder: the run's folder, as given to `train(out=...)`.
        agent: settings class of your own agent, or its name `package.module:Name`. User code that the run used has to
            be given again, here and in the next four arguments, as a run folder names code but never loads any.
        network: your network factory, or its name.
        env: your environment factory, stream or family, or its name.
        lifelong: the lifelong methods, or their names, if some are your own.
        own: other settings by name that are code or data and needed for acting.
        code: modules, such as `["package.module"]` or a single one, from which the folder may load the code that it
            names, instead of the arguments above. Give only modules that you trust.

    Raises:
        CheckpointError: no run there, or a file that is truncated, corrupted or of another agent.
        SettingError: user code or data are missing, or differ from those the run began with.
    """
    with user_code.allowed_here(code):
        return saved_run.load(folder, **_again(folder, agent, network, env, lifelong), own=own)


def _again(folder: str | Path, agent: Any, network: Any, env: Any, lifelong: Sequence[Any]) -> dict[str, Any]:
    """Load the user code that is given by name; returns keyword arguments for `load` and `resume`."""
    where = Path(folder)
    named = all(isinstance(method, str) for method in lifelong)
    return {
        "agent": user_code.user_agent(agent) if isinstance(agent, str) else agent,
        "network": user_code.user_network(network) if isinstance(network, str) else network,
        "env": user_code.user_env(where, env) if isinstance(env, str) else env,
        "lifelong": user_code.user_methods(where, ",".join(lifelong)) if named else lifelong,
    }


def listeners(trackers: Sequence[TrackerFactory] = (), progress: bool = False) -> list[Listener]:
    """Listeners of a run: its trackers, a progress bar, and the plots of the finished run."""
    return [*map(Tracking, trackers), *([Progress()] if progress else []), Pictures()]


def _check_functions(**arguments: Any) -> None:
    """Check that arguments are lists of functions, before the run starts.

    Raises:
        SettingError: one is not.
    """
    for name, functions in arguments.items():
        if not isinstance(functions, Sequence) or not all(map(callable, functions)):
            raise SettingError(f"{name} is {functions!r}, expected a list of functions")
