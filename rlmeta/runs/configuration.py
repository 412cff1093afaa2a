"""The experiment of a saved configuration. It names the user's own code and data, which have to be given again."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
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
from rlmeta.learning.field_types import check_values
from rlmeta.learning.method import Method
from rlmeta.learning.populations import Population
from rlmeta.learning.settings import check_names, variants
from rlmeta.runs import grammar
from rlmeta.runs.digests import check_digests
from rlmeta.runs.experiment import Budget, Experiment, Problem, settings_table
from rlmeta.runs.folder import CONFIG
from rlmeta.runs.objects import load_object
from rlmeta.runs.populations import POPULATIONS
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
    """The experiment of a saved configuration.

    Args:
        config: as `Experiment.config` gave it.
        where: for error messages.
        agent: the user's own class of settings again, where the run had one: a configuration names code and loads none
            that the user has not allowed (`trusted.allowing`).
        network: the user's network again, where the run had one.
        source: the user's environment factory again, where the run had one.
        methods: the lifelong methods again, where the run had some.
        own: other settings that no configuration can hold (rewards, demonstrations that are no file), by name, again.
        training: read what only training needs, demonstrations and rewards; otherwise they are left out.

    Raises:
        CheckpointError: it is not the configuration of a run.
        SettingError: the user's own code or data were not given again, or are others than the run began with.
    """
    with trusted.reading(f"{where}/{CONFIG}"):
        return _from_config(config, where, agent, network, source, methods, own or {}, training)


def _from_config(
    config: dict[str, Any],
    where: str,
    agent: type | None,
    network: NetworkFactory | None,
    source: Any,
    methods: tuple[Method, ...],
    own: Mapping[str, Any],
    training: bool,
) -> Experiment:
    said = f"{where}/{CONFIG}"
    check_table(config, CONFIGURATION, said)
    check_table(config["budget"], {}, said)
    cls = _agent_again(config["exp_name"], agent, where)
    tables = [_settings_again(cls, table, agent, network, own, where, training) for table in config["variants"]]
    check_names(Budget, config["budget"], f"{said}: budget")
    for method in config["methods"]:
        check_table(method, METHOD, f"{said}: methods")
    if not tables:
        raise CheckpointError(f"{said}: variants is empty, expected the settings of a learner")
    experiment = Experiment(
        variants=tuple(_one_of(cls(**table), saved, said) for table, saved in zip(tables, config["variants"])),
        seeds=tuple(config["seeds"]),
        problem=problem_again(config["task"], source, where),
        budget=Budget(**config["budget"]),
        methods=_same_methods(methods, config["methods"], where) or methods_again(config["methods"], where),
        population=_population_again(config.get("population"), where),
        device=config["device"],
        threads=config["threads"],
    )
    check_digests(config["digests"], experiment.digests(), where)
    return experiment


def _one_of(settings: Any, saved: Mapping[str, Any], said: str) -> Any:
    """The settings of one variant, where rewards that were given again compare values: those it was described by."""
    compared = variants(settings)
    if len(compared) == 1:
        return compared[0]
    same = [one for one in compared if settings_table(one).get("rewards") == saved.get("rewards")]
    if not same:
        raise SettingError(f"{said} had the rewards {saved.get('rewards')}, which those given again are not")
    return same[0]


@contextlib.contextmanager
def within_memory(where: str) -> Iterator[None]:
    """Within, what a saved configuration describes is made, of a size that nothing has checked.

    Args:
        where: for error messages.

    Raises:
        CheckpointError: there is not so much memory, or not so large a number.
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
"""What torch's errors say of a tensor that cannot be so large."""
Kinds = Mapping[str, tuple[type, ...]]
"""The types of a table's entries by name."""

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
    """Refuse what is no table, or one in which an entry is missing or of another type.

    Raises:
        CheckpointError: with its name.
    """
    if not isinstance(table, dict):
        raise CheckpointError(f"{where} has {table!r}, expected a table: restore it from a copy")
    for name, types in kinds.items():
        if name not in table:
            raise CheckpointError(f"{where} lacks {name!r}; it is not the configuration of a run")
        if type(table[name]) not in types:
            expected = " or ".join(WORDS[one] for one in types)
            raise CheckpointError(f"{where}: {name} is {table[name]!r}, expected {expected}: restore it from a copy")


