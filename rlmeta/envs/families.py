"""Named families: distributions over supervised or optimisation tasks from which meta-learners draw.

A family draws K tasks for every learner: `tasks(key, counter, K, split)`. The tasks of the splits "train",
"validation" and "test" never overlap; every draw is a function of the learner's key, the counter and the split alone.
A supervised task is `{"support": {observation, target}, "query": {...}}`; an optimisation problem is the
argument of its family's `loss`.
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
    """Named family of tasks, on which a meta-learner is trained."""

    name: str
    source: Any
    """A `Family`, or a `TaskFamily` of environments."""
    table: dict[str, Any] = field(default_factory=dict)
    """TOML table that defines it, {} for a family created in code."""

    native = True

    def world(self, learner_shape: tuple[int, ...], num_envs: int) -> FamilyWorld:
        """World that draws the tasks of every learner."""
        return FamilyWorld(self.source, learner_shape, num_envs)

    def describe(self) -> dict[str, Any]:
        """Serialisable description from which the family can be created again; a user's own has to be passed again."""
        from rlmeta.envs.task import TaskFamily

        definition: dict[str, Any] = {"table": self.table} if self.table else {"settings": _plain_settings(self.source)}
        if isinstance(self.source, TaskFamily):
            ranges = {name: list(bounds) for name, bounds in self.source.ranges.items()}
            definition = {"task": self.source.base.describe(), "ranges": ranges}
        return {"kind": "family", "name": self.name, **definition}


def _plain_settings(family: Any) -> dict[str, Any]:
    """Collect the settings of a dataclass family that are numbers, booleans or text."""
    names = [f.name for f in dataclasses.fields(family) if f.init] if dataclasses.is_dataclass(family) else []
    values = {name: getattr(family, name) for name in names}
    return {name: value for name, value in values.items() if isinstance(value, bool | int | float | str)}


CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "sinusoid": Sinusoid,
    "few-shot-digits": few_shot_digits,
    "few-shot-omniglot": few_shot_omniglot,
    "quadratics": Quadratics,
    "digit-mlps": DigitMLPs,
}
"""Constructors by the value of `family = ` in a TOML file of the `envs` folders."""


def from_table(name: str, table: dict[str, Any], settings: dict[str, Any] | None = None) -> NamedFamily:
    """Create a family from a TOML table with the keys `family` and `settings`.

    Args:
        name: of the table's file.
        table: its content.
        settings: further settings, which override those of the table.

    Raises:
        UnknownNameError: there is no such family, or it has no such setting.
        SettingError: a setting is of another type, or the family refuses it.
    """
    if table["family"] not in CONSTRUCTORS:
        raise unknown_name(f"family in envs/{name}.toml", str(table["family"]), CONSTRUCTORS)
    constructor, arguments = CONSTRUCTORS[table["family"]], {**table.get("settings", {}), **(settings or {})}
    known = inspect.signature(constructor).parameters
    for setting, value in arguments.items():
        if setting not in known:
            raise unknown_name(f"setting of {name}", setting, known)
        if not isinstance(value, type(known[setting].default)):
            raise SettingError(f"{name}: {setting} is {value!r}, expected as {known[setting].default!r}")
    return NamedFamily(name, constructor(**arguments), {**table, "settings": arguments})


class FamilyWorld:
    """World of a meta-learner: draws tasks of a family for `*L` learners, without a changing state.

    Args:
        family: to draw tasks from.
        learner_shape: `*L`.
        num_envs: K, the number of tasks in a meta-batch.
    """

    exact_resume = True
    split: Split = "test"
    """Split of the tasks that an evaluation adapts to."""

    def __init__(self, family: Family, learner_shape: tuple[int, ...], num_envs: int) -> None:
        if num_envs < 1:
            raise SettingError(f"{num_envs} tasks in a meta-batch, expected at least 1")
        check_family(family)
        self.family = family
        self.observation_space, self.action_space = family.observation_space, family.action_space
        self.learner_shape, self.num_envs = tuple(learner_shape), num_envs

    def tasks(self, key: Tensor, counter: int | Tensor, count: int, split: Split) -> Tree:
        """Draw `count` tasks of a split for each learner, every leaf `[*L, K, ...]`."""
        return as_tensors(self.family.tasks(key, counter, count, split), key.device)

    def reset(self, key: Tensor) -> dict[str, Any]:
        """Initial state: the learners' keys."""
        return {"key": key}

    def restore(self, state: dict[str, Any], inexact: bool = False) -> dict[str, Any]:
        """Restored state: as it is, since there is no hidden state."""
        return state

    def close(self) -> None:
        """Release nothing."""
