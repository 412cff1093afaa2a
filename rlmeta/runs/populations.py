"""Population-based training (Jaderberg et al., 2017) in a run: worse learners are replaced by copies of better ones.

The variants of a run's settings are the members of a population; every seed is a population of its own, and no two
members share a random key. A periodic evaluation ranks them; `rlmeta.learning.populations` decides who copies whom.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlmeta.envs.streams import TaskStream
from rlmeta.errors import SettingError
from rlmeta.functional import random, tree
from rlmeta.learning import settings as settings_
from rlmeta.learning.learner import Metrics
from rlmeta.learning.populations import PBT, STREAM, check_hooks, chosen_parents, copied, explored
from rlmeta.learning.settings import require
from rlmeta.learning.state import State, select

if TYPE_CHECKING:
    from rlmeta.runs.experiment import Experiment
    from rlmeta.runs.run import Run

POPULATIONS: dict[str, type] = {cls.name: cls for cls in (PBT,)}
"""rlmeta's populations by their names on the command line."""


# ------------------------------------------------------------------------------------------------- before a run


def explored_names(variants: Sequence[Any]) -> list[str]:
    """Names of the per-learner settings that differ between members, which the population explores."""
    values = [settings_.per_learner_values(variant) for variant in variants]
    return [name for name in values[0] if any(other[name] != values[0][name] for other in values)]


def check(run: Run) -> None:
    """Check a population (PBT): its hooks answer, members differ, an exchange is in the budget, settings can change.

    Raises:
        SettingError: a hook returns something else than is expected of it, the members are alike, the interval is too
            long, or a setting is a recorded constant.
    """
    experiment, population = run.experiment, run.experiment.population
    if population is None:
        return
    _check_parents(run)
    name, (first, *_) = type(experiment.variants[0]).__name__, experiment.variants
    names = explored_names(experiment.variants)
    require(
        bool(names),
        f"population: its members are the settings that {name} compares, and here they are all alike: give values for "
        f"one, such as learning_rate=[1e-4, 3e-4, 1e-3]",
    )
    budget = run.env_steps_per_iteration * min(run.iterations)
    require(
        int(population.every) < budget,
        f"population: every is {int(population.every):,} steps, the budget is {budget:,}: no learner would ever be "
        "replaced, give fewer between two exchanges",
    )
    fixed = _constants(experiment, run.world)
    for setting in names:
        values = run.state["params"]["hyper"][setting]
        new = explored(population, setting, values, random.fold(run.state["key"], STREAM)).tolist()
        some = new[:: experiment.repeats]
        pairs = zip(experiment.variants, some)
        variants = [settings_.with_values(v, {setting: x}) if _takes(v, setting, x) else v for v, x in pairs]
        now = _constants(experiment, run.world, variants)
        other = [part for part, value in fixed.items() if now.get(part) != value]
        require(
            not other,
            f"population: {setting} can't change during training, as {name} computes {', '.join(other)} from it once "
            f"and for all: give a single value ({getattr(first, setting, None)})",
        )


def _check_parents(run: Run) -> None:
    """Call a population's `parents` once, with scores that are drawn at random, before anything is trained."""
    population, shape = run.experiment.population, (len(run.experiment.variants), run.experiment.repeats)
    key = random.fold(run.state["key"], STREAM)
    score = random.uniform(key, STREAM, 0, ()).reshape(shape)
    chosen_parents(population, score, torch.ones_like(score, dtype=torch.bool), key.reshape(shape))


def _constants(experiment: Experiment, world: Any, variants: Sequence[Any] = ()) -> dict[str, Any]:
    """A learner's attributes that are plain numbers, booleans or text: constants of recorded programs."""
    merged = settings_.merge(variants or experiment.variants)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # shown already for the run's own learner
        learner = merged.bind(world.observation_space, world.action_space, experiment.methods)
    return {name: value for name, value in vars(learner).items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str)


