"""Settings: frozen dataclasses whose fields are per learner (tensors `[*L]` in a run) or static (shapes, switches).

The same dataclass makes the command line's flags, the saved configuration and the documentation's table.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import typing
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Annotated, Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import torch
from torch import Tensor

from rlmeta.errors import SettingError, unknown_name
from rlmeta.learning.field_types import check_types

PerLearner: TypeAlias = Annotated[float | Sequence[float], "per learner"]
"""Number that may differ between learners; a list compares its values, `--seeds` learners each."""

LearnerSettings: TypeAlias = Annotated[Any, "learner"]
"""Settings of another learner, such as the one whose initial weights are learned; None for a default."""

S = TypeVar("S")


@runtime_checkable
class Bindable(Protocol):
    """Protocol of a learner's settings, which `bind` turns into a learner."""

    def bind(self, observation_space: Any, action_space: Any, methods: Sequence[Any] = ()) -> Any:
        """Create the learner for an observation and an action space, with lifelong methods."""
        ...


def name_of(settings_class: type) -> str:
    """Name of a learner on the command line: `PPO` is ppo, `ProtoNet` protonet, `MyAgent` my_agent, `TD3BC` td3_bc."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])(?!Net$)|(?<=\d)(?=[A-Z]{2})", "_", settings_class.__name__).lower()


def settings_classes(names: Mapping[str, Any]) -> tuple[type, ...]:
    """Select the settings classes of learners among a package's names: the dataclasses that `bind` to spaces."""
    classes = [value for value in names.values() if isinstance(value, type)]
    return tuple(cls for cls in classes if dataclasses.is_dataclass(cls) and issubclass(cls, Bindable))


def per_learner_names(settings_class: type) -> list[str]:
    """Names of the fields declared `PerLearner`."""
    hints = typing.get_type_hints(settings_class, include_extras=True)
    return [
        f.name
        for f in dataclasses.fields(settings_class)
        if "per learner" in getattr(hints[f.name], "__metadata__", ())
    ]


def _inner(settings: Any) -> dict[str, tuple[Any, ...]]:
    """Names of fields that hold nested settings with per-learner values, such as an agent's rewards."""
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list | tuple)}
    return {name: parts for name, parts in tuples.items() if any(map(_inner_names, parts))}


def _inner_names(part: Any) -> list[str]:
    """Names of the per-learner fields of nested settings."""
    if not dataclasses.is_dataclass(part) or isinstance(part, type):
        return []
    return [f.name for f in dataclasses.fields(part) if f.type in ("PerLearner", PerLearner)]


def per_learner_values(settings: Any) -> dict[str, Any]:
    """Per-learner settings by name; of nested ones, such as the reward rnd's coefficient, `rnd.coefficient`."""
    own = {name: getattr(settings, name) for name in per_learner_names(type(settings))}
    parts = [part for parts in _inner(settings).values() for part in parts]
    return own | {f"{part.name}.{name}": getattr(part, name) for part in parts for name in _inner_names(part)}


def with_values(settings: S, values: Mapping[str, Any]) -> S:
    """Replace per-learner settings, by the names of `per_learner_values`."""
    changed = {name: value for name, value in values.items() if "." not in name}
    for field, parts in _inner(settings).items():
        new = [{n: values[f"{p.name}.{n}"] for n in _inner_names(p) if f"{p.name}.{n}" in values} for p in parts]
        changed[field] = tuple(dataclasses.replace(p, **now) if now else p for p, now in zip(parts, new))
    return dataclasses.replace(settings, **changed)  # type: ignore[type-var]


def variants(settings: S) -> list[S]:
    """Expand settings to one copy for every combination of the per-learner fields that hold a list."""
    lists = {name: value for name, value in per_learner_values(settings).items() if isinstance(value, Sequence)}
    combinations = itertools.product(*lists.values())
    return [with_values(settings, dict(zip(lists, values))) for values in combinations]


def static_values(settings: Any) -> dict[str, Any]:
    """Static settings, which all learners of one batch must share."""
    shared = set(per_learner_names(type(settings)))
    return {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.name not in shared}


def group(settings: Sequence[S]) -> list[list[S]]:
    """Split settings into groups that can be one batch: same class, same static values."""
    groups: list[list[S]] = []
    for variant in settings:
        for members in groups:
            if type(members[0]) is type(variant) and _shared(members[0]) == _shared(variant):
                members.append(variant)
                break
        else:
            groups.append([variant])
    return groups


def _shared(settings: Any) -> dict[str, Any]:
    """Static settings, with the static values of nested settings."""
    own, inner = static_values(settings), _inner(settings)
    return own | {name: [_static_part(part) for part in parts] for name, parts in inner.items()}


