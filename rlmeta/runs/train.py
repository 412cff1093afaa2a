"""Start or resume a run: validate its arguments, then run the training loop."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlmeta.agents.agent import NetworkFactory
from rlmeta.data.demonstrations import Demonstrations
from rlmeta.envs.kinds import problem_of
from rlmeta.errors import SettingError
from rlmeta.functional import tree
from rlmeta.learning import replay
from rlmeta.learning.field_types import shown
from rlmeta.learning.method import Method, checked_methods
from rlmeta.learning.populations import Population
from rlmeta.learning.settings import check_choices, group, variants
from rlmeta.learning.state import select
from rlmeta.runs import budgets, extension, populations
from rlmeta.runs import folder as run_folder
from rlmeta.runs.allocator import explain_out_of_memory
from rlmeta.runs.experiment import Budget, Experiment, Problem, chosen_seeds, compare
from rlmeta.runs.initial import take_weights
from rlmeta.runs.listeners import Listener
from rlmeta.runs.loop import Callback, Loop
from rlmeta.runs.read_back import check_read_back
from rlmeta.runs.run import Run, load, read
from rlmeta.runs.shipped import check_family
from rlmeta.runs.surroundings import undisturbed


@undisturbed()
@explain_out_of_memory()
def prepare(
    agent: Any,
    problem: Any,
    budget: Budget,
    *,
    seeds: int | Sequence[int] = 1,
    out: str | Path | None = None,
    lifelong: Sequence[Method] = (),
    population: Population | None = None,
    device: str = "cpu",
    threads: int = 0,
    init: Run | str | Path | None = None,
) -> Run:
    """Create a run and validate its arguments, before anything is trained or written.

    Args and errors are those of `rlmeta.api.train`.
    """
    if isinstance(agent, type) or not (dataclasses.is_dataclass(agent) and hasattr(agent, "bind")):
        example = agent.__name__ if isinstance(agent, type) else "PPO"
        raise SettingError(f"agent is {agent!r}, expected the settings of one, such as {example}()")
    if not isinstance(budget, Budget):
        raise SettingError(f"budget is {budget!r}, expected one such as Budget(steps=100_000)")
    check_choices(agent)
    agent = with_demonstrations(agent)
    compared, methods = compare(one_batch(variants(agent)), checked_methods(lifelong))
    experiment = Experiment(
        variants=compared,
        seeds=chosen_seeds(seeds),
        problem=_resolved(problem, type(agent)),
        budget=budget,
        methods=methods,
        population=population,
        device=device,
        threads=threads,
    )
    _check_place(out)
    run = Run(experiment, None if out is None else Path(out))
    try:
        run.start()
        if init is not None:
            take_weights(run, _source(init))
        budgets.check_learns(run.experiment.problem, run.agent, run.iterations, run.experiment.budget)
        populations.check(run)
        if out is not None:
            check_read_back(run.experiment)
        budgets.warn_of_rounding(budget, run.iterations, run.env_steps_per_iteration)
    except BaseException:
        run.close()
        raise
    return run


def _source(init: Any) -> Run:
    """The run of the initial weights, loaded from its folder if that is given.

    Raises:
        SettingError: neither a run nor the path of a folder.
    """
    if isinstance(init, Run):
        return init
    if not isinstance(init, str | os.PathLike):
        raise SettingError(f"init is {shown(init)}, expected a trained run, or the folder of one")
    return load(Path(init))


def _resolved(problem: Any, agent: type) -> Problem:
    """The problem that is given or named, after a check that this class of agent can learn it."""
    learns_from_tasks = getattr(agent, "learns_from_tasks", False)
    if learns_from_tasks and isinstance(problem, str):
        check_family(problem, agent.__name__)
    return problem_of(problem, agent.__name__, learns_from_tasks)


def _check_place(out: Any) -> None:
    """Check that `out` is a path at which a run folder can be created.

    Raises:
        SettingError: it is not a path, or contains a null character.
        RunExistsError: a file is in its place, or the folder is not empty.
    """
    if out is None:
        return
    named = os.fspath(out) if isinstance(out, str | os.PathLike) else None
    if not isinstance(named, str) or "\0" in named:
        raise SettingError(f"out is {out!r}, expected the folder of the run")
    run_folder.check_free(out)


def with_demonstrations(settings: Any) -> Any:
    """Load the demonstrations that settings name as a file; if there is no such file, the learner raises an error."""
    named = getattr(settings, "demonstrations", None)
    if not isinstance(named, str | os.PathLike) or not Path(named).is_file():
        return settings
    return dataclasses.replace(settings, demonstrations=Demonstrations.load(named))


@undisturbed()
@explain_out_of_memory()
def go(run: Run, *, callbacks: Sequence[Callback] = (), listeners: Sequence[Listener] = ()) -> Run:
    """Create the folder of a prepared run, then train and evaluate it.

    Args:
        run: a run that `prepare` returned.
        callbacks: functions of (run, metrics) that may stop the run.
        listeners: event hooks, such as progress and trackers.
    """
    try:
        if run.folder is None:
            return Loop(run, callbacks, listeners).go()
        run_folder.create(run.folder)
        with run_folder.lock(run.folder) as run.held:
            run.begin_folder()
            return Loop(run, callbacks, listeners).go()
    finally:
        run.close()


@undisturbed()
@explain_out_of_memory()
def resume(
    folder: str | Path,
    *,
    agent: type | None,
    network: NetworkFactory | None,
    env: Any,
    lifelong: Sequence[Method],
    own: Mapping[str, Any] | None,
    callbacks: Sequence[Callback],
    listeners: Sequence[Listener],
    inexact: bool,
    steps: int | None = None,
) -> Run:
    """Resume a run from its newest checkpoint; arguments and errors are those of `rlmeta.api.resume`."""
    folder = Path(folder).absolute()
    longer = 0 if steps is None else extension.checked_steps(steps)
    if os.path.lexists(folder / run_folder.CONFIG):
        run_folder.check_plain(folder)
    with run_folder.lock(folder) as held:
        run = read(
            folder, agent=agent, network=network, env=env, lifelong=lifelong, own=own, training=True, steps=longer
        )
        run.stopped, run.held = "", held
        try:
            held.sign(run.id)
            restore_world(run, inexact)
            if longer:
                extension.warn_of_schedules(run)
            return Loop(run, callbacks, listeners).go()
        finally:
            run.close()


def restore_world(run: Run, inexact: bool) -> None:
    """Restore the environments to their state at the checkpoint; those that cannot be restored start new episodes."""
    state, saved = run.state, run.state["world"]
    if run.stream is not None:
        run.world.select(state["identity"])
    if run.experiment.problem.native:
        return
    state["world"] = run.world.restore(saved, inexact)
    begins = (state["world"]["episode"] != saved["episode"].cpu()).to(state["key"].device)
    agent: Any = run.agent
    fresh = {
        "memory": agent.initial_memory(state["params"], tuple(begins.shape)),
        "episode": tree.map(torch.zeros_like, state["episode"]),
    }
    for name, part in fresh.items():
        state[name] = select(begins, part, state[name])
    if "replay" in state:
        state["replay"] = replay.cut(state["replay"], state["key"].dim(), begins)


def one_batch(settings: Sequence[Any]) -> Sequence[Any]:
    """Check that settings can be trained as one batch of learners, and return them.

    Raises:
        SettingError: they differ in static values.
    """
    groups = group(settings)
    if len(groups) > 1:
        raise SettingError("settings that differ in static values can't be one batch: train them one after another")
    return groups[0]
