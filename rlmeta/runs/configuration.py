"""Restore an experiment from `config.toml`; user code and data that it only names have to be given again."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, get_args

from rlmeta.agents.agent import NetworkFactory
from rlmeta.data.demonstrations import Demonstrations, Unread
from rlmeta.envs import families, native, streams, trusted
from rlmeta.envs.names import check_problem
from rlmeta.envs.native import NativeEnv
from rlmeta.envs.streams import TaskStream
from rlmeta.envs.task import Mode, Task, TaskFamily, task
from rlmeta.errors import CheckpointError, SettingError
from rlmeta.learning.comparisons import difference, is_described, object_name
from rlmeta.learning.digests import check_digests
from rlmeta.learning.field_types import check_values
from rlmeta.learning.method import Method
from rlmeta.learning.populations import Population
from rlmeta.learning.settings import check_names, per_learner_names, values_of, variants
from rlmeta.runs import grammar
from rlmeta.runs.descriptions import entry_of, settings_table
from rlmeta.runs.experiment import Budget, Experiment, Problem, method_table
from rlmeta.runs.folder import CONFIG
from rlmeta.runs.objects import load_object
from rlmeta.runs.populations import POPULATIONS
from rlmeta.runs.rewards_again import check_rewards_again, or_allow, rewards_again
from rlmeta.runs.shipped import METHODS, agent_class, checked_class


def from_config(
    config: dict[str, Any],
    *,
    where: str,
    agent: type | None = None,
    network: NetworkFactory | None = None,
    source: Any = None,
    methods: tuple[Method, ...] = (),
    own: Mapping[str, Any] | None = None,
    training: bool = True,
) -> Experiment:
    """Restore an experiment from its saved configuration.

    Args:
        config: the table that `Experiment.config` returned.
        where: the run's folder, for error messages.
        agent: settings class of the user's own agent. A configuration names user code but loads none that the user has
            not allowed (`trusted.allowing`), so it has to be given again, as do the next four.
        network: the user's network factory.
        source: the user's environment factory, stream or family.
        methods: the lifelong methods.
        own: other settings by name that TOML cannot hold: rewards, demonstrations that are not from a file.
        training: also read what only training needs, demonstrations and rewards.

    Raises:
        CheckpointError: this is not the configuration of a run.
        SettingError: user code or data are missing, or differ from those the run began with.
    """
    where_config = f"{where}/{CONFIG}"
    with trusted.reading(where_config):
        check_table(config, CONFIGURATION, where_config)
        check_table(config["budget"], {}, where_config)
        cls = _agent_again(config["exp_name"], agent, where)
        saved = config["variants"]
        tables = [settings_again(cls, table, agent, network, own or {}, where, training) for table in saved]
        check_names(Budget, config["budget"], f"{where_config}: budget")
        for method in config["methods"]:
            check_table(method, METHOD, f"{where_config}: methods")
        if not tables:
            raise CheckpointError(f"{where_config}: variants is empty, expected the settings of a learner")
        experiment = Experiment(
            variants=tuple(_saved_variant(cls(**t), before, where_config) for t, before in zip(tables, saved)),
            seeds=tuple(config["seeds"]),
            problem=problem_again(config["task"], source, where),
            budget=Budget(**config["budget"]),
            methods=_same_methods(methods, config["methods"], where) or methods_again(config["methods"], where),
            population=_population_again(config.get("population"), where),
            device=config["device"],
            threads=config["threads"],
        )
        check_digests(config["digests"], experiment.digests(), where)
        if network is not None and not any("network" in t or "network=" in str(t.get("learner")) for t in saved):
            raise SettingError(f"{where_config} had no network of your own, network= is {network!r}: leave it out")
        return experiment


def _saved_variant(settings: Any, saved: Mapping[str, Any], where_config: str) -> Any:
    """Settings of one variant; if the rewards given again compare values, the variant whose rewards were saved."""
    compared = variants(settings)
    tables = [settings_table(variant).get("rewards", []) for variant in compared]
    if not any(tables):  # none, or left out as only training needs them
        return compared[0]
    return compared[check_rewards_again(saved["rewards"], tables, where_config)]


@contextlib.contextmanager
def within_memory(where: str) -> Iterator[None]:
    """Turn an out-of-memory error into a `CheckpointError`, while a saved configuration of unchecked size is restored.

    Args:
        where: the run's folder, for error messages.

    Raises:
        CheckpointError: an allocation failed, or a size overflowed.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not TOO_LARGE.search(str(error)):
            raise
        raise CheckpointError(
            f"{where}/{CONFIG} describes a run that needs more memory than there is: restore it from a copy, or use a "
            "larger machine"
        ) from error