def _static_part(part: Any) -> Any:
    names = _inner_names(part)
    if not names:
        return part
    return type(part), {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.name not in names}


def hyper_tensors(settings: Sequence[Any], repeats: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Convert per-learner settings to tensors `[S]`: each variant `repeats` times, variant by variant."""
    values = [per_learner_values(variant) for variant in settings]
    return {
        name: torch.tensor(
            [float(each[name]) for each in values], dtype=torch.float32, device=device
        ).repeat_interleave(repeats)
        for name in values[0]
    }


def difference(settings: Any, all_of_them: Sequence[Any]) -> str:
    """Label of a variant: the settings that differ between variants, as `learning_rate=0.001, clip=0.2`."""
    if len(all_of_them) < 2:
        return ""
    inner = _inner(settings)
    names = [
        f.name
        for f in dataclasses.fields(settings)
        if f.name not in inner
        and any(getattr(other, f.name, None) != getattr(settings, f.name) for other in all_of_them)
    ]
    texts = [f"{name}={getattr(settings, name)}" for name in names]
    own, others = per_learner_values(settings), [per_learner_values(other) for other in all_of_them]
    within = [name for name in own if "." in name and any(other.get(name) != own[name] for other in others)]
    return ", ".join([*texts, *(f"{name}={own[name]}" for name in within)])


def check_names(settings_class: type, values: dict[str, Any], where: str) -> None:
    """Check that the class has fields of these names."""
    known = [f.name for f in dataclasses.fields(settings_class)]
    for name in values:
        if name not in known:
            raise SettingError(f"{where}: {unknown_name(f'setting of {settings_class.__name__}', name, known)}")


def require(condition: bool, message: str) -> None:
    """Raise a `SettingError` with this message unless the condition holds."""
    if not condition:
        raise SettingError(message)


def values_of(setting: float | Sequence[float]) -> list[float]:
    """List the values of a per-learner setting."""
    return [float(value) for value in setting] if isinstance(setting, Sequence) else [float(setting)]


def require_range(settings: Any, name: str, low: float, high: float = math.inf, *, above: bool = False) -> None:
    """Check that a setting is within [low, high] (or (low, high] with `above`), naming it and its value.

    Where the field is declared an int, a number that is not whole is refused too.
    """
    setting = getattr(settings, name)
    kinds = [f.type for f in dataclasses.fields(settings) if f.name == name]
    counts = kinds[0] in ("int", int)
    if isinstance(setting, list | tuple) and (counts or kinds[0] in ("float", float)):
        raise SettingError(
            f"{type(settings).__name__}: {name} is {setting!r}, expected one number: a list compares settings that are "
            "per learner, others are trained one after another"
        )
    if isinstance(setting, Sequence) and not setting:
        raise SettingError(f"{type(settings).__name__}: {name} is {setting!r}, expected a number, or some to compare")
    for value in setting if isinstance(setting, Sequence) else [setting]:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise SettingError(f"{type(settings).__name__}: {name} is {setting!r}, expected a number")
        if counts and not isinstance(value, Integral):
            raise SettingError(f"{type(settings).__name__}: {name} is {setting!r}, expected a whole number")
    for value in values_of(setting):
        if not (low < value if above else low <= value) or not value <= high:
            bound = f"{'above' if above else 'at least'} {low:g}" + (
                "" if math.isinf(high) else f" and at most {high:g}"
            )
            raise SettingError(f"{type(settings).__name__}: {name} is {value:g}, expected {bound}")


def require_finite(settings: Any, *names: str) -> None:
    """Check that settings are finite: infinite factors would make every weight NaN."""
    for name in names:
        if not all(map(math.isfinite, values_of(getattr(settings, name)))):
            raise SettingError(
                f"{type(settings).__name__}: {name} is {getattr(settings, name)!r}, expected a number that is finite"
            )


def check_choices(settings: Any) -> None:
    """Check choices and switches of settings and nested settings."""
    check_types(settings)
    for name, hint in typing.get_type_hints(type(settings), include_extras=True).items():
        if "learner" in getattr(hint, "__metadata__", ()) and dataclasses.is_dataclass(getattr(settings, name)):
            check_choices(getattr(settings, name))


def merge(batch: Sequence[S]) -> S:
    """Merge variants to one settings object: their shared static values, and lists of the per-learner ones."""
    if len(batch) == 1:
        return batch[0]
    values = [per_learner_values(variant) for variant in batch]
    return with_values(batch[0], {name: tuple(each[name] for each in values) for name in values[0]})
