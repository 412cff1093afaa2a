"""Population-based training: the learners of a run that do worse go on from copies of those that do better.

The variants of a run's settings are the members of a population; every seed is a population of its own, and no two
members share a key. A periodic evaluation ranks them; `rlmeta.learning.populations` says who is replaced by whom.
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
from rlmeta.learning.populations import PBT, STREAM, copied
from rlmeta.learning.settings import require
from rlmeta.learning.state import State, select

if TYPE_CHECKING:
    from rlmeta.runs.experiment import Experiment
    from rlmeta.runs.run import Run

POPULATIONS: dict[str, type] = {cls.name: cls for cls in (PBT,)}
"""Those that come with rlmeta, by their names on the command line."""


# ------------------------------------------------------------------------------------------------- before a run


def explored_names(variants: Sequence[Any]) -> list[str]:
    """The settings that differ between the members: what they explore."""
    values = [settings_.per_learner_values(variant) for variant in variants]
    return [name for name in values[0] if any(other[name] != values[0][name] for other in values)]


def check(run: Run) -> None:
    """Refuse a population that could exchange nothing, or settings that can't change while learners train.

    Raises:
        SettingError: with what to do instead.
    """
    experiment, population = run.experiment, run.experiment.population
    if population is None:
        return
    name, (first, *_) = type(experiment.variants[0]).__name__, experiment.variants
    names = explored_names(experiment.variants)
    require(
        bool(names),
        f"population: its members are the settings that {name} compares, and here they are all alike: give values for "
        f"one, such as learning_rate=[1e-4, 3e-4, 1e-3]",
    )
    budget = run.every * min(run.iterations)
    require(
        int(population.every) < budget,
        f"population: every is {int(population.every):,} steps, the budget is {budget:,}: no learner would ever be "
        "replaced, give fewer between two exchanges",
    )
    fixed = _constants(experiment, run.world)
    for setting in names:
        values = run.state["params"]["hyper"][setting]
        new = population.explore(values, random.fold(run.state["key"], STREAM)).tolist()
        some = new[:: experiment.repeats]
        pairs = zip(experiment.variants, some)
        variants = [settings_.with_values(v, {setting: x}) if _takes(v, setting, x) else v for v, x in pairs]
        now = _constants(experiment, run.world, variants)
        other = [part for part, value in fixed.items() if now.get(part) != value]
        require(
            not other,
            f"population: {setting} can't change while it trains: {name}'s {', '.join(other)} is made of it once, a "
            f"constant of what is recorded; give one value ({getattr(first, setting, None)})",
        )


def _constants(experiment: Experiment, world: Any, variants: Sequence[Any] = ()) -> dict[str, Any]:
    """The numbers, switches and texts that a learner of these settings has for attributes."""
    merged = settings_.merge(variants or experiment.variants)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when the run's own learner was made
        learner = merged.bind(world.observation_space, world.action_space, experiment.methods)
    return {name: value for name, value in vars(learner).items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str)


def refuse(experiment: Experiment) -> None:
    """Refuse what a population can't be trained on.

    Raises:
        SettingError: a stream, or a target.
    """
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
    """Replace learners of a run by copies of others, and change the copies' settings.

    Args:
        run: its state is exchanged for another.
        score: of every learner in the evaluation just now, `[S]`.
        done: iterations so far, which set this exchange's random numbers apart from those of others.

    Returns:
        For the records: `population/parent`, whose copy each became (itself where it stays), and the settings that the
        members explore as they are from now on, `[S]` each.
    """
    experiment, state, population = run.experiment, run.state, run.experiment.population
    assert population is not None
    shape = (len(experiment.variants), experiment.repeats)
    key = random.fold(random.fold(state["key"], STREAM), done)
    good = score if run.agent.score.maximise else -score
    chosen = population.parents(good.reshape(shape), state["active"].reshape(shape), key.reshape(shape))
    place = torch.arange(score.numel(), device=score.device)
    parent = place.reshape(shape).gather(0, chosen).flatten()
    replaced, stopped = parent != place, ~state["active"]
    names = explored_names(experiment.variants)
    if bool(replaced.any()):
        state = copied(state, parent, replaced)
        hyper = dict(state["params"]["hyper"])
        for name in names:
            new = population.explore(hyper[name], random.fold(key, name))
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
    """Whether settings may have this number."""
    try:
        settings_.with_values(settings, {name: value})
    except SettingError:
        return False
    return True


def _with_fresh_episodes(run: Run, state: State, begins: Tensor, key: Tensor) -> State:
    """The state with new episodes for learners that go on after they had stopped, for whatever stopped them may be in
    theirs; those of live environments go on, which can't begin one by one."""
    if not run.experiment.problem.native or not bool(begins.any()):
        return state
    fresh = run.agent.enter(tree.map(torch.clone, state), run.world, random.fold(key, "world"))
    parts = [name for name in ("world", "memory", "episode", "replay") if name in state]
    return {**state, **{name: select(begins, fresh[name], state[name]) for name in parts}}


def summary(run: Run) -> list[dict[str, Any]]:
    """What became of every variant, for the rows of a run's summary; nothing without a population.

    For each seed: `origin`, the variant whose weights it goes back to, `copies`, how often it was replaced, and
    `settings`, what it ended with.
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
            "settings": {name: hyper[name][row].tolist() for name in names},
        }
        for row in rows
    ]
