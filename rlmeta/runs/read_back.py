"""Check before training that a run folder will give back the settings that it is begun with."""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from collections.abc import Callable
from functools import partial
from typing import Any

from rlmeta.data.demonstrations import Demonstrations, Unread
from rlmeta.errors import RlmetaError, SettingError
from rlmeta.learning.comparisons import is_described, same
from rlmeta.learning.field_types import shown
from rlmeta.learning.settings import per_learner_names
from rlmeta.runs import folder as run_folder
from rlmeta.runs.configuration import method_again, settings_again
from rlmeta.runs.experiment import Experiment


def check_read_back(experiment: Experiment) -> None:
    """Read an experiment's configuration as a load does, and compare the settings with the experiment's own.

    Code, rewards and demonstrations are given again or compared where they are read, and are left out here.

    Raises:
        SettingError: a setting cannot be written, or would come back as another value; the message names it.
    """
    config = tomllib.loads(run_folder.encoded(experiment.config()).decode())
    for variant, table in zip(experiment.variants, config["variants"]):
        _check(variant, partial(_variant_again, variant, table))
    owners = [*zip(experiment.methods, config["methods"]), (experiment.population, config.get("population"))]
    for owner, table in owners:
        if dataclasses.is_dataclass(owner) and not any(map(is_described, table["settings"].values())):
            _check(owner, partial(method_again, type(owner), table["settings"], type(owner).__name__))


def _variant_again(variant: Any, table: dict[str, Any]) -> Any:
    """A variant's settings from their table, with what only the user can give again as it is."""
    own = {name: getattr(variant, name) for name, entry in table.items() if is_described(entry)}
    for name, value in own.items():
        if isinstance(value, str) and name != "demonstrations":
            raise SettingError(
                f"{name} is {shown(value)}, but '<' marks what a run folder only describes: leave it out"
            )
    learner = getattr(variant, "learner", None)
    network = getattr(variant, "network", None) or getattr(learner, "network", None)
    cls, inner = type(variant), None if learner is None else type(learner)
    return cls(**settings_again(cls, table, inner, network, own, "the run folder", False))


def _check(owner: Any, again: Callable[[], Any]) -> None:
    """Compare the fields of settings with those that are read back."""
    cls = type(owner)
    hints = typing.get_type_hints(cls, include_extras=True)
    try:
        restored = again()
    except (RlmetaError, TypeError) as error:
        raise SettingError(f"{cls.__name__}: a run folder can't give back these settings ({error})") from error
    for name in (field.name for field in dataclasses.fields(owner)):
        before, after = getattr(owner, name), getattr(restored, name)
        if name == "rewards" or isinstance(before, Demonstrations | Unread):
            continue
        joined = typing.get_origin(hints.get(name)) is tuple or name in per_learner_names(cls)
        before = tuple(before) if joined and isinstance(before, list) else before
        if not same(before, after):
            raise SettingError(
                f"{cls.__name__}: {name} is {shown(before)}, which a run folder would give back as {shown(after)}: "
                "give numbers, text, switches, or a tuple or a table of them"
            )
