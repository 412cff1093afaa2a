"""Registry of learners and lifelong methods by their names on the command line, rlmeta's and the user's."""

from __future__ import annotations

import contextlib

from rlmeta import agents, imitation, lifelong, meta, offline, supervised
from rlmeta.envs.kinds import kind_named
from rlmeta.envs.names import names
from rlmeta.errors import RlmetaError, SettingError, did_you_mean, unknown_name
from rlmeta.learning.method import Method
from rlmeta.learning.settings import name_of, settings_classes
from rlmeta.rewards import RND, EpisodicCounts, PotentialShaping
from rlmeta.runs.objects import load_object

AGENTS: dict[str, type] = {
    name_of(cls): cls for package in (agents, imitation, offline, supervised, meta) for cls in package.ALL
}
"""Settings class of every agent, imitation, offline and supervised learner and meta-learner, by name."""

METHODS: dict[str, type[Method]] = {cls.name: cls for cls in lifelong.ALL}
"""Class of every lifelong method, by name."""


REWARDS: dict[str, type] = {
    f"{cls.__module__}:{cls.__qualname__}": cls for cls in (RND, EpisodicCounts, PotentialShaping)
}
"""Settings class of every reward of rlmeta that plain settings may bring back, by `package.module:Name`."""


def agent_class(name: str) -> type:
    """Look up an agent's settings class by its name on the command line, or in user code, `package.module:Name`.

    Raises:
        UnknownNameError: there is no such agent.
        SettingError: no such module or name, the object is not a settings class, or a file names it without permission.
    """
    if ":" in name:
        return checked_class(load_object(name), name)
    if name not in AGENTS:
        raise unknown_name("agent", name, [*AGENTS, "package.module:MyAgent"])
    return AGENTS[name]


def check_family(name: str, learner: str) -> None:
    """Refuse the name of a task or stream for a meta-learner, which needs a family; the error lists the families."""
    families = []
    for known in names("envs"):
        with contextlib.suppress(RlmetaError):  # an unreadable file hides no other family
            families += [known] if kind_named(known) == "family" else []
    if name not in families and kind_named(name) != "family":
        hint = did_you_mean(name, families) or f": expected one of {', '.join(families)}"
        raise SettingError(f"{learner} learns from a family of tasks, {name!r} is none{hint}")


def checked_class(value: object, name: str) -> type:
    """Check that a value is the settings class of a learner, and return it.

    Raises:
        SettingError: it is something else.
    """
    if not settings_classes({name: value}):
        raise SettingError(
            f"agent {name} is {value!r}, expected the class of an agent's settings: a frozen dataclass with a method "
            "bind, as agents/my_agent.py has"
        )
    return value  # type: ignore[return-value]


def name_on_command_line(settings_class: type) -> str:
    """Name of a learner on the command line and in files: `ppo`, or `package.module:Name` for user code."""
    if settings_class in AGENTS.values():
        return name_of(settings_class)
    return f"{settings_class.__module__}:{settings_class.__qualname__}"
