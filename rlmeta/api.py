"""Train, resume, load: the verbs of rlmeta, where runs meet what listens to them."""

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
    """Train every setting with every seed, all at once, and evaluate the final parameters.

    Args:
        agent: a learner's settings, such as `PPO()`; lists in it compare values, each with all seeds. The name of one,
            `ppo` or `package.module:Name`, takes its defaults, as with methods and problems.
        problem: a task, a family (an agent meets constants redrawn every episode), a stream, the name of one, or what
            `task` makes one of, such as a function that makes an environment.
        steps: environment steps (or samples) of each learner, on every task of a stream; 100,000 by default.
        epochs: instead of steps, passes over the training samples of every task.
        seeds: how many, or which.
        out: folder of the run; None keeps it in memory.
        eval_every, eval_episodes, final_episodes, target, checkpoint_seconds, log_points: as in `Budget`.
        budget: steps or epochs, and the finer points, instead of these.
        init: a run, or its folder, whose weights and running statistics it begins with: each learner with those of its
            counterpart where there are as many, else all with the best.
        lifelong: methods that take part in every gradient step.
        population: how learners of different settings go on from one another, such as `PBT()`.
        callbacks: functions of (run, metrics) that may stop the run.
        trackers: where else metrics go: functions of the run, such as `to_tensorboard()`.
        progress: show a live bar.
        device: of every tensor.
        threads: cores for torch to use; 0 takes all.
        code: modules of your own that a file of the `envs` folders may name and so import.

    Returns:
        The run, evaluated.

    Raises:
        SettingError, SpaceError, RunExistsError: before anything is trained or written.
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
    """The methods, those that are named with their defaults; what is no list is refused later."""
    if not isinstance(lifelong, list | tuple):
        return lifelong
    return [own_code.made_method(own_code.method_named(m), {}) if isinstance(m, str) else m for m in lifelong]


def _budget(asked: dict[str, Any], budget: Budget | None) -> Budget:
    """The budget that was given, or one of the arguments beside it.

    Raises:
        SettingError: it is said twice.
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
    """Go on with a run from its newest checkpoint; it ends as the one that was never stopped.

    Args:
        folder: of the run, which may have ended where `steps` are given.
        steps: train to so many steps of each learner, more than it was begun with. It then ends as the one that was
            asked for them at once, but for schedules that go over the budget, which a warning names.
        agent: the class of your own agent's settings again, or its name, `package.module:Name`, where the run had one.
        network: the user's network again, or its name, where the run had one.
        env: the user's environment factory again, or its name, where the run had one.
        lifelong: the lifelong methods again, where the run had some.
        own: other settings that are code or data (rewards, demonstrations), by name, again, where it had some.
        callbacks: as for `train`.
        trackers: as for `train`.
        progress: as for `train`.
        inexact: begin new episodes where the environments cannot be brought back to where they were.
        code: as for `load`.

    Raises:
        CheckpointError: nothing to resume there.
        InexactResumeError: the environments cannot be brought back, and `inexact` was not asked for.
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
    """Read a run back to look at it, act with it or evaluate it: its settings, its state, its final evaluation.

    What only training needs, demonstrations and rewards, is not asked for; `resume` does.

    Args:
        folder: as given to `train(out=...)`.
        agent: the class of your own agent's settings again, or its name, `package.module:Name`, where it had one; a run
            folder names code but never loads any by itself.
        network: the user's network again, or its name, where it had one.
        env: the user's environment factory again, or its name, where it had one.
        lifelong: the lifelong methods again, where it had some of your own.
        own: other settings that are code or data, by name, again, where it had some that acting needs.
        code: modules, such as `["package.module"]`, that the folder may name and so import: what it names in them need
            not be given again. Give those alone that you would run.

    Raises:
        CheckpointError: no run there, or a file that is truncated, corrupted or of another agent.
        SettingError: the user's own code or data were not given again, or are others than the run began with.
    """
    with trusted.allowing(code):
        return kept.load(folder, **_again(folder, agent, network, env, lifelong), own=own)


def _again(folder: str | Path, agent: Any, network: Any, env: Any, lifelong: Sequence[Any]) -> dict[str, Any]:
    """What was given again of the user's own code, loaded where it was named."""
    where = Path(folder)
    named = all(isinstance(method, str) for method in lifelong)
    return {
        "agent": own_code.agent_again(agent) if isinstance(agent, str) else agent,
        "network": own_code.network_again(network) if isinstance(network, str) else network,
        "env": own_code.env_again(where, env) if isinstance(env, str) else env,
        "lifelong": own_code.own_methods_again(where, ",".join(lifelong)) if named else lifelong,
    }


def listeners(trackers: Sequence[TrackerFactory] = (), progress: bool = False) -> list[Listener]:
    """What listens to a run: its trackers, a live bar, and who draws its pictures."""
    return [*map(Tracking, trackers), *([Progress()] if progress else []), Pictures()]


def _check_functions(**given: Any) -> None:
    """Refuse what a run could not call once it has begun.

    Raises:
        SettingError: no list, or not of functions.
    """
    for name, functions in given.items():
        if not isinstance(functions, Sequence) or not all(map(callable, functions)):
            raise SettingError(f"{name} is {functions!r}, expected a list of functions")