def refuse(experiment: Experiment) -> None:
    """Refuse experiments that a population does not support.

    Raises:
        SettingError: no population at all, a stream of tasks, or a target at which learners stop early.
    """
    check_hooks(experiment.population)
    require(
        not isinstance(experiment.problem, TaskStream),
        f"population: {experiment.problem.name!r} is a stream, along which every learner keeps memories of its own: "
        "give a single problem",
    )
    require(
        experiment.budget.target in (float("inf"), float("-inf")),
        f"target is {experiment.budget.target:g}, but learners of a population don't stop one by one: leave it out",
    )


# ------------------------------------------------------------------------------------------------- in a run


@torch.no_grad()
def exchange(run: Run, score: Tensor, done: int) -> Metrics:
    """Exploit and explore: replace learners by copies of better ones, and perturb the copies' settings.

    Args:
        run: the run, whose state is replaced.
        score: every learner's score in the last evaluation, `[S]`.
        done: iterations so far; the random numbers depend on it.

    Returns:
        Metrics `[S]`: `population/parent`, the learner that each is now a copy of (itself if it stays), and the current
        values of the explored settings.
    """
    experiment, state, population = run.experiment, run.state, run.experiment.population
    assert population is not None
    shape = (len(experiment.variants), experiment.repeats)
    key = random.fold(random.fold(state["key"], STREAM), done)
    good = score if run.agent.score.maximise else -score
    chosen = chosen_parents(population, good.reshape(shape), state["active"].reshape(shape), key.reshape(shape))
    place = torch.arange(score.numel(), device=score.device)
    parent = place.reshape(shape).gather(0, chosen).flatten()
    replaced, stopped = parent != place, ~state["active"]
    names = explored_names(experiment.variants)
    if bool(replaced.any()):
        state = copied(state, parent, replaced)
        hyper = dict(state["params"]["hyper"])
        for name in names:
            new = explored(population, name, hyper[name], random.fold(key, name))
            taken = [_takes(experiment.variants[0], name, value) for value in new.tolist()]
            fits = torch.tensor(taken, device=replaced.device)
            hyper[name] = torch.where(replaced & fits, new, hyper[name])
        state["params"]["hyper"] = hyper
        run.state = _with_fresh_episodes(run, state, replaced & stopped, key)
    return {
        "population/parent": parent,
        **{f"population/{name}": run.state["params"]["hyper"][name] for name in names},
    }


def _takes(settings: Any, name: str, value: float) -> bool:
    """Whether a value is within the range of a setting."""
    try:
        settings_.with_values(settings, {name: value})
    except SettingError:
        return False
    return True


def _with_fresh_episodes(run: Run, state: State, begins: Tensor, key: Tensor) -> State:
    """Start new episodes for learners that were stopped and are now replaced: theirs may contain what stopped them.

    Gymnasium's environments cannot be reset for one learner alone; their episodes go on.
    """
    if not run.experiment.problem.native or not bool(begins.any()):
        return state
    fresh = run.agent.enter(tree.map(torch.clone, state), run.world, random.fold(key, "world"))
    parts = [name for name in ("world", "memory", "episode", "replay") if name in state]
    return {**state, **{name: select(begins, fresh[name], state[name]) for name in parts}}


def _shortest(value: Tensor) -> float:
    """A setting as the number of the shortest text that is its value in float32: 0.008, not 0.00800000037997961."""
    return float(str(value.cpu().numpy()))


def summary(run: Run) -> list[dict[str, Any]]:
    """Lineage of every variant for the rows of a run's summary; empty without a population.

    For each seed: `origin`, the variant whose initial weights it descends from, `copies`, how often it was replaced,
    and `settings`, the final values of the explored settings.
    """
    experiment, repeats = run.experiment, run.experiment.repeats
    if experiment.population is None:
        return [{} for _ in experiment.variants]
    about, hyper = run.state[STREAM], run.state["params"]["hyper"]
    names = explored_names(experiment.variants)
    rows = [slice(i * repeats, (i + 1) * repeats) for i in range(len(experiment.variants))]
    return [
        {
            "origin": (about["origin"][row] // repeats).tolist(),
            "copies": about["copies"][row].tolist(),
            "settings": {name: [_shortest(value) for value in hyper[name][row]] for name in names},
        }
        for row in rows
    ]
