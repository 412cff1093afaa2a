"""Population-based training: the learners of a run that do worse go on from copies of those that do better.

The variants of a run's settings are the members of a population; every seed is a population of its own. After a
periodic evaluation, which ranks the members, some take over what others have learned (weights, moments, statistics)
and their settings, changed a little. Keys, worlds, replay memories, counters of draws and best scores stay each
learner's own, and no two members share a key, so that clones do not act alike.

Jaderberg et al., "Population Based Training of Neural Networks", 2017.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from rlmeta.envs.streams import TaskStream
from rlmeta.errors import SettingError
from rlmeta.functional import random, tree
from rlmeta.functional.packed import Packed
from rlmeta.learning import settings as settings_
from rlmeta.learning.field_types import check_types
from rlmeta.learning.learner import Metrics
from rlmeta.learning.settings import require, require_range
from rlmeta.learning.state import State, select
from rlmeta.runs import grammar

if TYPE_CHECKING:
    from rlmeta.runs.experiment import Experiment
    from rlmeta.runs.run import Run

STREAM = "population"
"""The random stream of everything that is drawn here."""
OWN = (
    *("key", "count", "progress", "active", "world", "memory", "episode", "replay", "task"),
    *("metrics", "best", STREAM),
)
"""What of a state stays a learner's own when it becomes the copy of another."""
OWN_WITHIN = ("key", "count", "active")
"""The same, of whoever trains parameters beside the learner, such as a reward."""
OF_WORLDS = "accumulator"
"""Sums that run along with a learner's own worlds."""


class Population(Protocol):
    """Who becomes a copy of whom, and how its settings change then; a frozen dataclass, as other settings are."""

    name: str
    """On the command line, where its settings are `--NAME.SETTING`."""
    every: int | str
    """Environment steps of each learner between two exchanges."""

    def parents(self, score: Tensor, active: Tensor, key: Tensor) -> Tensor:
        """The member that each becomes a copy of, `[V, R]` int64, itself where it stays.

        Args:
            score: of V members in R populations `[V, R]`, more is better.
            active: `[V, R]`, False for a learner that stopped since it was not finite: it has nothing to give.
            key: `[V, R]`, of this exchange alone.
        """
        ...

    def explore(self, value: Tensor, key: Tensor) -> Tensor:
        """New values `[S]` of one setting for copies, from those of the learners that they are copies of; a value that
        the settings refuse is left as it was."""
        ...


@dataclass(frozen=True)
class PBT:
    """Population-based training (Jaderberg et al., 2017): truncation selection, then a factor on every setting that
    differs between the members."""

    every: int | str = 20_000
    """Environment steps of each learner between two exchanges, each after an evaluation; 20k is 20,000."""
    fraction: float = 0.25
    """Part of the population, at most half, that is replaced by copies, and part that is copied: the worst and the
    best. A learner that stopped since it was not finite is always replaced."""
    shrink: float = 0.8
    """One of the two factors by which a copy's settings are multiplied, each with probability one half."""
    grow: float = 1.2
    """The other one."""

    name = "pbt"

    def __post_init__(self) -> None:
        check_types(self)
        if isinstance(self.every, str):
            try:
                object.__setattr__(self, "every", grammar.whole(self.every))
            except ValueError:
                raise SettingError(f"PBT: every is {self.every!r}, expected a whole number, such as 20k") from None
        require(int(self.every) >= 1, f"PBT: every is {self.every}, expected at least 1")
        require_range(self, "fraction", 0.0, 0.5, above=True)
        require_range(self, "shrink", 0.0, 1.0, above=True)
        require_range(self, "grow", 1.0)
        settings_.require_finite(self, "grow")

    def parents(self, score: Tensor, active: Tensor, key: Tensor) -> Tensor:
        """Each of the worst becomes a copy of one of the best, drawn at random, that has a better score than it."""
        members = len(score)
        gives = active & score.isfinite()
        ranked = score.masked_fill(~gives, -torch.inf)
        order = ranked.argsort(dim=0, descending=True, stable=True)
        count = max(1, int(members * self.fraction))
        givers = gives.sum(0).clamp(max=count)
        number = (random.uniform(key, STREAM, 0, ()) * givers).long().clamp(max=members - 1)
        chosen = order.gather(0, number)
        rank = order.argsort(0)
        better = ranked.gather(0, chosen) > ranked
        replaced = ((rank >= members - count) | ~gives) & better & (givers > 0)
        return torch.where(replaced, chosen, torch.arange(members, device=score.device).unsqueeze(-1))

    def explore(self, value: Tensor, key: Tensor) -> Tensor:
        """One of the two factors."""
        return value * torch.where(random.uniform(key, STREAM, 1, ()) < 0.5, self.shrink, self.grow)


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


def begin(state: State) -> State:
    """The state with what is remembered of a population: whose copy each learner became at the last exchange, which it
    was at the start, and how often it was replaced, `[S]` each."""
    key = state["key"]
    place = torch.arange(key.numel(), device=key.device).reshape(key.shape)
    return {**state, STREAM: {"parent": place, "origin": place.clone(), "copies": torch.zeros_like(place)}}


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


def copied(state: State, parent: Tensor, replaced: Tensor) -> State:
    """A state in which learners go on from what others have learned, while all that is their own stays.

    Args:
        state: not written to.
        parent: the learner that each becomes a copy of, itself where it stays, `[S]`.
        replaced: where it is another, `[S]`; there a learner that had stopped goes on.
    """
    new = {name: part if name in OWN else _copy(part, parent, replaced) for name, part in state.items()}
    for name, memory in state.get("rewards", {}).items():
        if "params" not in memory:  # counts of what was seen in its own worlds
            new["rewards"][name] = memory
    # packed as in the run: the bits of a matrix product depend on where its factors begin
    new["params"]["weights"] = Packed.of(dict(new["params"]["weights"]), state["key"].dim())
    new["active"] = state["active"] | replaced
    before = state[STREAM]
    new[STREAM] = {
        "parent": parent,
        "origin": before["origin"][parent],
        "copies": before["copies"] + replaced,
    }
    return new


def _copy(part: Any, parent: Tensor, replaced: Tensor) -> Any:
    if not isinstance(part, dict):
        return part[parent]
    trains = "params" in part
    new = {
        name: value if name == OF_WORLDS or (trains and name in OWN_WITHIN) else _copy(value, parent, replaced)
        for name, value in part.items()
    }
    return {**new, "active": part["active"] | replaced} if trains and "active" in part else new


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
