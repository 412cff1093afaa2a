"""Training, resuming and loading of runs: `train`, `resume`, `load`, with their progress bar, pictures and trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlmeta.agents.agent import NetworkFactory
from rlmeta.envs import trusted
from rlmeta.errors import SettingError
from rlmeta.learning.method import Method
from rlmeta.learning.populations import Population
from rlmeta.report.listeners import Pictures, Tracking
from rlmeta.report.progress import Progress
from rlmeta.report.trackers import TrackerFactory
from rlmeta.runs import own_code
from rlmeta.runs import run as kept
from rlmeta.runs import train as runs
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
    device: str = "cpu",
    threads: int = 0,
    code: Sequence[str] = (),
) -> Run:
    """Train learners of all settings and seeds at once, and evaluate their final parameters.

    Args:
        agent: settings of a learner, such as `PPO()`; a list in a setting compares its values, each with all seeds. A
            name, `ppo` or `package.module:Name`, stands for the default settings, also for methods and problems.
        problem: a task, a family (for an agent, with constants redrawn every episode), a stream, the name of one, or
            an argument of `task`, such as a function that returns an environment.
        steps: environment steps (or samples) of each learner, on every task of a stream; 100,000 by default.
        epochs: instead of steps, passes over the training samples of every task.
        seeds: number of seeds, or a list of them.
        out: folder of the run; None keeps it in memory.
        eval_every, eval_episodes, final_episodes, target, checkpoint_seconds, log_points: as in `Budget`.
        budget: a `Budget`, instead of steps or epochs and these arguments.
        init: a run, or its folder, with the initial weights and running statistics: each learner gets those of its
            counterpart if the numbers of learners are equal, else all get those of the best.
        lifelong: lifelong-learning methods, which take part in every gradient step.
        population: population-based training of learners with different settings, such as `PBT()`.
        callbacks: functions of (run, metrics) that may stop the run.
        trackers: further destinations of metrics: functions of the run, such as `to_tensorboard()`.
        progress: show a progress bar.
        device: of every tensor.
        threads: number of torch's threads; 0 for all cores.
        code: modules of your own that a file of the `envs` folders may name and so import.

    Returns:
        The run, evaluated.

    Raises:
        SettingError, SpaceError, RunExistsError: an argument is invalid; nothing has been trained or written.
    """
    asked = {"steps": steps, "epochs": epochs, "eval_every": eval_every, "eval_episodes": eval_episodes}
    asked |= {"final_episodes": final_episodes, "target": target}
    asked |= {"checkpoint_seconds": checkpoint_seconds, "log_points": log_points}
    _check_functions(callbacks=callbacks, trackers=trackers)
    with trusted.allowing(code):
        run = runs.prepare(
            agent_class(agent)() if isinstance(agent, str) else agent,
            own_code.source_of(problem, {}) if isinstance(problem, str) else problem,
            _budget(asked, budget),
            seeds=seeds,
            out=out,
            lifelong=_methods(lifelong),
            population=own_code.population_named(population) if isinstance(population, str) else population,
            device=device,
            threads=threads,
            init=init,
        )
    return runs.go(run, callbacks=callbacks, listeners=listeners(trackers, progress))


def _methods(lifelong: Any) -> Any:
    """Lifelong methods, with names resolved to default settings; values that are no list are refused later."""
    if not isinstance(lifelong, list | tuple):
        return lifelong
    return [own_code.made_method(own_code.method_named(m), {}) if isinstance(m, str) else m for m in lifelong]


def _budget(asked: dict[str, Any], budget: Budget | None) -> Budget:
    """Budget of a run: the argument, or one of the other arguments.

    Raises:
        SettingError: steps and epochs, or a budget and other arguments, are given.
    """
    asked = {name: value for name, value in asked.items() if value is not None}
    if {"steps", "epochs"} <= asked.keys() or (budget is not None and asked):
        names = ", ".join([*asked, *(["budget"] if budget is not None else [])])
        raise SettingError(f"{names} say the same twice: give steps or epochs, and the rest beside it or in a budget")
    return Budget(**asked) if budget is None else budget


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
    """Resume a run from its newest checkpoint; it ends with the same result as an uninterrupted run.

    Args:
        folder: of the run, which may be complete if `steps` is given.
        steps: new total of steps of each learner, more than before. The result is that of a run with this total from
            the beginning, except for schedules over the budget, which a warning names.
        agent: settings class of the user's agent, or its name, `package.module:Name`, if the run had one.
        network: the user's network, or its name, if the run had one.
        env: the user's environment factory, or its name, if the run had one.
        lifelong: the lifelong methods, if the run had some.
        own: other settings that are code or data (rewards, demonstrations), by name, if the run had some.
        callbacks: as for `train`.
        trackers: as for `train`.
        progress: as for `train`.
        inexact: start new episodes where environments cannot be brought back to their saved state.
        code: as for `load`.

    Returns:
        The run, evaluated.

    Raises:
        CheckpointError: there is no run to resume.
        InexactResumeError: environments cannot be brought back, and `inexact` is not set.
    """
    _check_functions(callbacks=callbacks, trackers=trackers)
    with trusted.allowing(code):
        return runs.resume(
            folder,
            **_again(folder, agent, network, env, lifelong),
            own=own,
            callbacks=callbacks,
            listeners=listeners(trackers, progress),
            inexact=inexact,
            steps=0 if steps is None else steps,
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
    """Load a run to inspect, act with or evaluate it: its settings, state and final evaluation.

    Demonstrations and rewards, which only training needs, are not required, unlike in `resume`.

    Args:
        folder: as passed to `train(out=...)`.
        agent: settings class of the user's agent, or its name, `package.module:Name`, if the run had one; a run folder
            names code but never loads any by itself.
        network: the user's network, or its name, if the run had one.
        env: the user's environment factory, or its name, if the run had one.
        lifelong: the lifelong methods, if the run had some of the user's own.
        own: other settings that are code or data, by name, if the run had some that acting needs.
        code: modules, such as `["package.module"]`, that the folder may name and so import; code that it names in them
            need not be passed. Allow only modules that you trust.

    Returns:
        The run.

    Raises:
        CheckpointError: there is no run, or a file is truncated, corrupted or of another agent.
        SettingError: user code or data was not passed, or differs from that of the run.
    """
    with trusted.allowing(code):
        return kept.load(folder, **_again(folder, agent, network, env, lifelong), own=own)


def _again(folder: str | Path, agent: Any, network: Any, env: Any, lifelong: Sequence[Any]) -> dict[str, Any]:
    """User code for `resume` and `load`, with names resolved."""
    where = Path(folder)
    named = all(isinstance(method, str) for method in lifelong)
    return {
        "agent": own_code.agent_again(agent) if isinstance(agent, str) else agent,
        "network": own_code.network_again(network) if isinstance(network, str) else network,
        "env": own_code.env_again(where, env) if isinstance(env, str) else env,
        "lifelong": own_code.own_methods_again(where, ",".join(lifelong)) if named else lifelong,
    }


def listeners(trackers: Sequence[TrackerFactory] = (), progress: bool = False) -> list[Listener]:
    """Listeners of a run: its trackers, a progress bar, and pictures."""
    return [*map(Tracking, trackers), *([Progress()] if progress else []), Pictures()]


def _check_functions(**arguments: Any) -> None:
    """Check that callbacks and trackers are lists of functions.

    Raises:
        SettingError: an argument is no list of functions.
    """
    for name, functions in arguments.items():
        if not isinstance(functions, Sequence) or not all(map(callable, functions)):
            raise SettingError(f"{name} is {functions!r}, expected a list of functions")
