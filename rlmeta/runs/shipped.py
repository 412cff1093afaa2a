"""Learners and lifelong methods by their names on the command line: those that come with rlmeta, and the user's own."""

from __future__ import annotations

from rlmeta import agents, imitation, lifelong, meta, supervised
from rlmeta.errors import SettingError, unknown_name
from rlmeta.learning.method import Method
from rlmeta.learning.settings import name_of, settings_classes
from rlmeta.runs.objects import load_object

AGENTS: dict[str, type] = {name_of(cls): cls for cls in (*agents.ALL, *imitation.ALL, *supervised.ALL, *meta.ALL)}
"""The settings class of every agent, supervised learner, imitator and meta-learner."""

METHODS: dict[str, type[Method]] = {cls.name: cls for cls in lifelong.ALL}
"""Every lifelong method."""


def agent_class(name: str) -> type:
    """The settings class of an agent's command-line name, of the user's own where it is `package.module:Name`.

    Raises:
        UnknownNameError: there is none.
        SettingError: no such module or name, or what it names is no settings class; or a file names it.
    """
    if ":" in name:
        return checked_class(load_object(name), name)
    if name not in AGENTS:
        raise unknown_name("agent", name, [*AGENTS, "package.module:MyAgent"])
    return AGENTS[name]


def checked_class(value: object, name: str) -> type:
    """The class itself, if it is of a learner's settings.

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
    """What names a learner on the command line and in files: `ppo`, or `package.module:Name` of the user's own."""
    if settings_class in AGENTS.values():
        return name_of(settings_class)
    return f"{settings_class.__module__}:{settings_class.__qualname__}"