TOO_LARGE = re.compile("allocate memory|out of memory|not enough memory|overflow")
"""Matches torch's error messages about a tensor that is too large."""
Kinds = Mapping[str, tuple[type, ...]]
"""Allowed types of a table's entries by name."""

TEXT, WHOLE, SWITCH, TABLE, LIST = (str,), (int,), (bool,), (dict,), (list,)
WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "a table", list: "a list"}
CONFIGURATION: Kinds = {
    "exp_name": TEXT,
    "env_id": TEXT,
    "seeds": LIST,
    "device": TEXT,
    "threads": WHOLE,
    "task": TABLE,
    "budget": TABLE,
    "digests": TABLE,
    "methods": LIST,
    "variants": LIST,
}
METHOD: Kinds = {"name": TEXT, "settings": TABLE}


def check_table(table: Any, kinds: Kinds, where: str) -> None:
    """Check that a value is a table whose entries are all there and of the expected types.

    Raises:
        CheckpointError: it is not, or an entry is missing or of another type; the message names it.
    """
    if not isinstance(table, dict):
        raise CheckpointError(f"{where} has {table!r}, expected a table: restore it from a copy")
    for name, types in kinds.items():
        if name not in table:
            raise CheckpointError(f"{where} lacks {name!r}; it is not the configuration of a run: restore it")
        if type(table[name]) not in types:
            expected = " or ".join(WORDS[kind] for kind in types)
            raise CheckpointError(f"{where}: {name} is {table[name]!r}, expected {expected}: restore it from a copy")


def settings_again(
    cls: type,
    saved: Any,
    agent: type | None,
    network: NetworkFactory | None,
    own: Mapping[str, Any],
    where: str,
    training: bool,
) -> dict[str, Any]:
    """Keyword arguments of a learner's settings from their saved table, after a check of names and types."""
    where_variants = f"{where}/{CONFIG}: variants"
    check_table(saved, {}, where_variants)
    check_table(saved, {name: TEXT for name in ("network", "learner") if name in saved}, where_variants)
    check_names(cls, saved, where_variants)
    check_names(cls, dict(own), f"{where}: own")
    table = values_again(cls, saved)
    if "network" in table:
        table["network"] = _network_again(table["network"], network, where)
    if "learner" in table:
        table["learner"] = _learner_again(table["learner"], agent, network, where)
    if not training:
        table |= _left_out(table, own)
    elif "rewards" in table and "rewards" not in own:
        table["rewards"] = rewards_again(saved["rewards"], (), where)
    table |= _own_again(cls, saved, table, own, where)
    check_values(cls, table, where_variants)
    named = table.get("demonstrations")
    if isinstance(named, str | os.PathLike) and (training or "demonstrations" in own):
        table["demonstrations"] = Demonstrations.load(named)
    return table


