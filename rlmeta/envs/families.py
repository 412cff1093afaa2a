"""Families of supervised and optimisation problems: distributions that meta-learners draw tasks from.

A family draws K tasks for every learner: `tasks(key, counter, K, split)`. What belongs to the splits "train",
"validation" and "test" never overlaps; every draw is a function of the learner's key, the counter and the split alone.
A supervised task is `{"support": {observation, target}, "query": {...}}`; an optimisation problem is whatever its
family's `loss` needs.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rlmeta.envs.few_shot import few_shot_digits, few_shot_omniglot
from rlmeta.envs.minimisation import DigitMLPs, Quadratics
from rlmeta.envs.regression import Sinusoid
from rlmeta.envs.task_families import Family, Split, as_tensors, check_family
from rlmeta.errors import SettingError, unknown_name
from rlmeta.functional.tree import Tree


@dataclass(frozen=True)
class NamedFamily:
    """A family under its name: what a meta-learner is trained on."""

    name: str
    source: Any
    """A `Family`, or a `TaskFamily` of environments."""
    table: dict[str, Any] = field(default_factory=dict)
    """The TOML table it was made from, {} for one made in code."""

    native = True

    def world(self, learner_shape: tuple[int, ...], num_envs: int) -> FamilyWorld:
        """The tasks of every learner."""
        return FamilyWorld(self.source, learner_shape, num_envs)

    def describe(self) -> dict[str, Any]:
        """What a saved configuration needs to make it again; a family made in code is the user's to give again."""
        from rlmeta.envs.task import TaskFamily

        made: dict[str, Any] = {"table": self.table} if self.table else {"settings": _plain_settings(self.source)}
        if isinstance(self.source, TaskFamily):
            made = {"task": self.source.base.describe(), "ranges": {n: list(r) for n, r in self.source.ranges.items()}}
        return {"kind": "family", "name": self.name, **made}


def _plain_settings(family: Any) -> dict[str, Any]:
    """The settings of a family that is a dataclass, as far as they are numbers, switches or text."""
    made = [f.name for f in dataclasses.fields(family) if f.init] if dataclasses.is_dataclass(family) else []
    values = {name: getattr(family, name) for name in made}
    return {name: value for name, value in values.items() if isinstance(value, bool | int | float | str)}


MADE: dict[str, Callable[..., Any]] = {
    "sinusoid": Sinusoid,
    "few-shot-digits": few_shot_digits,
    "few-shot-omniglot": few_shot_omniglot,
    "quadratics": Quadratics,
    "digit-mlps": DigitMLPs,
}
"""What `family = ` in a file of the `envs` folders may be, and what makes it."""


def from_table(name: str, table: dict[str, Any], settings: dict[str, Any] | None = None) -> NamedFamily:
    """The family that a TOML table with the keys `family` and `settings` describes.

    Args:
        name: of the table's file.
        table: what it says.
        settings: further ones, which win.

    Raises:
        UnknownNameError: there is no such family, or it has no such setting.
        SettingError: it can't be made with these settings.
    """
    if table["family"] not in MADE:
        raise unknown_name(f"family in envs/{name}.toml", str(table["family"]), MADE)
    make, given = MADE[table["family"]], {**table.get("settings", {}), **(settings or {})}
    known = inspect.signature(make).parameters
    for setting, value in given.items():
        if setting not in known:
            raise unknown_name(f"setting of {name}", setting, known)
        if not isinstance(value, type(known[setting].default)):
            raise SettingError(f"{name}: {setting} is {value!r}, expected as {known[setting].default!r}")
    return NamedFamily(name, make(**given), {**table, "settings": given})


class FamilyWorld:
    """The tasks of `*L` learners; nothing in it changes.

    Args:
        family: what to draw from.
        learner_shape: `*L`.
        num_envs: K, tasks of a meta-batch.
    """

    exact_resume = True
    split: Split = "test"
    """Of the tasks that an evaluation adapts to."""

    def __init__(self, family: Family, learner_shape: tuple[int, ...], num_envs: int) -> None:
        if num_envs < 1:
            raise SettingError(f"{num_envs} tasks in a meta-batch, expected at least 1")
        check_family(family)
        self.family = family
        self.observation_space, self.action_space = family.observation_space, family.action_space
        self.learner_shape, self.num_envs = tuple(learner_shape), num_envs

    def tasks(self, key: Tensor, counter: int | Tensor, count: int, split: Split) -> Tree:
        """`count` tasks of the split for each learner, every leaf `[*L, K, ...]`."""
        return as_tensors(self.family.tasks(key, counter, count, split), key.device)

    def reset(self, key: Tensor) -> dict[str, Any]:
        """Nothing to remember but whose it is."""
        return {"key": key}

    def restore(self, state: dict[str, Any], inexact: bool = False) -> dict[str, Any]:
        """Nothing is hidden."""
        return state

    def close(self) -> None:
        """Nothing to release."""
