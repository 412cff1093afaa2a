"""Population-based training: bad learners are replaced by copies of good ones, with perturbed settings.

The members of a population are learners of one batch. Some take over what others have learned (weights, moments,
statistics) and their settings, changed a little. Keys, worlds, replay memories, counters of draws and best scores stay
each learner's own, so that clones do not act alike.

Jaderberg et al., "Population Based Training of Neural Networks", 2017.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rlmeta.errors import SettingError
from rlmeta.functional import random
from rlmeta.functional.packed import Packed
from rlmeta.learning.field_types import check_types, require_type, shown
from rlmeta.learning.numbers import whole
from rlmeta.learning.settings import require, require_finite, require_range
from rlmeta.learning.state import State

STREAM = "population"
"""Name of the random stream of selection and exploration."""
OWN = (
    *("key", "count", "progress", "active", "world", "memory", "episode", "replay", "task"),
    *("metrics", "best", STREAM),
)
"""Entries of the state that a learner keeps when it becomes a copy of another."""
OWN_WITHIN = ("key", "count", "active")
"""Entries that owners, such as rewards, keep when their learner becomes a copy of another."""
OF_WORLDS = "accumulator"
"""Running sums of a learner's own environments, which it keeps."""


class Population(Protocol):
    """Population settings: selection of parents, and exploration of settings; a frozen dataclass."""

    name: str
    """Name on the command line, where its settings are `--NAME.SETTING`."""
    every: int | str
    """Environment steps of each learner between two exchanges."""

    def parents(self, score: Tensor, active: Tensor, key: Tensor) -> Tensor:
        """Selection: the member that each one becomes a copy of, `[V, R]` int64, itself where it stays.

        Args:
            score: of V members in R populations `[V, R]`, more is better.
            active: `[V, R]`, False for a learner that stopped since it was not finite: it has nothing to give.
            key: `[V, R]`, of this exchange alone.
        """
        ...

    def explore(self, value: Tensor, key: Tensor) -> Tensor:
        """Exploration: new values `[S]` of one setting for copies, from those of their parents.

        A value that the settings refuse is left as it was.
        """
        ...


@dataclass(frozen=True)
class PBT:
    """Population-based training (Jaderberg et al., 2017): truncation selection, then a factor on every setting that
    differs between the members."""

    every: int | str = 20_000
    """Environment steps of each learner between two exchanges, each after an evaluation; 20k is 20,000."""
    fraction: float = 0.25
    """Fraction of the population, at most half, that is replaced (the worst), and that is copied (the best). A
    learner that stopped since it was not finite is always replaced."""
    shrink: float = 0.8
    """Lower one of the two factors by which a copy's settings are multiplied, with probability one half each."""
    grow: float = 1.2
    """Higher one of the two factors."""

    name = "pbt"

    def __post_init__(self) -> None:
        check_types(self)
        if isinstance(self.every, str):
            try:
                object.__setattr__(self, "every", whole(self.every))
            except ValueError:
                raise SettingError(f"PBT: every is {self.every!r}, expected a whole number, such as 20k") from None
        require(int(self.every) >= 1, f"PBT: every is {self.every}, expected at least 1")
        require_range(self, "fraction", 0.0, 0.5, above=True)
        require_range(self, "shrink", 0.0, 1.0, above=True)
        require_range(self, "grow", 1.0)
        require_finite(self, "grow")

    def parents(self, score: Tensor, active: Tensor, key: Tensor) -> Tensor:
        """Truncation selection: each of the worst becomes a copy of a better one of the best, drawn at random."""
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
        """Multiply a setting by one of the two factors, drawn at random."""
        return value * torch.where(random.uniform(key, STREAM, 1, ()) < 0.5, self.shrink, self.grow)


def check_hooks(population: Any) -> None:
    """Refuse what is no population's settings, by its name and hooks.

    Raises:
        SettingError: also for the class instead of its settings.
    """
    hooks = all(callable(getattr(population, hook, None)) for hook in ("parents", "explore"))
    if isinstance(population, type) or not hooks or not isinstance(getattr(population, "name", None), str):
        example = population.__name__ if isinstance(population, type) and hooks else "PBT"
        raise SettingError(f"population is {shown(population)}, expected the settings of one, such as {example}()")
    require_type(getattr(population, "every", None), int, f"population: every of {type(population).__name__}")


def chosen_parents(population: Any, score: Tensor, active: Tensor, key: Tensor) -> Tensor:
    """Selection by a population's `parents`, after a check of what it returns.

    Raises:
        SettingError: no tensor `[V, R]` int64 of members' indices.
    """
    parents = population.parents(score, active, key)
    expected = f"int64 of shape {tuple(score.shape)}, each the index of a member, 0 to {len(score) - 1}"
    answer = _described(parents)
    if answer == f"int64 of shape {tuple(score.shape)}":
        outside = parents[(parents < 0) | (parents >= len(score))]
        answer = f"the index {int(outside[0])}" if len(outside) else expected
    require(
        answer == expected, f"population: {type(population).__name__}.parents returned {answer}, expected {expected}"
    )
    return parents


def explored(population: Any, name: str, value: Tensor, key: Tensor) -> Tensor:
    """New values of a setting by a population's `explore`, in the setting's dtype, after a check of their shape.

    Raises:
        SettingError: no tensor of numbers `[S]`.
    """
    new = population.explore(value, key)
    fits = isinstance(new, Tensor) and new.shape == value.shape and not new.is_complex() and new.dtype != torch.bool
    require(
        fits,
        f"population: {type(population).__name__}.explore returned {_described(new)} for {name}, expected "
        f"{_described(value)}",
    )
    return new.to(value.device, value.dtype)


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return shown(value)
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"


def begin(state: State) -> State:
    """The state with what is remembered of a population: whose copy each learner became at the last exchange, which it
    was at the start, and how often it was replaced, `[S]` each."""
    key = state["key"]
    place = torch.arange(key.numel(), device=key.device).reshape(key.shape)
    return {**state, STREAM: {"parent": place, "origin": place.clone(), "copies": torch.zeros_like(place)}}


def copied(state: State, parent: Tensor, replaced: Tensor) -> State:
    """Copy the trained state of learners to others, except for what is a learner's own, such as keys and environments.

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