def values_again(cls: type, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from their saved table: lists become tuples, except where the class declares a list."""
    hints = typing.get_type_hints(cls, include_extras=True)
    lists = [name for name, hint in hints.items() if list in (hint, typing.get_origin(hint))]
    return {n: tuple(v) if isinstance(v, list) and n not in lists else v for n, v in saved.items()}


def _left_out(table: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Placeholders for settings that only training needs, demonstrations and rewards, unless they are given again."""
    placeholders: dict[str, Any] = {}
    if "demonstrations" in table and "demonstrations" not in own:
        placeholders["demonstrations"] = Unread(str(table["demonstrations"]))
    if "rewards" in table and "rewards" not in own:
        placeholders["rewards"] = ()
    return placeholders


def methods_again(
    tables: Sequence[Mapping[str, Any]], where: str, own: Mapping[str, Any] | None = None
) -> tuple[Method, ...]:
    """Restore the lifelong methods of a saved configuration.

    Args:
        tables: the configuration's `methods`.
        where: the run's folder, for error messages.
        own: classes or instances of the user's own methods by name, which the configuration only names.

    Raises:
        SettingError: one of the user's own methods is missing.
    """
    own_methods = {**_allowed_methods(tables), **(own or {})}
    missing = [t.get("class", t["name"]) for t in tables if _is_missing(t, own_methods.get(t["name"]))]
    if missing:
        raise SettingError(
            f"{where} had lifelong methods of your own: pass them again as lifelong= (on the command line --lifelong "
            f"{','.join(missing)}){or_allow(missing[0])}"
        )
    methods: list[Method] = []
    for table in tables:
        method: Any = own_methods.get(table["name"], METHODS.get(table["name"]))
        methods.append(
            method
            if isinstance(method, Method)
            else method_again(method, table["settings"], f"{where}/{CONFIG}: {table['name']}")
        )
    return tuple(methods)


def _is_missing(table: Mapping[str, Any], own: Any) -> bool:
    """Whether the user has to give a method again: its class is unknown, or a setting is only described."""
    if isinstance(own, Method):
        return False
    unknown = own is None and ("class" in table or table["name"] not in METHODS)
    return unknown or any(map(is_described, table["settings"].values()))


def _allowed_methods(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Load the user's own methods that the configuration names and whose modules the user has allowed."""
    named = {table["name"]: table["class"] for table in tables if isinstance(table.get("class"), str)}
    return {name: load_object(text) for name, text in named.items() if trusted.is_allowed(text)}


def _population_again(table: Any, where: str) -> Population | None:
    """Restore the population of a saved configuration; a class of the user's needs its module allowed."""
    if table is None:
        return None
    check_table(table, METHOD, f"{where}/{CONFIG}: population")
    named = table.get("class", table["name"])
    if named not in POPULATIONS and not trusted.is_allowed(str(named)):
        raise SettingError(
            f"{where}/{CONFIG} had a population of your own, {named}: give its module again{or_allow(str(named))}"
        )
    cls: Any = POPULATIONS.get(named) or load_object(named)
    again: Population = method_again(cls, table["settings"], f"{where}/{CONFIG}: population")
    return again


def method_again(cls: Any, saved: Mapping[str, Any], where: str) -> Any:
    """Instantiate a lifelong method or a population, after a check of its settings' names and types."""
    values: dict[str, Any] = {}
    if dataclasses.is_dataclass(cls):
        check_names(cls, dict(saved), where)  # type: ignore[arg-type]
        values = values_again(cls, saved)  # type: ignore[arg-type]
        check_values(cls, values, where)  # type: ignore[arg-type]
    elif saved:
        raise CheckpointError(f"{where} has settings, but takes none: restore it from a copy")
    return cls(**values)


def _network_again(name: str, network: NetworkFactory | None, where: str) -> NetworkFactory:
    """Network factory of a saved name: rlmeta's, the user's if allowed, else the one given again."""
    if name.startswith("rlmeta.nn.") or (network is None and trusted.is_allowed(name)):
        own: NetworkFactory = load_object(name)
        return own
    if network is None:
        raise SettingError(
            f"{where}/{CONFIG} had the network {name}: pass it again as network= (on the command line --network)"
            f"{or_allow(name)}"
        )
    given = object_name(network)
    if re.split("[:.]", given)[-1] != re.split("[:.]", name)[-1]:  # the same function may lie elsewhere by now
        raise SettingError(f"{where} had the network {name}, got {given}: give the same")
    return network


def _agent_again(name: str, agent: type | None, where: str) -> type:
    """Settings class of a saved agent name: rlmeta's, the user's if allowed, else the one given again."""
    if ":" not in name or (agent is None and trusted.is_allowed(name)):
        return agent_class(name)
    if agent is None:
        raise SettingError(
            f"{where}/{CONFIG} had the agent {name}: pass it again as agent= (on the command line --agent)"
            f"{or_allow(name)}"
        )
    if checked_class(agent, name).__qualname__ != name.partition(":")[2]:
        raise SettingError(f"{where} had the agent {name}, got {agent.__qualname__}: give the same")
    return agent


def _learner_again(text: str, agent: type | None, network: NetworkFactory | None, where: str) -> Any:
    """Settings of the inner learner of a saved text; user code in it is loaded only if allowed or given again."""
    words = text.split()
    names = [word.removeprefix("network=") for word in words if word.startswith("network=")]
    cls = None if words[:1] in ([], ["none"]) else _agent_again(words[0], agent, where)
    settings = grammar.learner(" ".join(word for word in words if not word.startswith("network=")), cls)
    return dataclasses.replace(settings, network=_network_again(names[0], network, where)) if names else settings


def _same_methods(methods: tuple[Method, ...], tables: Sequence[dict[str, Any]], where: str) -> tuple[Method, ...]:
    """Check that the methods given again are the run's, in order, with its settings.

    Where these compare values, every variant of the run has its own again.
    """
    saved_names = [table["name"] for table in tables]
    if methods and [method.name for method in methods] != saved_names:
        names = ", ".join(method.name for method in methods)
        saved = ", ".join(saved_names) or "(none)"
        raise SettingError(f"{where} had lifelong methods {saved}, got {names}: give the same")
    return tuple(_same_method(method, table, where) for method, table in zip(methods, tables))


def _same_method(method: Method, saved: dict[str, Any], where: str) -> Method:
    now, hint = method_table(method), "give the same, or train another run with the change"
    classes = [str(table.get("class", "")).partition(":")[2] for table in (saved, now)]
    if classes[0] != classes[1]:
        had, given = (f"{name} of your own" if name else "that of rlmeta" for name in classes)
        raise SettingError(f"{where} had the lifelong method {method.name}, {had}, got {given}: {hint}")
    if not dataclasses.is_dataclass(method):
        return method
    names = [name for name in per_learner_names(type(method)) if isinstance(saved["settings"].get(name), list)]
    listed = {name: values_of(getattr(method, name)) for name in names}
    whole = {name: saved["settings"][name] for name in names}
    compared = [name for name in names if listed[name] in (whole[name], list(dict.fromkeys(whole[name])))]
    differs = difference(saved["settings"], {**now["settings"], **{name: whole[name] for name in compared}})
    if differs:
        raise SettingError(f"{where} had the lifelong method {method.name} with {differs}: {hint}")
    return dataclasses.replace(method, **{name: tuple(whole[name]) for name in names}) if names else method


def _own_again(
    cls: type, saved: Mapping[str, Any], table: Mapping[str, Any], own: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Settings given again, with the run's values; those that the configuration only describes, in <>, are required."""
    described = {name: value for name, value in table.items() if is_described(value)}
    for name, value in described.items():
        if name not in own:
            raise SettingError(
                f"{where} had the {name} {value}, which a configuration only describes: pass it again as "
                f"own={{{name!r}: ...}}{' (on the command line --demonstrations)' * (name == 'demonstrations')}"
            )
    hints = typing.get_type_hints(cls, include_extras=True)
    for name in own.keys() - {"demonstrations", "rewards"}:  # whose data and settings are compared elsewhere
        differs = difference(
            {name: saved[name]} if name in saved else {}, {name: entry_of(name, own[name], hints.get(name))}
        )
        if differs:
            raise SettingError(f"{where} had {differs}: give the same, or train another run with the change")
    again = {name: own[name] for name in table if name in own}
    if "rewards" in again:
        again["rewards"] = rewards_again(saved["rewards"], again["rewards"], where)
    return again


DESCRIBED: dict[str, Kinds] = {
    "task": {"name": TEXT, "source": TEXT, "settings": TABLE, "mode": TEXT, "ranges": TABLE},
    "data": {"name": TEXT},
    "family": {"name": TEXT},
    "stream": {"name": TEXT, "order": (str, int), "scenario": TEXT},
}
"""Required entries of the table `task` by kind of problem."""
OPTIONAL: Kinds = {
    "constants": TABLE,
    "table": TABLE,
    "task": TABLE,
    "tasks": LIST,
    "reveals": LIST,
    "observe_identity": SWITCH,
}


def _check_ranges(ranges: dict[str, Any], where: str) -> None:
    for name, bounds in ranges.items():
        if not isinstance(bounds, list) or len(bounds) != 2 or not all(isinstance(b, Real) for b in bounds):
            raise CheckpointError(f"{where}: the range of {name} is {bounds!r}, expected [low, high]")


ENV_AGAIN = "pass it again as env= (on the command line --env PACKAGE.MODULE:NAME)"


def problem_again(described: dict[str, Any], source: Any, where: str) -> Problem:
    """Restore the problem of a saved configuration: a task, samples, a family or a stream.

    Args:
        described: the configuration's table `task`.
        source: the user's environment factory, stream or family given again, or None.
        where: the run's folder, for error messages.

    Raises:
        CheckpointError: the table is malformed.
        SettingError: user code or data are missing.
    """
    kind, where_task = described.get("kind", "task"), f"{where}/{CONFIG}: task"
    if not isinstance(kind, str) or kind not in DESCRIBED:
        raise CheckpointError(f"{where_task}: kind is {kind!r}, expected one of {', '.join(DESCRIBED)}")
    check_table(described, DESCRIBED[kind], where_task)
    optional = {name: types for name, types in OPTIONAL.items() if name in described}
    check_table(described, optional, where_task)
    if "ranges" in described:
        _check_ranges(described["ranges"], where_task)
    if "table" in described:
        check_problem(described["table"], where_task)
    if kind == "stream":
        return _stream_again(described, source, where)
    if kind == "family" and source is None and "table" in described:
        return families.from_table(described["name"], described["table"])
    if kind == "family" and source is None and "task" in described:
        check_table(described, {"ranges": TABLE}, where_task)
        ranges = {name: (low, high) for name, (low, high) in described["ranges"].items()}
        check_table(described["task"], DESCRIBED["task"], where_task)
        base = _task_again(described["task"], None, where)
        return families.NamedFamily(described["name"], TaskFamily(described["name"], base, ranges))
    if kind in ("data", "family"):
        if source is None:
            what = "samples" if kind == "data" else "family"
            raise SettingError(f"{where} learned from your own {what} {described['name']!r}: {ENV_AGAIN}")
        is_complete = kind == "data" or isinstance(source, families.NamedFamily)
        restored = source if is_complete else families.NamedFamily(described["name"], source)
    else:
        restored = _task_again(described, source, where)
    parts = [name for name in ("constants", "settings", "ranges") if name in described]
    differs = difference(*(_constants_of(table, parts) for table in (described, restored.describe())))
    if source is not None and differs:
        raise SettingError(f"{where} learned in environments with {differs}: give those it learned in")
    return restored


def _constants_of(described: Mapping[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    """A task's or family's constants, settings and ranges by name."""
    tables = [described.get(name) or {} for name in parts]
    return {name: value for table in tables for name, value in table.items()}


def _stream_again(described: dict[str, Any], source: Any, where: str) -> TaskStream:
    scenario, order = described["scenario"], described["order"]
    if isinstance(source, TaskStream):
        again = source if source.order == order else dataclasses.replace(source, order=order)
        description = again.describe()
        for name in ("scenario", "reveals", "restart_optimizer", "observe_identity"):
            if described.get(name) != description.get(name):
                raise SettingError(
                    f"{where} learned from a stream with {name}={described.get(name)!r}, this one has "
                    f"{description.get(name)!r}: give the one it learned from"
                )
        return again
    if "table" in described:
        table = described["table"]
        return streams.from_table(described["name"], table, scenario if "data" in table else None, order)
    stream: Kinds = {"tasks": LIST, "reveals": LIST, "observe_identity": SWITCH}
    check_table(described, stream, f"{where}/{CONFIG}: task")
    for entry in described["tasks"]:
        check_table(entry, {}, f"{where}/{CONFIG}: tasks")
    for entry in described["reveals"]:
        check_table({"reveals": entry}, {"reveals": TEXT}, f"{where}/{CONFIG}: task")
    tasks = tuple(problem_again(entry, None, where) for entry in described["tasks"])
    reveals, shown = frozenset(described["reveals"]), described["observe_identity"]
    return TaskStream(described["name"], tasks, reveals, order, scenario, described.get("restart_optimizer"), shown)


NATIVE_CLASSES: dict[str, type[NativeEnv]] = {type(env).__name__: type(env) for env in native.NATIVE.values()}
"""Native environments by class name, which their constants alone restore."""


def _allowed_source(described: dict[str, Any], where: str) -> Any:
    """Load the user's environment, or its factory, from a module that the user has allowed."""
    named = described["source"]
    if not trusted.is_allowed(named):
        raise SettingError(f"{where}/{CONFIG} had environments of {named}: {ENV_AGAIN}{or_allow(named)}")
    loaded = load_object(named)
    is_native_class = isinstance(loaded, type) and issubclass(loaded, NativeEnv)
    return loaded(**described.get("constants", {})) if is_native_class else loaded


def _task_again(described: dict[str, Any], source: Any, where: str) -> Task:
    """Restore the task of a saved configuration; user code has to be given again or allowed."""
    if isinstance(source, Task):
        return source
    name, settings, mode = described["name"], described["settings"], described["mode"]
    if mode not in get_args(Mode):
        raise CheckpointError(f"{where}/{CONFIG}: mode is {mode!r}, expected one of {', '.join(get_args(Mode))}")
    limits: Any = {name: described[name] for name in ("max_episode_steps", "worker_timeout") if name in described}
    kinds: Kinds = {"max_episode_steps": WHOLE, "worker_timeout": (int, float)}
    check_table(described, {"episodes": WHOLE} if "episodes" in described else {}, f"{where}/{CONFIG}: task")
    check_table(limits, {name: kinds[name] for name in limits}, f"{where}/{CONFIG}: task")
    _check_ranges(described["ranges"], f"{where}/{CONFIG}: task")
    ranges = {constant: (low, high) for constant, (low, high) in described["ranges"].items()}
    module, _, cls = described["source"].partition(":")
    shipped = module.startswith("rlmeta.envs.native.") and cls in NATIVE_CLASSES
    is_object = not shipped and ("constants" in described or "<" in cls or (cls != "" and "-v" not in cls))
    if source is None and is_object:
        source = _allowed_source(described, where)
    if source is not None:
        restored = (
            task(source, name=name, mode=mode)
            if isinstance(source, NativeEnv)
            else task(source, name=name, settings=settings, mode=mode, **limits)
        )
    elif shipped:
        restored = task(NATIVE_CLASSES[cls](), name=name, settings=described.get("constants", {}))
        restored = dataclasses.replace(restored, settings=settings)
    else:
        trusted.check_id(described["source"])
        trusted.check_settings(settings)
        restored = task(described["source"], name=name, settings=settings, mode=mode, native=False, **limits)
    return dataclasses.replace(restored, ranges=ranges, episodes=described.get("episodes", 1))
