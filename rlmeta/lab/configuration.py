"""The experiment of a saved configuration. It names the user's own code and data, which have to be given again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rlmeta.agents.agent import NetworkFactory
from rlmeta.envs import families, native, streams
from rlmeta.envs.native import NativeEnv
from rlmeta.envs.streams import TaskStream
from rlmeta.envs.task import Task, TaskFamily, task
from rlmeta.errors import CheckpointError, SettingError
from rlmeta.lab import flags
from rlmeta.lab.experiment import Budget, Experiment, Problem
from rlmeta.lab.shipped import METHODS, agent_class
from rlmeta.learning.method import Method
from rlmeta.learning.settings import check_names


def from_config(
    config: dict[str, Any],
    *,
    where: str,
    network: NetworkFactory | None = None,
    source: Any = None,
    methods: tuple[Method, ...] = (),
    own: Mapping[str, Any] | None = None,
) -> Experiment:
    """The experiment of a saved configuration.

    Args:
        config: as `Experiment.config` gave it.
        where: for error messages.
        network: the user's network again, where the run had one: a configuration names code but never loads it.
        source: the user's environment factory again, where the run had one.
        methods: the lifelong methods again, where the run had some.
        own: other settings that no configuration can hold (rewards, demonstrations that are no file), by name, again.

    Raises:
        CheckpointError: it is not the configuration of a run.
        SettingError: the user's own code or data were not given again.
    """
    try:
        cls = agent_class(config["exp_name"])
        tables = [dict(table) for table in config["variants"]]
        for table in tables:
            if "network" in table:
                table["network"] = _network_again(table["network"], network, where)
            if "learner" in table:
                table["learner"] = _learner_again(table["learner"], network, where)
            table.update({name: tuple(value) for name, value in table.items() if isinstance(value, list)})
            table.update(_own_again(table, own or {}, where))
            check_names(cls, table, where)
        return Experiment(
            variants=tuple(cls(**table) for table in tables),
            seeds=tuple(config["seeds"]),
            problem=problem_again(config["task"], source, where),
            budget=Budget(**config["budget"]),
            methods=_same_methods(methods, config["methods"], where) or methods_again(config["methods"], where),
            device=config["device"],
            threads=config["threads"],
        )
    except KeyError as error:
        raise CheckpointError(f"{where}: config.toml lacks {error}; it is not the configuration of a run") from None


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
    given = own or {}
    asked = [table for table in tables if table["name"] not in given]
    strange = [table.get("class", table["name"]) for table in asked if "class" in table or table["name"] not in METHODS]
    if strange:
        raise SettingError(
            f"{where} had lifelong methods of your own: pass them again as lifelong= (on the command line --lifelong "
            f"{','.join(strange)})"
        )
    made: list[Method] = []
    for table in tables:
        found: Any = given.get(table["name"], METHODS.get(table["name"]))
        values = {n: tuple(v) if isinstance(v, list) else v for n, v in table["settings"].items()}
        made.append(found if isinstance(found, Method) else found(**values))
    return tuple(made)


def _network_again(name: str, given: NetworkFactory | None, where: str) -> NetworkFactory:
    """The network of this name: rlmeta's own, or the user's, given again."""
    if name.startswith("rlmeta.nn."):
        own: NetworkFactory = flags.load_object(name)
        return own
    if given is None:
        raise SettingError(f"{where} had the network {name}: pass it again as network= (on the command line --network)")
    return given


def _learner_again(text: str, network: NetworkFactory | None, where: str) -> Any:
    """The settings of a learner inside another's; its network is not loaded either."""
    words = text.split()
    names = [word.removeprefix("network=") for word in words if word.startswith("network=")]
    found = flags.learner(" ".join(word for word in words if not word.startswith("network=")))
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


ENV_AGAIN = "pass it again as env= (on the command line --env PACKAGE.MODULE:NAME)"


def problem_again(described: dict[str, Any], source: Any, where: str) -> Problem:
    """The problem of a saved configuration.

    Raises:
        SettingError: the user's own data and code have to be given again.
    """
    kind = described.get("kind", "task")
    if kind == "stream":
        return _stream_again(described, source, where)
    if kind == "family" and source is None and "table" in described:
        return families.from_table(described["name"], described["table"])
    if kind == "family" and source is None and "task" in described:
        ranges = {name: (low, high) for name, (low, high) in described["ranges"].items()}
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
    tasks = tuple(problem_again(one, None, where) for one in described["tasks"])
    reveals, shown = frozenset(described["reveals"]), described["observe_identity"]
    return TaskStream(described["name"], tasks, reveals, order, scenario, described.get("restart_optimizer"), shown)


def _task_again(described: dict[str, Any], source: Any, where: str) -> Task:
    """The task of a saved configuration; a user's own code has to be given again."""
    if isinstance(source, Task):
        return source
    name, settings, mode = described["name"], described["settings"], described["mode"]
    ranges = {constant: (low, high) for constant, (low, high) in described["ranges"].items()}
    module, _, cls = described["source"].partition(":")
    if source is not None:
        made = (
            task(source, name=name, mode=mode)
            if isinstance(source, NativeEnv)
            else task(source, name=name, settings=settings, mode=mode)
        )
    elif module.startswith("rlmeta.envs.native.") and cls != "TabularMDP":
        made = Task(name, getattr(native, cls)(**described["constants"]), settings)
    elif "constants" in described or "<" in cls or (cls and "-v" not in cls):
        raise SettingError(f"{where} had environments of {described['source']}: {ENV_AGAIN}")
    else:
        made = task(described["source"], name=name, settings=settings, mode=mode, native=False)
    return dataclasses.replace(made, ranges=ranges)