def _settings_again(
    cls: type,
    saved: Any,
    agent: type | None,
    network: NetworkFactory | None,
    own: Mapping[str, Any],
    where: str,
    training: bool,
) -> dict[str, Any]:
    """The arguments of a learner's settings, after a check of their types."""
    said = f"{where}/{CONFIG}: variants"
    check_table(saved, {}, said)
    check_table(saved, {name: TEXT for name in ("network", "learner") if name in saved}, said)
    table: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    check_names(cls, table, said)
    if "network" in table:
        table["network"] = _network_again(table["network"], network, where)
    if "learner" in table:
        table["learner"] = _learner_again(table["learner"], agent, network, where)
    if not training:
        table |= _left_out(table, own)
    table |= _own_again(table, own, where)
    check_values(cls, table, said)
    named = table.get("demonstrations")
    if isinstance(named, str | os.PathLike) and (training or "demonstrations" in own):
        table["demonstrations"] = Demonstrations.load(named)
    return table


def _left_out(table: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What stands for the settings that only training needs, unless they are given again."""
    found: dict[str, Any] = {}
    if "demonstrations" in table and "demonstrations" not in own:
        found["demonstrations"] = Unread(str(table["demonstrations"]))
    if "rewards" in table and "rewards" not in own:
        found["rewards"] = ()
    return found


def methods_again(
    tables: Sequence[Mapping[str, Any]], where: str, own: Mapping[str, Any] | None = None
) -> tuple[Method, ...]:
    """The lifelong methods of a saved configuration.

    Args:
        tables: of the configuration.
        where: for error messages.
        own: the user's own classes or instances of methods by name, again: a configuration names them only.

    Raises:
        SettingError: some of the user's own are missing.
    """
    given = {**_allowed_methods(tables), **(own or {})}
    asked = [table for table in tables if table["name"] not in given]
    strange = [table.get("class", table["name"]) for table in asked if "class" in table or table["name"] not in METHODS]
    if strange:
        raise SettingError(
            f"{where} had lifelong methods of your own: pass them again as lifelong= (on the command line --lifelong "
            f"{','.join(strange)}){_or_allow(strange[0])}"
        )
    made: list[Method] = []
    for table in tables:
        found: Any = given.get(table["name"], METHODS.get(table["name"]))
        values = {n: tuple(v) if isinstance(v, list) else v for n, v in table["settings"].items()}
        made.append(
            found if isinstance(found, Method) else _method(found, values, f"{where}/{CONFIG}: {table['name']}")
        )
    return tuple(made)


def _allowed_methods(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The user's own methods that a configuration names in modules which the user has allowed."""
    named = {table["name"]: table["class"] for table in tables if isinstance(table.get("class"), str)}
    return {name: load_object(text) for name, text in named.items() if trusted.is_allowed(text)}


def _population_again(table: Any, where: str) -> Population | None:
    """The population of a saved configuration, of the user's own class where the user has allowed its module."""
    if table is None:
        return None
    check_table(table, METHOD, f"{where}/{CONFIG}: population")
    named = table.get("class", table["name"])
    if named not in POPULATIONS and not trusted.is_allowed(str(named)):
        raise SettingError(
            f"{where}/{CONFIG} had a population of your own, {named}: give its module again{_or_allow(str(named))}"
        )
    cls: Any = POPULATIONS.get(named) or load_object(named)
    check_names(cls, table["settings"], f"{where}/{CONFIG}: population")
    check_values(cls, table["settings"], f"{where}/{CONFIG}: population")
    again: Population = cls(**table["settings"])
    return again


def _or_allow(named: str) -> str:
    """The other way to have again what a configuration names as `package.module:Name`, where there is one."""
    module = named.partition(":")[0]
    can_be_imported = all(part.isidentifier() for part in module.split(".")) and module != "__main__"
    if "<" in named or not can_be_imported:
        return ""
    return f", or allow the module as code=[{module!r}] (on the command line --code {module})"


def _method(cls: Any, values: dict[str, Any], where: str) -> Method:
    """The lifelong method with these settings, after a check of their types."""
    if dataclasses.is_dataclass(cls):
        check_names(cls, values, where)  # type: ignore[arg-type]
        check_values(cls, values, where)  # type: ignore[arg-type]
    elif values:
        raise CheckpointError(f"{where} has settings, but takes none: restore it from a copy")
    one: Method = cls(**values)
    return one


def _network_again(name: str, given: NetworkFactory | None, where: str) -> NetworkFactory:
    """The network of this name: rlmeta's own, or the user's, given again."""
    if name.startswith("rlmeta.nn.") or (given is None and trusted.is_allowed(name)):
        own: NetworkFactory = load_object(name)
        return own
    if given is None:
        raise SettingError(
            f"{where}/{CONFIG} had the network {name}: pass it again as network= (on the command line --network)"
            f"{_or_allow(name)}"
        )
    return given


def _agent_again(name: str, given: type | None, where: str) -> type:
    """The settings class of this name: rlmeta's own, or the user's, given again."""
    if ":" not in name or (given is None and trusted.is_allowed(name)):
        return agent_class(name)
    if given is None:
        raise SettingError(
            f"{where}/{CONFIG} had the agent {name}: pass it again as agent= (on the command line --agent)"
            f"{_or_allow(name)}"
        )
    if checked_class(given, name).__qualname__ != name.partition(":")[2]:
        raise SettingError(f"{where} had the agent {name}, got {given.__qualname__}: give the same")
    return given


def _learner_again(text: str, agent: type | None, network: NetworkFactory | None, where: str) -> Any:
    """The settings of a learner inside another's; neither it nor its network is loaded."""
    words = text.split()
    names = [word.removeprefix("network=") for word in words if word.startswith("network=")]
    cls = None if words[:1] in ([], ["none"]) else _agent_again(words[0], agent, where)
    found = grammar.learner(" ".join(word for word in words if not word.startswith("network=")), cls)
    return dataclasses.replace(found, network=_network_again(names[0], network, where)) if names else found


def _same_methods(given: tuple[Method, ...], tables: Sequence[dict[str, Any]], where: str) -> tuple[Method, ...]:
    """The methods that were given again, after a check that they are the run's."""
    had = [table["name"] for table in tables]
    if given and [method.name for method in given] != had:
        said = ", ".join(method.name for method in given)
        raise SettingError(f"{where} had lifelong methods {', '.join(had) or '(none)'}, got {said}: give the same")
    return given


def _own_again(table: Mapping[str, Any], own: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings that a configuration only describes, from those that were given again."""
    described = {n: value for n, value in table.items() if isinstance(value, str) and value[:1] == "<"}
    for name, value in described.items():
        if name not in own:
            raise SettingError(
                f"{where} had the {name} {value}, which a configuration only describes: pass it again as "
                f"own={{{name!r}: ...}} (on the command line --{name})"
            )
    return {name: own[name] for name in table if name in own}


DESCRIBED: dict[str, Kinds] = {
    "task": {"name": TEXT, "source": TEXT, "settings": TABLE, "mode": TEXT, "ranges": TABLE},
    "data": {"name": TEXT},
    "family": {"name": TEXT},
    "stream": {"name": TEXT, "order": (str, int), "scenario": TEXT},
}
"""What a configuration says of every kind of problem."""
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
    """The problem of a saved configuration.

    Raises:
        SettingError: the user's own data and code have to be given again.
    """
    kind, said = described.get("kind", "task"), f"{where}/{CONFIG}: task"
    if not isinstance(kind, str) or kind not in DESCRIBED:
        raise CheckpointError(f"{said}: kind is {kind!r}, expected one of {', '.join(DESCRIBED)}")
    check_table(described, DESCRIBED[kind], said)
    optional = {name: types for name, types in OPTIONAL.items() if name in described}
    check_table(described, optional, said)
    if "ranges" in described:
        _check_ranges(described["ranges"], said)
    if "table" in described:
        check_problem(described["table"], said)
    if kind == "stream":
        return _stream_again(described, source, where)
    if kind == "family" and source is None and "table" in described:
        return families.from_table(described["name"], described["table"])
    if kind == "family" and source is None and "task" in described:
        check_table(described, {"ranges": TABLE}, said)
        ranges = {name: (low, high) for name, (low, high) in described["ranges"].items()}
        check_table(described["task"], DESCRIBED["task"], said)
        base = _task_again(described["task"], None, where)
        return families.NamedFamily(described["name"], TaskFamily(described["name"], base, ranges))
    if kind in ("data", "family"):
        if source is None:
            what = "samples" if kind == "data" else "family"
            raise SettingError(f"{where} learned from your own {what} {described['name']!r}: {ENV_AGAIN}")
        made = kind == "data" or isinstance(source, families.NamedFamily)
        return source if made else families.NamedFamily(described["name"], source)
    return _task_again(described, source, where)


def _stream_again(described: dict[str, Any], source: Any, where: str) -> TaskStream:
    scenario, order = described["scenario"], described["order"]
    if isinstance(source, TaskStream):
        again = source if source.order == order else dataclasses.replace(source, order=order)
        said = again.describe()
        for name in ("scenario", "reveals", "restart_optimizer", "observe_identity"):
            if described.get(name) != said.get(name):
                raise SettingError(
                    f"{where} learned from a stream with {name}={described.get(name)!r}, this one has "
                    f"{said.get(name)!r}: give the one it learned from"
                )
        return again
    if "table" in described:
        table = described["table"]
        return streams.from_table(described["name"], table, scenario if "data" in table else None, order)
    stream: Kinds = {"tasks": LIST, "reveals": LIST, "observe_identity": SWITCH}
    check_table(described, stream, f"{where}/{CONFIG}: task")
    for one in described["tasks"]:
        check_table(one, {}, f"{where}/{CONFIG}: tasks")
    for one in described["reveals"]:
        check_table({"reveals": one}, {"reveals": TEXT}, f"{where}/{CONFIG}: task")
    tasks = tuple(problem_again(one, None, where) for one in described["tasks"])
    reveals, shown = frozenset(described["reveals"]), described["observe_identity"]
    return TaskStream(described["name"], tasks, reveals, order, scenario, described.get("restart_optimizer"), shown)


NATIVE_CLASSES: dict[str, type[NativeEnv]] = {type(env).__name__: type(env) for env in native.NATIVE.values()}
"""Native environments that their constants alone make again."""


def _allowed_source(described: dict[str, Any], where: str) -> Any:
    """The user's own environment, or what makes it, in a module that the user has allowed."""
    named = described["source"]
    if not trusted.is_allowed(named):
        raise SettingError(f"{where}/{CONFIG} had environments of {named}: {ENV_AGAIN}{_or_allow(named)}")
    found = load_object(named)
    made = isinstance(found, type) and issubclass(found, NativeEnv)
    return found(**described.get("constants", {})) if made else found


def _task_again(described: dict[str, Any], source: Any, where: str) -> Task:
    """The task of a saved configuration; a user's own code has to be given again."""
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
        made = (
            task(source, name=name, mode=mode)
            if isinstance(source, NativeEnv)
            else task(source, name=name, settings=settings, mode=mode, **limits)
        )
    elif shipped:
        made = task(NATIVE_CLASSES[cls](), name=name, settings=described.get("constants", {}))
        made = dataclasses.replace(made, settings=settings)
    else:
        trusted.check_id(described["source"])
        trusted.check_settings(settings)
        made = task(described["source"], name=name, settings=settings, mode=mode, native=False, **limits)
    return dataclasses.replace(made, ranges=ranges, episodes=described.get("episodes", 1))
